"""What the round loop asks of a fleet in a round, and the two ways of asking.

`ByMessage` (faithful) sends a Flower message to each device and hands each reply to the strategy:
any strategy, any grid. `ByCohort` (fused) lets a simulated fleet train as one, and hands the
strategy one reply with the weighted mean: the same result where a strategy does nothing with the
replies but average them, without a message for each device.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import edgelearn.federated._flwr_compat as compat
from edgelearn.compress.codec import Codec, decoded
from edgelearn.compress.submodel import Holdings
from edgelearn.errors import EdgelearnError, RunError
from edgelearn.federated import messages as wire
from edgelearn.federated.record import Line
from edgelearn.federated.server import python_seeded, seeded
from edgelearn.params import Layout
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.stream import Stream
from edgelearn.seeds import derive

from flwr.app import ArrayRecord, ConfigRecord  # isort: skip
from flwr.serverapp.strategy import Strategy  # isort: skip

Counts = NDArray[np.int64]


class Outcome(enum.StrEnum):
    """What became of a device that was asked."""

    OK = "ok"
    IDLE = "idle"  # it has no samples now: its reply is not aggregated
    LATE = "late"  # no reply before the deadline
    FAILED = "failed"  # it raised, or its process died
    REJECTED = "rejected"  # the server refused its update
    OFFLINE = "offline"

    @classmethod
    def of_error(cls, code: int) -> Outcome:
        """Return the outcome for the code of an error in a reply."""
        return _OUTCOMES.get(code, cls.FAILED)


_OUTCOMES: dict[int, Outcome] = {
    compat.ErrorCode.EXPIRED: Outcome.LATE,
    compat.ErrorCode.REPLY_EXPIRED: Outcome.LATE,
    compat.ErrorCode.NODE_UNAVAILABLE: Outcome.OFFLINE,
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A round of training.

    Attributes:
        params: New global parameters [P].
        outcomes: What became of each device of the cohort, in its order.
        problems: Lines of the record: device, outcome, reason.
        loss: Mean of the devices' losses, weighted by their samples; None without any.
        alarms: How often devices noticed a change; None if they are told.
    """

    params: Tensor
    outcomes: Mapping[int, Outcome]
    problems: list[Line]
    loss: float | None
    alarms: Mapping[int, int] | None = None

    @property
    def line(self) -> Line:
        """What the record says of it."""
        counts = Counter(self.outcomes.values())
        noticed = (
            {} if self.alarms is None else {"alarms": [[d, n] for d, n in self.alarms.items()]}
        )
        return {
            "cohort": list(self.outcomes),
            "outcomes": {outcome.value: counts.get(outcome, 0) for outcome in Outcome},
            "problems": list(self.problems),
            "loss": self.loss,
            **noticed,
        }


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Correct answers by device and experience.

    Attributes:
        devices: Those that answered, ascending.
        counts: "count", "served", "float" -> [n, T].
        problems: Lines of the record.
    """

    devices: Sequence[int]
    counts: Mapping[str, Counts]
    problems: list[Line]

    @property
    def pooled(self) -> dict[str, list[int]] | None:
        """Sums over devices; None if nobody answered."""
        if not len(self.devices):
            return None
        return {name: table.sum(0).tolist() for name, table in self.counts.items()}

    def line(self, server_round: int, position: int) -> Line:
        """What the record says of each device."""
        tables = {name: table.tolist() for name, table in self.counts.items()}
        head = {"kind": "devices", "round": server_round, "position": position}
        return {**head, "devices": [int(d) for d in self.devices], **tables}


class Exchange(Protocol):
    """A way of asking a fleet."""

    @property
    def strategy(self) -> Strategy:
        """Flower's strategy."""

    @property
    def traffic(self) -> Traffic:
        """What has moved so far."""

    def fit(self, server_round: int, position: int, params: Tensor) -> Fitted:
        """Let a cohort train, and aggregate."""

    def consolidate(self, server_round: int, position: int, params: Tensor) -> list[Line]:
        """Let every device that can be reached consolidate; return problems."""

    def evaluate(self, server_round: int, position: int, params: Tensor) -> Evaluated:
        """Let devices evaluate what they serve."""


