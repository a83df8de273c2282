"""Pool tier: workshops in worker processes, with parameters and updates in shared memory.

Workers are started once. Pipes carry jobs and results, never tensors. Each worker has a pipe of
its own and gets its next jobs when it is done with the last, the longest jobs first: who does what
has no effect on the result. A worker that dies is replaced, and the job it was at is recorded as
failed; a group that it was evaluating is done one device at a time, which shows whose fault it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.multiprocessing
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.errors import RunError
from edgelearn.fleet.evaluation import pieces
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Job, Phase, fit_by_jobs, weighted_sum
from edgelearn.fleet.workbench import Workshop
from edgelearn.scenario.world import World

_PRELOAD = ["torch", "edgelearn.fleet.workbench"]


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    pieces: list[list[Job]]  # without what it has reported


@final
class PoolEngine:
    """N processes, one torch thread each."""

    def __init__(
        self, world: World, store_path: Path, *, num_workers: int, cohort: int, num_params: int
    ) -> None:
        """Start the workers.

        Args:
            world: The scenario's world; its samples are moved to shared memory once.
            store_path: The fleet's state.
            num_workers: Processes.
            cohort: Devices that can send an update in one call of `run`.
            num_params: Length of the longest parameter vector, P.
        """
        self._params = torch.zeros(num_params)
        self._updates = torch.zeros(cohort, num_params)
        self._world = world
        samples = (world.train.x, world.train.y, world.test.x, world.test.y)
        for tensor in (self._params, self._updates, *samples):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        self._arguments = (world, store_path, self._params, self._updates)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._workers = [self._start() for _ in range(num_workers)]

    @property
    def name(self) -> str:
        """The tier's name."""
        return "pool"

    @property
    def num_workers(self) -> int:
        """Processes that work."""
        return len(self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs, the longest first, on whichever worker is free."""
        self._params[: len(params)] = params  # a part, where the jobs' devices hold one
        capacity = len(self._updates)
        if updates.numel() and len(jobs) > capacity:  # in waves that fit the shared memory
            done = []
            for start in range(0, len(jobs), capacity):
                wave = [replace(j, row=j.row - start) for j in jobs[start : start + capacity]]
                results = self._run_wave(wave, updates[start : start + capacity])
                done += [replace(result, row=result.row + start) for result in results]
            return done
        return self._run_wave(jobs, updates)

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort, the largest devices first."""
        costs = self._world.train_sizes(
            cohort.devices, cohort.position, server_round=cohort.server_round
        )
        return fit_by_jobs(self.run, cohort, costs, params, updates)

    def _run_wave(self, jobs: Sequence[Job], updates: Tensor) -> list[Done]:
        queue = deque(
            sorted(
                pieces(self._world, jobs),
                key=lambda piece: (-sum(job.cost for job in piece), piece[0].row),
            )
        )
        done: dict[int, Done] = {}
        while len(done) < len(jobs):
            for worker in self._workers:
                if queue and not worker.pieces:
                    self._hand_out(worker, queue)
            sources: list[Any] = [worker.pipe for worker in self._workers if worker.pieces]
            for pipe in wait(sources):
                worker = next(w for w in self._workers if w.pipe is pipe)
                self._take_in(worker, queue, done)
        with_update = [job.row for job in jobs if done[job.row].error is None]
        if updates.numel() and updates.data_ptr() != self._updates.data_ptr():
            updates[with_update] = self._updates[with_update, : updates.shape[1]]
        return [done[job.row] for job in jobs]

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return weighted_sum(updates, weights)

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return shared memory for updates [rows, size], which workers fill."""
        fits = rows <= len(self._updates) and size == self._updates.shape[1]
        return self._updates[:rows] if fits else torch.zeros(rows, size)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def _hand_out(self, worker: _Worker, queue: deque[list[Job]]) -> None:
        # A few at once while there are many: a pipe's round trip costs as much as a tiny job.
        count = max(1, len(queue) // (4 * len(self._workers)))
        worker.pieces = [queue.popleft() for _ in range(min(count, len(queue)))]
        with contextlib.suppress(OSError):  # it died: reading its pipe will tell
            worker.pipe.send(worker.pieces)

    def _take_in(self, worker: _Worker, queue: deque[list[Job]], done: dict[int, Done]) -> None:
        try:
            result: Done = worker.pipe.recv()
        except (EOFError, OSError):
            # It died at the first piece that it has not reported; the others go to another worker.
            worker.process.join(timeout=5)
            code = worker.process.exitcode
            lost, *others = worker.pieces
            queue.extendleft(reversed(others))
            if len(lost) > 1:
                queue.extendleft([job] for job in reversed(lost))
            else:
                reason = f"its worker process died (exit code {code})"
                done[lost[0].row] = Done(lost[0].row, error=reason, died=True)
            worker.pipe.close()
            self._workers[self._workers.index(worker)] = self._start()
            return
        del worker.pieces[0][0]
        if not worker.pieces[0]:
            del worker.pieces[0]
        done[result.row] = result

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, *self._arguments), daemon=True, name="edgelearn-worker"
        )
        process.start()
        theirs.close()
        try:
            ready = ours.recv()
        except EOFError:
            process.join(timeout=5)
            raise RunError(
                f"a worker process could not start (exit code {process.exitcode}); in a script, "
                "call edgelearn from under `if __name__ == '__main__':`"
            ) from None
        if ready is not None:
            raise RunError(f"a worker process could not start: {ready}")
        return _Worker(process, ours, [])


def _work(
    pipe: Connection, world: World, store_path: Path, params: Tensor, updates: Tensor
) -> None:
    """Body of a worker process."""
    torch.set_num_threads(1)
    try:
        shop = Workshop(world, store_path)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    none = torch.empty(0)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (work := pipe.recv()) is not None:
            for piece in work:
                held = shop.num_params(piece[0].device)
                given = params[:held]
                if piece[0].phase is Phase.EVALUATE:
                    for result in shop.evaluate(piece, given):
                        pipe.send(result)
                    continue
                for job in piece:
                    update = updates[job.row, :held] if job.phase is Phase.FIT else none
                    pipe.send(shop.perform(job, given, update))
    os._exit(0)  # skip torch's slow teardown; everything is in shared memory
