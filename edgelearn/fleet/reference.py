"""Reference tier: one device after another, in this process. The truth for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.fleet.evaluation import pieces
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Job, Phase, fit_by_jobs, weighted_sum
from edgelearn.fleet.workbench import Workshop
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
    """One workshop, one thread; what is not training can be shared by several."""

    def __init__(self, world: World, store_path: Path, *, num_threads: int = 1) -> None:
        """Make ready.

        Args:
            world: The scenario's world.
            store_path: The fleet's state.
            num_threads: Threads that consolidate and evaluate, each in a workshop of its own.
        """
        self._world = world
        self._shops = [Workshop(world, store_path) for _ in range(num_threads)]
        self._threads: ThreadPoolExecutor | None = None
        if num_threads > 1:
            # The number of threads of an operation belongs to the thread that starts it.
            self._threads = ThreadPoolExecutor(
                num_threads, "edgelearn", initializer=torch.set_num_threads, initargs=(1,)
            )

    @property
    def name(self) -> str:
        """The tier's name."""
        return "reference"

    @property
    def num_workers(self) -> int:
        """Processes that work."""
        return 1

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs."""
        cut = pieces(self._world, jobs)
        # Training seeds torch's process-wide generator, so it stays in this thread.
        trains = any(job.phase is Phase.FIT for job in jobs)
        with one_thread():
            if self._threads is None or trains or len(cut) < 2:
                found = [_do(self._shops[0], piece, params, updates) for piece in cut]
            else:
                found = self._in_threads(self._threads, cut, params, updates)
        return [done for results in found for done in results]

    def _in_threads(
        self, threads: ThreadPoolExecutor, cut: list[list[Job]], params: Tensor, updates: Tensor
    ) -> list[list[Done]]:
        free = SimpleQueue[Workshop]()
        for shop in self._shops:
            free.put(shop)

        def work(piece: list[Job]) -> list[Done]:
            shop = free.get()
            try:
                return _do(shop, piece, params, updates)
            finally:
                free.put(shop)

        return list(threads.map(work, cut))

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort, one device after another."""
        costs = self._world.train_sizes(
            cohort.devices, cohort.position, server_round=cohort.server_round
        )
        return fit_by_jobs(self.run, cohort, costs, params, updates)

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return weighted_sum(updates, weights)

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return memory for updates [rows, size]."""
        return torch.zeros(rows, size)

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _do(shop: Workshop, piece: list[Job], params: Tensor, updates: Tensor) -> list[Done]:
    if piece[0].phase is Phase.EVALUATE:
        return shop.evaluate(piece, params)
    return [shop.perform(job, params, updates[job.row]) for job in piece]
