"""What an engine is asked to do, and what comes of it."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.federated import egress

Integers = NDArray[np.int64]
_log = logging.getLogger(__name__)  # a simulated device's own log


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
        norm: Euclidean norm of the update.
        error: Why it failed; None if it did not.
        died: Whether its process died, so that what it was writing can't be trusted.
        message: What the codec made of the update, by name; None if it is sent as it is.
    """

    row: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    progress: tuple[int, int] | None = None
    checksum: int | None = None
    num_samples: int = 0
    norm: float = 0.0
    error: str | None = None
    died: bool = False
    message: Mapping[str, NDArray[Any]] | None = None


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

    def of(self, rows: Integers) -> CohortFit:
        """Return some rows as a cohort of their own."""
        return replace(
            self,
            devices=self.devices[rows],
            begun=self.begun[rows],
            consolidated=self.consolidated[rows],
            read_slots=self.read_slots[rows],
            write_slots=self.write_slots[rows],
        )

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
        norms: Euclidean norm of each update.
        progress: Experiences begun and consolidated now [K, 2].
        checksums: Row -> checksum of the new memory, where one was written.
        errors: Row -> why it failed.
        died: Rows whose process died.
        alarms: Row -> how often the device noticed a change, where it did.
        messages: Row -> what the codec made of the update, where there is one.
    """

    num_examples: Integers
    loss: NDArray[np.float64]
    num_steps: Integers
    num_samples: Integers
    norms: NDArray[np.float64]
    progress: Integers
    checksums: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    died: set[int] = field(default_factory=set)
    alarms: dict[int, int] = field(default_factory=dict)
    messages: dict[int, Mapping[str, NDArray[Any]]] = field(default_factory=dict)

    @classmethod
    def empty(cls, cohort: CohortFit) -> CohortDone:
        """Return one to be filled."""
        size = len(cohort)
        counts = [np.zeros(size, np.int64) for _ in range(3)]
        progress = np.stack([cohort.begun, cohort.consolidated], axis=1)
        losses, norms = np.zeros(size), np.zeros(size)
        return cls(counts[0], losses, counts[1], counts[2], norms, progress)

    def fail(self, row: int, device: int, error: Exception) -> None:
        """Note why a device failed; its own log has it all."""
        _log.warning("device %d: %s: %s", device, type(error).__name__, error)
        self.errors[row] = egress.reason_of(error)

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
        self.norms[row] = done.norm
        if num_alarms := int(done.metrics.get("num-alarms", 0)):
            self.alarms[row] = num_alarms
        if done.message is not None:
            self.messages[row] = done.message
        if done.progress is not None:
            self.progress[row] = done.progress
        if done.checksum is not None:
            self.checksums[row] = done.checksum

    def put(self, rows: Sequence[int], part: CohortDone) -> None:
        """Fill in what came of some rows."""
        for name in ("num_examples", "loss", "num_steps", "num_samples", "norms", "progress"):
            getattr(self, name)[rows] = getattr(part, name)
        self.checksums.update({rows[i]: checksum for i, checksum in part.checksums.items()})
        self.errors.update({rows[i]: reason for i, reason in part.errors.items()})
        self.died.update(rows[i] for i in part.died)
        self.alarms.update({rows[i]: number for i, number in part.alarms.items()})
        self.messages.update({rows[i]: message for i, message in part.messages.items()})

    def of(self, index: int, row: int) -> Done:
        """Return one device's result, as that of a job with a row of its own."""
        died = index in self.died
        if index in self.errors:
            return Done(row, error=self.errors[index], died=died)
        metrics = {
            "num-examples": int(self.num_examples[index]),
            "loss": float(self.loss[index]),
            "num-steps": int(self.num_steps[index]),
        }
        begun, consolidated = self.progress[index].tolist()
        checksum = self.checksums.get(index)
        passed, norm = int(self.num_samples[index]), float(self.norms[index])
        progress, message = (begun, consolidated), self.messages.get(index)
        return Done(row, metrics, progress, checksum, passed, norm, message=message)


def failure(job: Job, error: Exception) -> Done:
    """Return what the server learns of a device's failure; the device's own log has it all."""
    _log.warning("device %d: %s: %s", job.device, type(error).__name__, error)
    return Done(job.row, error=egress.reason_of(error))


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
            params: Global parameters [P], or the part of them that the jobs' devices hold.
            updates: Where the updates go [K, P], float32: row k is that of the job with row k; with
                a codec, what the server decodes.

        Returns:
            One result per job, in the order of the jobs. A job that fails is a result with an
            error, never a missing one.
        """

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort; as `run` with fit jobs, and with the same bits.

        Args:
            cohort: K devices.
            params: Global parameters [P].
            updates: Where the updates go [K, P], float32; zeros for devices that failed.
        """

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows.

        Rows of weight 0 do not count, whatever they hold; they may be overwritten.
        """

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return memory for updates [rows, size] that `fit` fills without copying."""

    def close(self) -> None:
        """Release processes and memory."""


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
    updates[list(done.errors)] = 0
    return done


def weighted_sum(updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
    """Return sum_k weights_k updates_k [P]; see `Engine.mean`."""
    if (left_out := np.flatnonzero(weights == 0)).size:
        updates[torch.from_numpy(left_out)] = 0  # 0 times NaN is NaN
    return torch.mv(updates.t(), torch.from_numpy(weights).to(updates.dtype))
