"""What an engine is asked to do, and what comes of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


class Phase(enum.StrEnum):
    """What a device is asked to do."""

    FIT = "fit"
    CONSOLIDATE = "consolidate"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Job:
    """One device's work in a phase.

    Attributes:
        row: Place in the cohort; results are reduced in this order.
        device: Which device.
        phase: What to do.
        server_round: Round, from 1 (0 before the first).
        position: Position in the stream.
        begun: Experiences that the device has begun.
        consolidated: Experiences that it has consolidated.
        read_slot: Where its memory lies.
        write_slot: Where its new memory goes.
        cost: Expected work, in samples; the longest starts first.
        serial: Changes with the global parameters.
        proximal_mu: FedProx's mu.
    """

    row: int
    device: int
    phase: Phase
    server_round: int
    position: int
    begun: int
    consolidated: int
    read_slot: int
    write_slot: int
    cost: int
    serial: int
    proximal_mu: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a job.

    Attributes:
        row: The job's.
        metrics: Admitted by the egress guard.
        progress: Experiences begun and consolidated now; None if that did not change.
        checksum: Of the device's new memory; None if it was not written.
        num_samples: Samples that passed through training.
        error: Why it failed; None if it did not.
        died: Whether its process died, so that what it was writing can't be trusted.
    """

    row: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    progress: tuple[int, int] | None = None
    checksum: int | None = None
    num_samples: int = 0
    error: str | None = None
    died: bool = False


@dataclass(frozen=True, slots=True)
class CohortFit:
    """Local training of a cohort, all from the same parameters: many fit jobs as arrays [K].

    Attributes:
        devices: Which devices; int64.
        server_round: Round, from 1.
        position: Position in the stream.
        begun: Experiences that each has begun.
        consolidated: Experiences that each has consolidated.
        read_slots: Where their memories lie.
        write_slots: Where new memories go.
        serial: Changes with the global parameters.
        proximal_mu: FedProx's mu.
    """

    devices: Integers
    server_round: int
    position: int
    begun: Integers
    consolidated: Integers
    read_slots: Integers
    write_slots: Integers
    serial: int
    proximal_mu: float = 0.0

    def __len__(self) -> int:
        return len(self.devices)

    def jobs(self, rows: Iterable[int], costs: Integers) -> list[Job]:
        """Return the jobs of some rows, one for each device; `costs` [K] is in samples."""
        return [
            Job(
                row,
                int(self.devices[row]),
                Phase.FIT,
                self.server_round,
                self.position,
                int(self.begun[row]),
                int(self.consolidated[row]),
                int(self.read_slots[row]),
                int(self.write_slots[row]),
                int(costs[row]),
                self.serial,
                self.proximal_mu,
            )
            for row in rows
        ]


@dataclass(frozen=True, slots=True)
class CohortDone:
    """What came of a cohort's training, as arrays [K]; rows with an error hold zeros.

    Attributes:
        num_examples: Samples of each device.
        loss: Mean loss over its steps.
        num_steps: Its steps.
        num_samples: Samples that passed through training.
        progress: Experiences begun and consolidated now [K, 2].
        checksums: Row -> checksum of the new memory, where one was written.
        errors: Row -> why it failed.
        died: Rows whose process died.
    """

    num_examples: Integers
    loss: NDArray[np.float64]
    num_steps: Integers
    num_samples: Integers
    progress: Integers
    checksums: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    died: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, cohort: CohortFit) -> CohortDone:
        """Return one to be filled."""
        size = len(cohort)
        counts = [np.zeros(size, np.int64) for _ in range(3)]
        progress = np.stack([cohort.begun, cohort.consolidated], axis=1)
        return cls(counts[0], np.zeros(size), counts[1], counts[2], progress)

    def take(self, done: Done) -> None:
        """Fill in the row of one job."""
        row = done.row
        if done.died:
            self.died.add(row)
        if done.error is not None:
            self.errors[row] = done.error
            return
        self.num_examples[row] = done.metrics["num-examples"]
        self.loss[row] = done.metrics["loss"]
        self.num_steps[row] = done.metrics["num-steps"]
        self.num_samples[row] = done.num_samples
        if done.progress is not None:
            self.progress[row] = done.progress
        if done.checksum is not None:
            self.checksums[row] = done.checksum

    def row(self, row: int) -> Done:
        """Return what came of one device, as of its job."""
        if row in self.errors:
            return Done(row, error=self.errors[row], died=row in self.died)
        begun, consolidated = self.progress[row].tolist()
        return Done(
            row,
            {
                "num-examples": int(self.num_examples[row]),
                "loss": float(self.loss[row]),
                "num-steps": int(self.num_steps[row]),
            },
            (begun, consolidated),
            self.checksums.get(row),
            int(self.num_samples[row]),
        )


class Engine(Protocol):
    """What executes a cohort's work."""

    @property
    def name(self) -> str:
        """The tier's name."""

    @property
    def num_workers(self) -> int:
        """Processes that work."""

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs.

        Args:
            jobs: One per device, rows 0..K-1.
            params: Global parameters [P].
            updates: Where the updates go [K, P], float32: row k is that of the job with row k.

        Returns:
            One result per job, in the order of the jobs. A job that fails is a result with an
            error, never a missing one.
        """

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort; as `run` with fit jobs, and with the same bits.

        Args:
            cohort: K devices.
            params: Global parameters [P].
            updates: Where the updates go [K, P], float32.
        """

    def close(self) -> None:
        """Release processes and memory."""


def cohort_of(jobs: Sequence[Job]) -> CohortFit | None:
    """Return fit jobs as arrays; None if they are no cohort: other phases, rows or positions."""
    first = jobs[0] if jobs else None
    if first is None or first.phase is not Phase.FIT:
        return None
    shared = {(j.phase, j.server_round, j.position, j.serial, j.proximal_mu) for j in jobs}
    if len(shared) > 1 or [job.row for job in jobs] != list(range(len(jobs))):
        return None
    columns = np.array(
        [(j.device, j.begun, j.consolidated, j.read_slot, j.write_slot) for j in jobs], np.int64
    ).T
    return CohortFit(
        devices=columns[0],
        server_round=first.server_round,
        position=first.position,
        begun=columns[1],
        consolidated=columns[2],
        read_slots=columns[3],
        write_slots=columns[4],
        serial=first.serial,
        proximal_mu=first.proximal_mu,
    )


def fit_by_jobs(
    run: Callable[[Sequence[Job], Tensor, Tensor], list[Done]],
    cohort: CohortFit,
    costs: Integers,
    params: Tensor,
    updates: Tensor,
) -> CohortDone:
    """Train a cohort by one job for each device; for engines that have nothing better."""
    done = CohortDone.empty(cohort)
    for result in run(cohort.jobs(range(len(cohort)), costs), params, updates):
        done.take(result)
    return done
