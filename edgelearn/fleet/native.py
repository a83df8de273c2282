"""Native tier: a cohort's training in one call of compiled code, one thread per core.

Covers plain stacks (`edgelearn.stack`) with client strategies that declare what they do, and SGD;
`why_not` says what keeps a scenario from it. Everything but plain local training (consolidation,
evaluation, a device that has to catch up) is done as the reference tier does it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.strategy import Pull, Rehearsal
from edgelearn.device.fleet_store import RecordFile, RecordLayout
from edgelearn.device.learner import Learner, make_learner, refuse_divergence
from edgelearn.errors import DivergenceError
from edgelearn.federated import egress
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Job, Phase
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.scenario.samples import EMPTY
from edgelearn.scenario.world import World
from edgelearn.seeds import derive, split_all
from edgelearn.stack import Conv2d, Flatten, Layer, Linear, MaxPool2d, NotAStackError, Stack

MISSING = "edgelearn-native is not installed"


def is_installed() -> bool:
    """Whether the compiled kernels are there."""
    return importlib.util.find_spec("edgelearn_native") is not None


def why_not(world: World, learner: Learner) -> str | None:
    """Return what keeps a scenario from the native tier; None if nothing does."""
    strategy, spec = learner.strategy, learner.spec
    name = type(strategy).__name__
    if not is_installed():
        return MISSING
    if not strategy.is_declared or strategy.overrides("upload"):
        return f"{name} computes what it does instead of declaring it"
    pull = strategy.pull()
    if pull is not None and pull.is_explicit:
        return f"{name} takes its penalty as a gradient"
    if spec.optimizer != "sgd":
        return f"the optimizer is {spec.optimizer}"
    try:
        _plan(Stack.of(learner.model, world.sample_shape))
    except NotAStackError as error:
        return f"the network is no plain stack: {error}"
    except ValueError as error:
        return str(error)
    return None


@final
class NativeEngine:
    """Compiled training, and a reference engine for the rest."""

    def __init__(self, world: World, store_path: Path, *, num_threads: int) -> None:
        """Make ready; `why_not` must have nothing to say.

        Args:
            world: The scenario's world.
            store_path: The fleet's state.
            num_threads: Devices that train at once.
        """
        import edgelearn_native as kernels

        self._world, self._num_threads, self._kernels = world, num_threads, kernels
        self._learner = make_learner(world)
        self._rest = ReferenceEngine(world, store_path)
        layout = RecordLayout.of(self._learner.declaration)
        self._file = RecordFile(store_path, layout, world.scenario.fleet.num_devices)
        self._plan = _plan(Stack.of(self._learner.model, world.sample_shape))
        self._data = _data(world)

    @property
    def name(self) -> str:
        """The tier's name."""
        return "native"

    @property
    def num_workers(self) -> int:
        """Threads that train."""
        return self._num_threads

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs; training goes to the compiled code."""
        fits = [job for job in jobs if job.phase is Phase.FIT]
        done = {job.row: result for job, result in self._one_by_one(jobs, fits, params, updates)}
        if fits:
            done |= self._together(fits, params, updates)
        return [done[job.row] for job in jobs]

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort in one call, apart from devices that have to catch up first."""
        done = CohortDone.empty(cohort)
        starts_anew = self._learner.strategy.overrides("start")
        behind = cohort.consolidated < cohort.position
        if starts_anew:
            behind |= cohort.begun <= cohort.position
        plain = np.flatnonzero(~behind)
        if len(plain):
            self._train(cohort, plain, params, updates, done)
        rows = np.flatnonzero(behind).tolist()
        if rows:
            sizes = self._world.train_sizes(cohort.devices, cohort.position)
            for result in self._rest.run(cohort.jobs(rows, sizes), params, updates):
                done.take(result)
            done.norms[rows] = torch.linalg.vector_norm(updates[rows], dim=1).numpy()
        return done

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        total = torch.empty(updates.shape[1])
        self._kernels.weighted_sum(updates.numpy(), weights, total.numpy(), self._num_threads)
        return total

    def close(self) -> None:
        """Nothing to release."""
        self._rest.close()

    # -- training ----------------------------------------------------------------------------------

    def _train(
        self,
        cohort: CohortFit,
        rows: NDArray[np.int64],
        params: Tensor,
        updates: Tensor,
        done: CohortDone,
    ) -> None:
        """Train some rows of a cohort in one call."""
        devices, spec = cohort.devices[rows], self._learner.spec
        ids, starts = self._world.train_ids(devices, cohort.position)
        base = derive(self._world.scenario.seed, "steps", cohort.server_round)
        seeds = split_all(base, devices)
        whole = len(rows) == len(updates)
        target = updates if whole else torch.empty(len(rows), updates.shape[1])
        loss, steps, passed = self._plan.fit(
            self._data,
            params.numpy(),
            target.numpy(),
            ids=ids,
            starts=starts,
            seeds=seeds,
            draw_seeds=seeds,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            lr=spec.lr,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            proximal_mu=cohort.proximal_mu,
            num_threads=self._num_threads,
            **self._declared(cohort, rows),
        )
        finite, norms = np.empty(len(rows), bool), np.empty(len(rows))
        self._kernels.finite_rows(target.numpy(), finite, norms, self._num_threads)
        for index in np.flatnonzero(~(finite & np.isfinite(loss))).tolist():
            row, device = int(rows[index]), int(devices[index])
            done.errors[row] = _divergence(device, cohort.server_round, float(loss[index]))
            target[index] = loss[index] = steps[index] = passed[index] = 0
        if not whole:
            updates[torch.from_numpy(rows)] = target
        done.num_examples[rows] = np.diff(starts)
        done.loss[rows], done.num_steps[rows], done.num_samples[rows] = loss, steps, passed
        done.norms[rows] = norms
        done.progress[rows, 0] = cohort.position + 1

    def _declared(self, cohort: CohortFit, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return the arguments for what the strategy declares."""
        strategy = self._learner.strategy
        arguments: dict[str, Any] = {}
        devices, slots = cohort.devices[rows], cohort.read_slots[rows]
        if (rehearsal := strategy.rehearsal()) is not None:
            arguments |= self._replay(rehearsal, devices, slots)
        if (pull := strategy.pull()) is not None:
            arguments |= self._pull(pull, devices, slots)
        return arguments

    def _replay(
        self, rehearsal: Rehearsal, devices: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> dict[str, Any]:
        buffers = self._file.gather(rehearsal.buffer, devices, slots, fill=EMPTY)
        held = buffers != EMPTY
        starts = np.concatenate([[0], np.cumsum(held.sum(1))]).astype(np.int64)
        return {
            "replay_ids": buffers[held],
            "replay_starts": starts,
            "replay_batch": rehearsal.count,
            "replay_share": -1.0 if rehearsal.share is None else rehearsal.share,
        }

    def _pull(
        self, pull: Pull, devices: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> dict[str, Any]:
        return {
            "curvature": self._file.addresses(pull.curvature, devices, slots),
            "anchor": self._file.addresses(pull.anchor, devices, slots),
            "curvature_size": self._learner.model.layout.num_trained,
            "strength": pull.strength,
        }

    # -- jobs --------------------------------------------------------------------------------------

    def _one_by_one(
        self, jobs: Sequence[Job], fits: Sequence[Job], params: Tensor, updates: Tensor
    ) -> list[tuple[Job, Done]]:
        others = [job for job in jobs if job.phase is not Phase.FIT] if fits else list(jobs)
        results = self._rest.run(others, params, updates) if others else []
        return list(zip(others, results, strict=True))

    def _together(self, fits: Sequence[Job], params: Tensor, updates: Tensor) -> dict[int, Done]:
        """Train jobs of one round as a cohort."""
        first = fits[0]

        def column(name: str) -> NDArray[np.int64]:
            return np.array([getattr(job, name) for job in fits], np.int64)

        cohort = CohortFit(
            devices=column("device"),
            server_round=first.server_round,
            position=first.position,
            begun=column("begun"),
            consolidated=column("consolidated"),
            read_slots=column("read_slot"),
            write_slots=column("write_slot"),
            serial=first.serial,
            proximal_mu=first.proximal_mu,
        )
        rows = torch.from_numpy(column("row"))
        own = torch.zeros(len(fits), updates.shape[1])
        done = self.fit(cohort, params, own)
        updates[rows] = own
        return {job.row: done.of(index, job.row) for index, job in enumerate(fits)}


def _divergence(device: int, server_round: int, loss: float) -> str:
    """Return the reason that the learner gives."""
    try:
        refuse_divergence(device, server_round, loss)
    except DivergenceError as error:
        return egress.reason_of(error)


def _plan(stack: Stack) -> Any:
    """Return the compiled kernels' plan of a stack.

    Raises:
        ValueError: If they do not cover it.
    """
    import edgelearn_native as kernels

    layers = [_as_tuple(layer) for layer in stack.layers]
    return kernels.Plan(stack.input_shape, stack.num_params, layers)


def _as_tuple(layer: Layer) -> tuple[Any, ...]:
    if isinstance(layer, Linear):
        return ("linear", layer.weight, layer.bias, layer.fan_out)
    if isinstance(layer, Conv2d):
        places = layer.weight, layer.bias, layer.channels_out
        return ("conv2d", *places, *layer.kernel, *layer.padding)
    if isinstance(layer, MaxPool2d):
        return ("maxpool2d", layer.size)
    return ("flatten",) if isinstance(layer, Flatten) else ("relu",)


def _data(world: World) -> Any:
    """Return the training samples of the whole fleet; nothing is copied."""
    import edgelearn_native as kernels

    store = world.train
    encoding, domains = store.encoding, store.domains
    return kernels.Data(
        store.x.numpy(),
        store.y.numpy(),
        scale=encoding.scale / encoding.std,
        shift=encoding.mean / encoding.std,
        domain_index=None if domains is None else domains.index.numpy(),
        domain_weight=None if domains is None else domains.weight.numpy(),
        task_masks=None if encoding.task_masks is None else encoding.task_masks.numpy(),
    )
