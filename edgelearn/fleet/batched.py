"""Batched tier: tiny networks of many devices trained as one stack, in this process.

Linear networks with a strategy that declares what it does are trained by a written-out pass
(`device.stacked`), others by autograd over all devices at once (`device.vmapped`).

It pays only while the parameters of a stack stay in the second-level cache, so only networks of
which at least four fit are trained so; `why_not` says what keeps a scenario from it. Everything but
plain local training is done as the reference tier does it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgelearn.continual.memory import kept
from edgelearn.continual.strategy import ROUND_HOOKS
from edgelearn.device.fleet_store import UNWRITTEN
from edgelearn.device.learner import Learner
from edgelearn.device.learners import make_learner
from edgelearn.device.stacked import Devices, StackTrained, train_stack
from edgelearn.device.tracking import Trackers
from edgelearn.device.training import Training
from edgelearn.device.vmapped import Learners, train_vmapped
from edgelearn.fleet import together
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Integers, Job, weighted_sum
from edgelearn.fleet.reference import ReferenceEngine, one_thread
from edgelearn.scenario.samples import EMPTY, Samples
from edgelearn.scenario.world import World
from edgelearn.stack import NotAStackError, Stack

_log = logging.getLogger(__name__)
_FEWEST = 4
_MOST = 256
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_not(world: World, learner: Learner, *, tries_hooks: bool = False) -> str | None:
    """Return what keeps a scenario from the batched tier; None if nothing does.

    Args:
        world: The scenario's world.
        learner: Its learner.
        tries_hooks: Whether to find out, by calling them here, if hooks and network that no
            written-out pass knows can be stacked; else they can't.
    """
    if (reason := together.holds_parts(world)) is not None:
        return reason
    layout = learner.model.layout
    if rows_in_cache(layout.size) < _FEWEST:
        return f"fewer than {_FEWEST} networks of {layout.size:,} parameters fit into the cache"
    if any(isinstance(layer, _CONVOLUTIONS) for layer in learner.model.module.modules()):
        return "the network has convolutions, which are slower in a stack"
    if learner.detector is not None:
        return together.DETECTS
    if (reason := together.feeds_back(learner) or together.saves_memory(learner)) is not None:
        return reason
    obstacle = _not_written_out(world, learner)
    if obstacle is None or not tries_hooks:
        return obstacle
    if learner.strategy.keeps_network:
        return f"{type(learner.strategy).__name__} keeps the network on the device"
    if (reason := together.has_public(learner)) is not None:
        return reason
    if learner.strategy.overrides("upload"):
        return f"{type(learner.strategy).__name__} changes what a device sends"
    if any(map(learner.strategy.overrides, (*ROUND_HOOKS, "view", "gradient"))):
        return f"{type(learner.strategy).__name__} does more in a round than steps"
    if layout.size != layout.num_trained:
        return "some of the network's tensors are not trained by gradient"
    return _probe(world, learner)


def _not_written_out(world: World, learner: Learner) -> str | None:
    """Return why no written-out pass trains a scenario; None if one does."""
    if (reason := together.not_declared(learner)) is not None:
        return reason
    try:
        is_linear = Stack.of(learner.model, world.sample_shape).is_linear
    except NotAStackError as error:
        return f"the network is no plain stack: {error}"
    return None if is_linear else "the network is more than linear layers"


def _training(learner: Learner) -> Training:
    return Training(learner.model, learner.strategy, learner.spec)


def _probe(world: World, learner: Learner) -> str | None:
    """Return why hooks or network can't be stacked, as two made-up devices find it out.

    Made up, so that a run decides the same when it is resumed.
    """
    ids = torch.arange(min(learner.spec.batch_size, len(world.train.y)), dtype=torch.int32)
    initial = learner.initial_state(world.train).memory
    memory = {name: torch.stack([value, value]) for name, value in initial.items()}
    twins = Learners([Samples(world.train, ids)] * 2, np.zeros(2, np.uint64), memory)
    try:
        with one_thread():
            _stacked(learner, learner.model.initial(), twins, 0.0)
    except _NoStackError as error:
        return f"devices can't be stacked: {error}"
    return None


class _NoStackError(Exception):
    """Hooks or network can't be stacked; the message is the reason."""


