"""What an engine is asked to do, and what comes of it."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from edgelearn.federated import egress

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
        read_slot: Where the device's state lies.
        write_slot: Where its new state goes.
        cost: Expected work, in samples; the longest starts first.
        serial: Changes with the global parameters.
        proximal_mu: FedProx's mu.
    """

    row: int
    device: int
    phase: Phase
    server_round: int
    position: int
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
        checksum: Of the device's new state; None if it has none.
        num_samples: Samples that passed through training.
        error: Why it failed; None if it did not.
        died: Whether its process died, so that what it was writing can't be trusted.
    """

    row: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    checksum: int | None = None
    num_samples: int = 0
    error: str | None = None
    died: bool = False


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
            params: Global parameters [P].
            updates: Where the updates go [K, P], float32: row k is that of the job with row k.

        Returns:
            One result per job, in the order of the jobs. A job that fails is a result with an
            error, never a missing one.
        """

    def close(self) -> None:
        """Release processes and memory."""
