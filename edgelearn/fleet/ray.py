"""Ray tier: sub-cohorts as tasks of Ray actors, so that a Ray cluster scales the other tiers.

Each actor runs another tier on the devices that it is handed. Parameters go out once per round
through Ray's object store; a device's memory goes out and comes back with its work, so that actors
on other machines need nothing of this one's disk. Devices do not influence each other, so results
have the bits of the inner tier on one machine.

`RAY_ADDRESS` names the cluster; without it a local one is started and stopped.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.device.fleet_store import UNWRITTEN, RecordFile, RecordLayout
from edgelearn.device.learners import FleetLearners
from edgelearn.fleet.evaluation import pieces
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Engine, Job, Phase
from edgelearn.scenario.world import World

MISSING = "ray is not installed: pip install 'edgelearn[ray]'"
_PARTS_PER_WORKER = 2  # so that a worker that was dealt small devices gets more

OpenInner = Callable[[World, Path], Engine]
Mean = Callable[[Tensor, NDArray[np.float64]], Tensor]
Records = dict[int, bytes]  # row -> a device's memory, as it lies in a record


def is_installed() -> bool:
    """Whether Ray is there."""
    return importlib.util.find_spec("ray") is not None


@final
class RayEngine:
    """Actors of a Ray cluster, one processor each."""

    def __init__(
        self,
        world: World,
        store_path: Path,
        open_inner: OpenInner,
        mean: Mean,
        *,
        num_workers: int,
    ) -> None:
        """Start the actors.

        Args:
            world: The scenario's world; sent to each machine once.
            store_path: The fleet's state.
            open_inner: Opens the engine that an actor runs.
            mean: How that engine adds up updates, so that the bits are its own.
            num_workers: Actors.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray, self._world, self._mean = ray, world, mean
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            where: dict[str, Any] = {"num_cpus": num_workers, "include_dashboard": False}
            if os.environ.get("RAY_ADDRESS"):
                where = {}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        layout = _record(world)
        self._remembers = bool(layout.declaration)
        self._file = RecordFile(store_path, layout, world.scenario.fleet.num_devices)
        remote = ray.remote(num_cpus=1)(_Site)
        shared = ray.put(world)
        self._start: Callable[[], Any] = partial(remote.remote, shared, open_inner)
        self._sites: list[Any] = [self._start() for _ in range(num_workers)]

    @property
    def name(self) -> str:
        """The tier's name."""
        return "ray"

    @property
    def num_workers(self) -> int:
        """Actors that work."""
        return len(self._sites)

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs, part by part."""
        shared = self._ray.put(params.numpy())
        done: dict[int, Done] = {}

        def ask(site: Any, cut: Sequence[list[Job]]) -> Any:
            part = [job for piece in cut for job in piece]
            records = self._records((job.row, job.device, job.read_slot) for job in part)
            return site.run.remote(part, shared, updates.shape[1], records)

        def take(cut: Sequence[list[Job]], answer: Any) -> None:
            results, rows, sent, records = answer
            if len(rows):
                updates[torch.from_numpy(rows)] = torch.from_numpy(sent.copy())
            slots = {job.row: (job.device, job.write_slot) for piece in cut for job in piece}
            for result in results:
                found = result
                if result.row in records:
                    checksum = self._file.put(*slots[result.row], records[result.row])
                    found = replace(result, checksum=checksum)
                done[result.row] = found

        def lose(cut: Sequence[list[Job]], reason: str) -> None:
            done.update({job.row: Done(job.row, error=reason) for piece in cut for job in piece})

        self._share_out(pieces(self._world, jobs), ask, take, lose)
        return [done[job.row] for job in jobs]

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort, sub-cohort by sub-cohort."""
        shared = self._ray.put(params.numpy())
        done = CohortDone.empty(cohort)

        def ask(site: Any, rows: Sequence[int]) -> Any:
            part = cohort.of(np.array(rows))
            slots = zip(rows, part.devices.tolist(), part.read_slots.tolist(), strict=True)
            records = self._records((index, d, s) for index, (_, d, s) in enumerate(slots))
            return site.fit.remote(part, shared, records)

        def take(rows: Sequence[int], answer: Any) -> None:
            found, sent, records = answer
            updates[torch.tensor(rows)] = torch.from_numpy(sent.copy())
            for index, record in records.items():
                device, slot = cohort.devices[rows[index]], cohort.write_slots[rows[index]]
                found.checksums[index] = self._file.put(int(device), int(slot), record)
            done.put(rows, found)

        def lose(rows: Sequence[int], reason: str) -> None:
            done.errors.update(dict.fromkeys(rows, reason))
            updates[torch.tensor(rows)] = 0

        self._share_out(list(range(len(cohort))), ask, take, lose)
        return done

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return self._mean(updates, weights)

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return memory for updates [rows, size]."""
        return torch.zeros(rows, size)

    def close(self) -> None:
        """End the actors, and the cluster if it is this engine's own."""
        for site in self._sites:
            self._ray.kill(site)
        self._sites = []
        if self._owns_cluster:
            self._ray.shutdown()

    def _share_out(
        self,
        items: list[Any],
        ask: Callable[[Any, Sequence[Any]], Any],
        take: Callable[[Sequence[Any], Any], None],
        lose: Callable[[Sequence[Any], str], None],
    ) -> None:
        """Deal parts to whichever actor is free; a part whose actor dies is lost."""
        size = max(1, -(-len(items) // (len(self._sites) * _PARTS_PER_WORKER)))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        running: dict[Any, tuple[Any, list[Any]]] = {}
        free = list(self._sites)
        while parts or running:
            while parts and free:
                site, part = free.pop(), parts.pop(0)
                running[ask(site, part)] = (site, part)
            (ready,), _ = self._ray.wait(list(running), num_returns=1)
            site, part = running.pop(ready)
            try:
                answer = self._ray.get(ready)
            except self._ray.exceptions.RayActorError as error:
                lose(part, f"its Ray actor died ({type(error).__name__})")
                site = self._replace(site)
            else:
                take(part, answer)
            free.append(site)

    def _replace(self, dead: Any) -> Any:
        """Start an actor in the place of one that died."""
        new = self._start()
        self._sites[self._sites.index(dead)] = new
        return new

    def _records(self, places: Iterable[tuple[int, int, int]]) -> Records:
        """Return the memories of devices (row, device, slot) that have one."""
        if not self._remembers:
            return {}
        return {
            row: self._file.get(device, slot) for row, device, slot in places if slot != UNWRITTEN
        }


def _record(world: World) -> RecordLayout:
    """Return the layout of a device's record, as it travels."""
    learners = FleetLearners(world)
    return learners.record(world.kinds.kinds[0])


class _Site:
    """An actor: an engine of its own, over a file that holds what the actor was handed."""

    def __init__(self, world: World, open_inner: OpenInner) -> None:
        torch.set_num_threads(1)
        layout = _record(world)
        # The file is mapped, so its name can go at once: a killed actor leaves nothing behind.
        with tempfile.TemporaryDirectory(prefix="edgelearn-ray-") as folder:
            path = Path(folder) / "devices.bin"
            RecordFile.create(path, layout, world.scenario.fleet.num_devices)
            self._file = RecordFile(path, layout, world.scenario.fleet.num_devices)
            self._engine = open_inner(world, path)

    def run(
        self, jobs: list[Job], params: NDArray[np.float32], size: int, records: Records
    ) -> tuple[list[Done], NDArray[np.int64], NDArray[np.float32], Records]:
        """Do jobs; return results, rows with updates, updates, and new memories."""
        own = [replace(job, row=index) for index, job in enumerate(jobs)]
        for job in jobs:
            if job.row in records:
                self._file.put(job.device, job.read_slot, records[job.row])
        updates = torch.zeros(len(jobs), size)
        results = self._engine.run(own, torch.from_numpy(params.copy()), updates)
        pairs = list(zip(jobs, results, strict=True))
        new = {
            job.row: self._file.get(job.device, job.write_slot)
            for job, result in pairs
            if result.checksum is not None
        }
        fits = [index for index, job in enumerate(jobs) if job.phase is Phase.FIT]
        rows = np.array([jobs[index].row for index in fits], np.int64)
        back = [replace(result, row=job.row) for job, result in pairs]
        return back, rows, updates[fits].numpy(), new

    def fit(
        self, cohort: CohortFit, params: NDArray[np.float32], records: Records
    ) -> tuple[CohortDone, NDArray[np.float32], Records]:
        """Train a sub-cohort; return what came of it, updates, and new memories by index."""
        for index, record in records.items():
            device, slot = cohort.devices[index], cohort.read_slots[index]
            self._file.put(int(device), int(slot), record)
        updates = torch.zeros(len(cohort), len(params))
        done = self._engine.fit(cohort, torch.from_numpy(params.copy()), updates)
        new = {
            index: self._file.get(int(cohort.devices[index]), int(cohort.write_slots[index]))
            for index in done.checksums
        }
        return done, updates.numpy(), new