def _stacked(
    learner: Learner, params: Tensor, learners: Learners, mu: float
) -> tuple[StackTrained, dict[str, Tensor]]:
    """Train devices together.

    Raises:
        _NoStackError: If anything goes wrong.
    """
    training = _training(learner)
    try:
        return train_vmapped(training, learner.declaration, params, learners, proximal_mu=mu)
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise _NoStackError(f"{type(error).__name__}: {reason}") from error


def rows_in_cache(num_params: int) -> int:
    """Return how many networks the second-level cache holds; half as many were slower."""
    return min(_cache_bytes() // (4 * num_params), _MOST)


def _cache_bytes() -> int:
    """Return the size of a core's second-level cache; 1 MiB where the system does not tell."""
    try:
        text = _CACHE.read_text().strip()
    except OSError:
        return 2**20
    factor = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
    number = text.rstrip("KM")
    return int(number) * factor if number.isdigit() else 2**20


@final
class BatchedEngine:
    """Stacks of devices, and a reference engine for the rest."""

    def __init__(self, world: World, store_path: Path) -> None:
        """Make ready; `why_not` must have nothing to say."""
        self._world, self._learner = world, make_learner(world)
        self._rest = ReferenceEngine(world, store_path)
        self._memories = together.open_memories(world, self._learner, store_path)
        self._stack = None
        if _not_written_out(world, self._learner) is None:
            self._stack = Stack.of(self._learner.model, world.sample_shape)
        self._trackers = Trackers.of(world)
        self._rows = max(rows_in_cache(self._learner.model.layout.size), 1)

    @property
    def name(self) -> str:
        """The tier's name."""
        return "batched"

    @property
    def num_workers(self) -> int:
        """Processes that work."""
        return 1

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs; training goes into stacks."""
        return together.run(jobs, params, updates, self.fit, self._rest.run)

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort in stacks, apart from devices that have to catch up first."""
        with one_thread():
            if self._stack is None:
                return self._fit_vmapped(cohort, params, updates)
            train = partial(self._train, self._stack)
            return self._fit(cohort, params, updates, train)

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return weighted_sum(updates, weights)

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return memory for updates [rows, size]."""
        return torch.zeros(rows, size)

    def close(self) -> None:
        """Nothing to release."""
        self._rest.close()

    def _fit(
        self, cohort: CohortFit, params: Tensor, updates: Tensor, train: together.Train
    ) -> CohortDone:
        return together.fit(
            cohort,
            params,
            updates,
            self._world,
            self._learner,
            self._memories,
            train,
            self._rest.run,
            self._trackers,
        )

    def _fit_vmapped(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train stacks of devices with equally many samples, and devices without their like."""
        done = CohortDone.empty(cohort)
        sizes = self._world.train_sizes(
            cohort.devices, cohort.position, server_round=cohort.server_round
        )
        for rows in self._alike(sizes):
            part, out = cohort.of(rows), torch.empty(len(rows), updates.shape[1])
            done.put(rows.tolist(), self._fit_alike(part, params, out))
            updates[torch.from_numpy(rows)] = out
        return done

    def _alike(self, sizes: Integers) -> Iterator[Integers]:
        """Yield the rows of each stack: devices with equally many samples."""
        rows = np.argsort(-sizes, kind="stable")
        for group in np.split(rows, np.flatnonzero(np.diff(sizes[rows])) + 1):
            yield from np.array_split(group, math.ceil(len(group) / self._rows))

    def _fit_alike(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        if len(cohort) < _FEWEST:
            return self._rest.fit(cohort, params, updates)
        try:
            return self._fit(cohort, params, updates, self._train_vmapped)
        except _NoStackError as error:  # one by one, what a hook raises is its device's failure
            _log.info("%d devices train one by one: %s", len(cohort), error)
            return self._rest.fit(cohort, params, updates)

    def _train_vmapped(self, cohort: CohortFit, params: Tensor, out: Tensor) -> together.Trained:
        """Train all of a cohort as one stack."""
        learner, places = self._learner, (cohort.devices, cohort.read_slots)
        initial = learner.initial_state().memory
        given = {name: self._gathered(name, *places, initial[name]) for name in initial}
        ids, starts = self._world.train_ids(
            cohort.devices, cohort.position, server_round=cohort.server_round
        )
        samples = [
            Samples(self._world.train, own)
            for own in torch.split(torch.from_numpy(ids), np.diff(starts).tolist())
        ]
        learners = Learners(samples, together.seeds_of(learner.seed, cohort), given)
        mu = cohort.proximal_mu + learner.strategy.proximity()
        found, memory = _stacked(learner, params, learners, mu)
        torch.sub(found.params, params, out=out)
        norms = torch.linalg.vector_norm(out, dim=1).numpy().astype(np.float64)
        stored = kept(learner.declaration)
        new = {n: rows for n, rows in memory.items() if n in stored and rows is not given[n]}
        return together.Trained(found.loss, found.num_steps, found.num_samples, norms, new)

    def _gathered(self, name: str, devices: Integers, slots: Integers, initial: Tensor) -> Tensor:
        """Return one tensor of what many devices remember [K, ...]."""
        values = torch.from_numpy(self._memories.gather(name, devices, slots, fill=0))
        values[torch.from_numpy(slots == UNWRITTEN)] = initial
        return values

    def _train(
        self, stack: Stack, cohort: CohortFit, params: Tensor, out: Tensor
    ) -> together.Trained:
        """Train all of a cohort, the largest devices first, stack by stack."""
        learner = self._learner
        ids, starts = self._world.train_ids(
            cohort.devices, cohort.position, server_round=cohort.server_round
        )
        seeds = together.seeds_of(learner.seed, cohort)
        strategy, places = learner.strategy, (cohort.devices, cohort.read_slots)
        everyone = Devices(ids, starts, seeds)
        if (rehearsal := strategy.rehearsal()) is not None:
            held = self._memories.gather(rehearsal.buffer, *places, fill=EMPTY)
            everyone = replace(everyone, held=held)
        if (pull := strategy.pull()) is not None:
            curvature, anchor = (
                torch.from_numpy(self._memories.gather(name, *places, fill=0))
                for name in (pull.curvature, pull.anchor)
            )
            everyone = replace(everyone, curvature=curvature, anchor=anchor)
        new: dict[str, Tensor] = {}
        if (path := strategy.path()) is not None:
            new[path.charge] = torch.from_numpy(self._memories.gather(path.charge, *places, fill=0))
            everyone = replace(everyone, charge=new[path.charge].clone())
        largest_first = np.argsort(-everyone.sizes, kind="stable")
        trained = replace(together.Trained.empty(len(cohort)), kept=new)
        for start in range(0, len(cohort), self._rows):
            rows = largest_first[start : start + self._rows]
            found = train_stack(
                stack,
                strategy,
                learner.spec,
                params,
                self._world.train,
                everyone.take(rows),
                proximal_mu=cohort.proximal_mu + self._learner.strategy.proximity(),
            )
            out[torch.from_numpy(rows)] = found.params.sub_(params)
            if path is not None and found.charge is not None:
                new[path.charge][torch.from_numpy(rows)] = found.charge
            trained.loss[rows], trained.num_steps[rows] = found.loss, found.num_steps
            trained.num_samples[rows] = found.num_samples
        trained.norms[:] = torch.linalg.vector_norm(out, dim=1).numpy()
        if path is not None and path.moved is not None:
            new[path.moved] = together.moved(self._memories, path.moved, cohort, out)
        return trained
