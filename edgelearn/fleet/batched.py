"""Batched tier: tiny networks of many devices trained as one stack, in this process.

It pays only while the parameters of a stack stay in the second-level cache, so only networks of
which at least four fit are trained so; `why_not` says what keeps a scenario from it. Everything but
plain local training is done as the reference tier does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.device.learner import Learner, make_learner
from edgelearn.device.stacked import Devices, train_stack
from edgelearn.fleet import together
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Job, weighted_sum
from edgelearn.fleet.reference import ReferenceEngine, one_thread
from edgelearn.scenario.samples import EMPTY
from edgelearn.scenario.world import World
from edgelearn.stack import NotAStackError, Stack

_FEWEST = 4
_MOST = 256
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def why_not(world: World, learner: Learner) -> str | None:
    """Return what keeps a scenario from the batched tier; None if nothing does."""
    if (reason := together.not_declared(learner)) is not None:
        return reason
    try:
        stack = Stack.of(learner.model, world.sample_shape)
    except NotAStackError as error:
        return f"the network is no plain stack: {error}"
    if not stack.is_linear:
        return "the network has convolutions, which are slower in a stack"
    if rows_in_cache(stack.num_params) < _FEWEST:
        return (
            f"fewer than {_FEWEST} networks of {stack.num_params:,} parameters fit into the cache"
        )
    return None


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
        self._stack = Stack.of(self._learner.model, world.sample_shape)
        self._rows = max(rows_in_cache(self._stack.num_params), 1)

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
            return together.fit(
                cohort, params, updates, self._world, self._learner, self._train, self._rest.run
            )

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return weighted_sum(updates, weights)

    def close(self) -> None:
        """Nothing to release."""
        self._rest.close()

    def _train(self, cohort: CohortFit, params: Tensor, out: Tensor) -> together.Trained:
        """Train all of a cohort, the largest devices first, stack by stack."""
        learner = self._learner
        ids, starts = self._world.train_ids(cohort.devices, cohort.position)
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
        largest_first = np.argsort(-everyone.sizes, kind="stable")
        trained = together.Trained.empty(len(cohort))
        for start in range(0, len(cohort), self._rows):
            rows = largest_first[start : start + self._rows]
            found = train_stack(
                self._stack,
                strategy,
                learner.spec,
                params,
                self._world.train,
                everyone.take(rows),
                proximal_mu=cohort.proximal_mu,
            )
            out[torch.from_numpy(rows)] = found.params - params
            trained.loss[rows], trained.num_steps[rows] = found.loss, found.num_steps
            trained.num_samples[rows] = found.num_samples
        trained.norms[:] = torch.linalg.vector_norm(out, dim=1).numpy()
        return trained
