"""Reference tier: one device after another, in this process. The truth for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.fleet.evaluation import pieces
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Job, Phase, fit_by_jobs, weighted_sum
from edgelearn.fleet.workbench import Workbench
from edgelearn.scenario.world import World


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: more change the order of sums, and are slower on small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@final
class ReferenceEngine:
    """One workbench, one thread."""

    def __init__(self, world: World, store_path: Path) -> None:
        self._world = world
        self._bench = Workbench(world, store_path)

    @property
    def name(self) -> str:
        """The tier's name."""
        return "reference"

    @property
    def num_workers(self) -> int:
        """Processes that work."""
        return 1

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs, in order."""
        with one_thread():
            done: list[Done] = []
            for piece in pieces(self._world, jobs):
                if piece[0].phase is Phase.EVALUATE:
                    done += self._bench.evaluate(piece, params)
                else:
                    done += [self._bench.perform(job, params, updates[job.row]) for job in piece]
            return done

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort, one device after another."""
        costs = self._world.train_sizes(cohort.devices, cohort.position)
        return fit_by_jobs(self.run, cohort, costs, params, updates)

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return weighted_sum(updates, weights)

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return memory for updates [rows, size]."""
        return torch.zeros(rows, size)

    def close(self) -> None:
        """Nothing to release."""