@dataclass(slots=True)
class Traffic:
    """Bytes that have moved, by device."""

    num_devices: int
    up: Counts = field(init=False)
    down: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.up = np.zeros(self.num_devices, np.int64)
        self.down = np.zeros(self.num_devices, np.int64)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""
        return {
            "bytes_up": torch.from_numpy(self.up.copy()),
            "bytes_down": torch.from_numpy(self.down.copy()),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `tensors` returned."""
        self.up[:] = tensors["bytes_up"].numpy()
        self.down[:] = tensors["bytes_down"].numpy()


@dataclass(frozen=True, slots=True)
class Run:
    """What both ways of asking need.

    Attributes:
        scenario: What is run.
        stream: Its stream.
        layout: Layout of the parameters.
        strategy: Flower's strategy, freshly built.
        codec: How updates come; None if as they are.
        holdings: Which part of the parameters each device holds.
    """

    scenario: Scenario
    stream: Stream
    layout: Layout
    strategy: Strategy
    codec: Codec | None = None
    holdings: Holdings = field(default_factory=Holdings)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self.scenario.digest)

    @property
    def detects(self) -> bool:
        """Whether devices look for boundaries of experiences themselves."""
        return self.scenario.stream.boundaries == "detected"

    def instruction(self, server_round: int, position: int) -> ConfigRecord:
        """Return the config of an instruction."""
        return wire.instruction(digest=self.digest, server_round=server_round, position=position)

    def layout_of(self, device: int) -> Layout:
        """Return the layout of what a device holds of the parameters."""
        part = self.holdings.of_device(device)
        return self.layout if part is None else part.layout

    def held_by(self, device: int, params: Tensor) -> Tensor:
        """Return what a device holds [p] of parameters [P]."""
        part = self.holdings.of_device(device)
        return params if part is None else part.take(params)

    def update_in(self, record: ArrayRecord, device: int) -> Tensor:
        """Return the update [p] that a device's reply holds.

        Raises:
            StateError: If it holds none.
        """
        layout = self.layout_of(device)
        if self.codec is None:
            return wire.decode_params(layout, record)
        message = wire.decode_message(record, self.codec.pieces(layout))
        return decoded(self.codec, layout, message)

    @property
    def has_bounds(self) -> bool:
        """Whether the bytes of an update depend on its values."""
        pieces = {} if self.codec is None else self.codec.pieces(self.layout)
        return any(piece.is_bound for piece in pieces.values())

    def empty_update(self) -> ArrayRecord:
        """Return a reply's arrays, as many bytes as any device sends, or the most that one can."""
        if self.codec is None:
            return wire.encode_params(self.layout, torch.zeros(self.layout.size))
        return wire.empty_message(self.codec.pieces(self.layout))

    @contextmanager
    def hook(self, name: str, server_round: int, *, samples_only: bool = False) -> Iterator[None]:
        """Seed what a hook of the strategy may draw from, and name the hook if it raises.

        Args:
            name: Of the hook.
            server_round: The round.
            samples_only: Whether it is known to draw from Python's generator alone.
        """
        seed = derive(self.scenario.seed, f"server-{name}", server_round)
        try:
            with python_seeded(seed) if samples_only else seeded(seed):
                yield
        except EdgelearnError:
            raise
        except Exception as error:
            what = f"round {server_round}: {type(self.strategy).__name__}.{name}"
            raise RunError(f"{what} raised {type(error).__name__}: {error}") from error

    def accept(self, new: Tensor, server_round: int) -> Tensor:
        """Return the parameters that a strategy has made.

        Raises:
            RunError: If they are not finite.
        """
        if not bool(torch.isfinite(new).all()):
            name = type(self.strategy).__name__
            message = f"round {server_round}: {name} returned parameters that are not finite"
            raise RunError(message)
        return new

    def norm_limit(self, params: Tensor) -> float:
        """Return the largest norm of an update that is admitted.

        Where no network travels, what does begins as zeros: then each number counts as 1 at least.
        """
        least = 1.0 if self.layout.num_network else math.sqrt(self.layout.size)
        return self.scenario.server.max_update_norm * max(float(params.norm()), least)


def too_large(norm: float, limit: float) -> str:
    """Return why an update is rejected."""
    return f"the update's norm {norm:.3g} exceeds {limit:.3g}"


NOT_FINITE = "the update is not finite"


def problem(device: int, outcome: Outcome, reason: str) -> Line:
    """Return a problem's line in the record."""
    return {"device": device, "outcome": outcome.value, "reason": reason}


def refuse_failure(
    outcomes: Mapping[int, Outcome], problems: Sequence[Line], server_round: int
) -> None:
    """Stop a run in which a whole cohort fails.

    Raises:
        RunError: Naming the first cause.
    """
    if outcomes and all(outcome is Outcome.FAILED for outcome in outcomes.values()):
        first = problems[0]
        raise RunError(
            f"round {server_round}: every device of the cohort failed; device "
            f"{first['device']} first: {first['reason']}"
        )


def refuse_blindness(problems: Sequence[Line], num_answers: int, server_round: int) -> None:
    """Stop a run in which no device can be evaluated.

    Raises:
        RunError: Naming the first cause.
    """
    if problems and not num_answers:
        raise RunError(
            f"round {server_round}: no device could be evaluated; device "
            f"{problems[0]['device']} first: {problems[0]['reason']}"
        )


def table(answers: Sequence[tuple[int, Mapping[str, Any]]], problems: list[Line]) -> Evaluated:
    """Return the answers of devices (device, metrics), by device."""
    ordered = sorted(answers, key=lambda answer: answer[0])
    counts = {
        name: np.array([metrics[name] for _, metrics in ordered], np.int64)
        for name in ("count", "served", "float")
    }
    return Evaluated([device for device, _ in ordered], counts, problems)
