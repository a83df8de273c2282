"""The round loop: drives any Flower strategy over any Grid, with checkpoints and typed outcomes.

`Strategy.start` always begins at round 1 and keeps nothing; this loop calls the strategy's four
hooks itself, so that a run can be resumed, has phases (fit, consolidate, evaluate), and knows what
became of every device that was asked.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from edgelearn.errors import EdgelearnError, RunError
from edgelearn.federated import _flwr_compat as compat
from edgelearn.federated import egress
from edgelearn.federated import messages as wire
from edgelearn.federated.checkpoint import Checkpoint, as_tensors, with_prefix
from edgelearn.federated.journal import Journal
from edgelearn.federated.record import Line
from edgelearn.federated.server import restore, seeded, snapshot
from edgelearn.params import Layout
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.stream import Stream
from edgelearn.seeds import derive

from flwr.app import ArrayRecord, Error, Message, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp.strategy import Strategy  # isort: skip


class Outcome(enum.StrEnum):
    """What became of a device that was asked."""

    OK = "ok"
    IDLE = "idle"  # it has no samples now: its reply is not aggregated
    LATE = "late"  # no reply before the deadline
    FAILED = "failed"  # it raised, or its process died
    REJECTED = "rejected"  # the server refused its update
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a display shows after a round.

    Attributes:
        server_round: The round, from 1.
        num_rounds: Rounds of the run.
        position: Position in the stream.
        accuracy: Served model, over the experiences seen so far; NaN if not measured.
        forgetting: Mean drop of earlier experiences from their best at the end of an experience;
            NaN if there are none.
        num_bytes: Bytes moved so far, both ways.
        outcomes: What became of the cohort.
    """

    server_round: int
    num_rounds: int
    position: int
    accuracy: float
    forgetting: float
    num_bytes: int
    outcomes: Mapping[str, int]


class FleetSide(Protocol):
    """What the loop has to know of the fleet beyond Flower's Grid."""

    @property
    def clock_s(self) -> float:
        """Time now: virtual in simulation, wall time in deployment."""

    def roster(self) -> Mapping[int, int]:
        """Return node id -> device, for the nodes that can be reached now."""

    def begin_round(self, server_round: int, *, min_devices: int) -> None:
        """Make ready for a round: wait until enough devices can be reached."""

    def collect(self, grid: Grid, message_ids: Sequence[str]) -> Iterable[Message]:
        """Wait for the replies to these messages, and return those that came in time."""

    def commit(self) -> Mapping[str, Tensor]:
        """Make the devices' new states durable; return what a checkpoint has to hold of it."""

    def restore(self, tensors: Mapping[str, Tensor], clock_s: float) -> None:
        """Go back to what `commit` returned."""


@dataclass(slots=True)
class RoundLoop:
    """One run of a scenario.

    Attributes:
        scenario: What is run.
        stream: Its stream.
        layout: Layout of the parameters.
        strategy: Flower's strategy, freshly built.
        grid: How messages travel.
        fleet: What else there is to know of the fleet.
        journal: Where the record and checkpoints go.
        on_round: Called after every round.
        checkpoint_every_s: Least wall time between checkpoints; 0 makes one after every round.
    """

    scenario: Scenario
    stream: Stream
    layout: Layout
    strategy: Strategy
    grid: Grid
    fleet: FleetSide
    journal: Journal
    on_round: Callable[[Progress], None] | None = None
    checkpoint_every_s: float = 1.0
    _down: Counter[int] = field(default_factory=Counter)
    _up: Counter[int] = field(default_factory=Counter)
    _best: dict[int, float] = field(default_factory=dict)

    def run(self, params: Tensor, resumed: Checkpoint | None = None) -> Tensor:
        """Run all rounds that are left.

        Args:
            params: Initial global parameters [P].
            resumed: Where to go on.

        Returns:
            The final global parameters [P].

        Raises:
            RunError: If the run can't go on; the first cause is in the message.
        """
        done, last_saved = 0, time.monotonic()
        if resumed is not None:
            done, params = resumed.server_round, self._restore(resumed)
        else:
            self.fleet.begin_round(0, min_devices=1)
            replies, problems = self._ask_evaluation(0, 0, params)
            accuracy = _pooled(replies, self.stream.num_experiences)
            self.journal.append({"kind": "start", "accuracy": accuracy, "problems": problems})
        for server_round in range(done + 1, self.scenario.num_rounds + 1):
            params = self._round(server_round, params)
            due = time.monotonic() - last_saved >= self.checkpoint_every_s
            if due or server_round == self.scenario.num_rounds:
                self._save(server_round, params)
                last_saved = time.monotonic()
        return params

    def totals(self) -> tuple[list[int], list[int]]:
        """Return bytes up and down by device."""
        devices = range(self.scenario.fleet.num_devices)
        return [self._up.get(d, 0) for d in devices], [self._down.get(d, 0) for d in devices]

    # -- one round ---------------------------------------------------------------------------------

    def _round(self, server_round: int, params: Tensor) -> Tensor:
        started = time.perf_counter()
        before = sum(self._up.values()), sum(self._down.values())
        position = self.stream.position(server_round)
        self.fleet.begin_round(server_round, min_devices=self.scenario.fleet.cohort)
        params, line = self._fit(server_round, position, params)
        if self.stream.ends_experience(server_round):
            line["problems"] += self._consolidate(server_round, position, params)
        ends = self.stream.ends_experience(server_round)
        accuracy: dict[str, list[int]] | None = None
        devices: Line | None = None
        if ends or server_round % self.scenario.evaluate.every_rounds == 0:
            replies, troubles = self._ask_evaluation(server_round, position, params)
            line["problems"] += troubles
            accuracy = _pooled(replies, self.stream.num_experiences)
            devices = _device_line(replies, server_round, position) if ends else None
        line |= {
            "accuracy": accuracy,
            "bytes_up": sum(self._up.values()) - before[0],
            "bytes_down": sum(self._down.values()) - before[1],
            "clock_s": self.fleet.clock_s,
            "wall_s": time.perf_counter() - started,
        }
        self.journal.append(line)
        if devices is not None:
            self.journal.append(devices)
        self._report(line)
        return params

    def _fit(
        self, server_round: int, position: int, params: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        roster = self.fleet.roster()
        config = wire.instruction(
            digest=self.scenario.digest, server_round=server_round, position=position
        )
        with self._hook("configure_train", server_round):
            instructions = list(
                self.strategy.configure_train(
                    server_round, wire.encode_params(self.layout, params), config, self.grid
                )
            )
        answers = self._exchange(instructions, roster)
        outcomes: dict[int, Outcome] = {}
        problems: list[Line] = []
        admitted: list[Message] = []
        losses: list[tuple[float, int]] = []
        for device, reply in answers:
            outcome, reason, ready = self._admit(reply, params)
            outcomes[device] = outcome
            if outcome in (Outcome.OK, Outcome.IDLE):
                metrics = wire.metrics_of(ready)
                losses.append((float(metrics["loss"]), int(metrics["num-examples"])))
            else:
                problems.append({"device": device, "outcome": outcome.value, "reason": reason})
            if outcome is not Outcome.IDLE:
                admitted.append(ready)
        if any(outcome is Outcome.OK for outcome in outcomes.values()):
            with self._hook("aggregate_train", server_round):
                arrays, _ = self.strategy.aggregate_train(server_round, admitted)
            params = self._accept(arrays, params, server_round)
        elif outcomes and all(o is Outcome.FAILED for o in outcomes.values()):
            first = problems[0]
            raise RunError(
                f"round {server_round}: every device of the cohort failed; device "
                f"{first['device']} first: {first['reason']}"
            )
        counts = Counter(outcome.value for outcome in outcomes.values())
        total = sum(count for _, count in losses)
        return params, {
            "kind": "round",
            "round": server_round,
            "position": position,
            "cohort": list(outcomes),
            "outcomes": {outcome.value: counts.get(outcome.value, 0) for outcome in Outcome},
            "problems": problems,
            "loss": sum(v * n for v, n in losses) / total if total else None,
        }

    def _admit(self, reply: Message, params: Tensor) -> tuple[Outcome, str, Message]:
        """Classify a reply; return it with local parameters in place of the update."""
        if reply.has_error():
            return _OUTCOMES.get(reply.error.code, Outcome.FAILED), reply.error.reason or "", reply
        try:
            _METRICS_OF_FIT.admit({}, wire.metrics_of(reply))
            delta = wire.decode_params(self.layout, wire.arrays_of(reply))
        except EdgelearnError as error:
            return self._reject(reply, str(error))
        if not bool(torch.isfinite(delta).all()):
            return self._reject(reply, "the update is not finite")
        norm, bound = float(delta.norm()), self.scenario.server.max_update_norm
        limit = bound * max(float(params.norm()), 1.0)
        if norm > limit:
            return self._reject(reply, f"the update's norm {norm:.3g} exceeds {limit:.3g}")
        if int(wire.metrics_of(reply).get("num-examples", 0)) == 0:
            return Outcome.IDLE, "", reply
        content = RecordDict(dict(reply.content))
        content[next(iter(reply.content.array_records))] = wire.as_local(self.layout, params, delta)
        reply.content = content
        return Outcome.OK, "", reply

    def _reject(self, reply: Message, reason: str) -> tuple[Outcome, str, Message]:
        refused = Message(Error(compat.ErrorCode.RAISED, reason), reply_to=reply)
        return Outcome.REJECTED, reason, refused

    def _accept(self, arrays: ArrayRecord | None, params: Tensor, server_round: int) -> Tensor:
        if arrays is None:
            return params
        new = wire.decode_params(self.layout, arrays)
        if not bool(torch.isfinite(new).all()):
            raise RunError(
                f"round {server_round}: {type(self.strategy).__name__} returned parameters that "
                "are not finite"
            )
        return new

    # -- the other phases --------------------------------------------------------------------------

    def _consolidate(self, server_round: int, position: int, params: Tensor) -> list[Line]:
        """Let every device that can be reached consolidate, on the final global parameters."""
        roster = self.fleet.roster()
        config = wire.instruction(
            digest=self.scenario.digest, server_round=server_round, position=position
        )
        arrays = wire.encode_params(self.layout, params)
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: config})
        instructions = [Message(content, node, wire.CONSOLIDATE) for node in roster]
        answers = self._exchange(instructions, roster)
        return [_problem(d, r, "consolidation") for d, r in answers if r.has_error()]

    def _ask_evaluation(
        self, server_round: int, position: int, params: Tensor
    ) -> tuple[list[tuple[int, dict[str, Any]]], list[Line]]:
        """Return the counts of each device that answered, by device, and what went wrong."""
        roster = self.fleet.roster()
        config = wire.instruction(
            digest=self.scenario.digest, server_round=server_round, position=position
        )
        with self._hook("configure_evaluate", server_round):
            instructions = list(
                self.strategy.configure_evaluate(
                    server_round, wire.encode_params(self.layout, params), config, self.grid
                )
            )
        schema = egress.evaluate_schema(self.stream.num_experiences)
        answers = [
            (device, _checked(reply, schema))
            for device, reply in self._exchange(instructions, roster)
        ]
        with_samples = _with_samples([reply for _, reply in answers])
        if with_samples:
            with self._hook("aggregate_evaluate", server_round):
                self.strategy.aggregate_evaluate(server_round, with_samples)
        problems = [_problem(d, r, "evaluation") for d, r in answers if r.has_error()]
        found = [(d, wire.metrics_of(reply)) for d, reply in answers if not reply.has_error()]
        if problems and not found:
            raise RunError(
                f"round {server_round}: no device could be evaluated; device "
                f"{problems[0]['device']} first: {problems[0]['reason']}"
            )
        return sorted(found, key=lambda item: item[0]), problems

    # -- messages ----------------------------------------------------------------------------------

    def _exchange(
        self, instructions: Sequence[Message], roster: Mapping[int, int]
    ) -> list[tuple[int, Message]]:
        """Send, wait, and return an answer for each instruction, in their order.

        A reply that did not come becomes an error reply, so nobody is missing.
        """
        if not instructions:
            return []
        deadline = self.scenario.fleet.deadline_s
        if deadline:
            for message in instructions:
                message.metadata.ttl = deadline
        sizes: dict[int, int] = {}
        for message in instructions:
            key = id(message.content)
            sizes.setdefault(key, wire.num_bytes(message.content))
            self._down[roster[message.metadata.dst_node_id]] += sizes[key]
        ids = list(self.grid.push_messages(instructions))
        replies = {
            reply.metadata.reply_to_message_id: reply
            for reply in self.fleet.collect(self.grid, ids)
        }
        answers = []
        for message_id, message in zip(ids, instructions, strict=True):
            device = roster[message.metadata.dst_node_id]
            reply = replies.get(message_id)
            if reply is None:
                late = Error(compat.ErrorCode.REPLY_EXPIRED, "no reply before the deadline")
                reply = Message(late, reply_to=message)
            elif reply.has_content():
                self._up[device] += wire.num_bytes(reply.content)
            answers.append((device, reply))
        return answers

    # -- state -------------------------------------------------------------------------------------

    def _hook(self, name: str, server_round: int) -> Any:
        """Seed what a hook of the strategy may draw from, and name the hook if it raises."""
        return _Hook(self, name, server_round)

    def _save(self, server_round: int, params: Tensor) -> None:
        arrays, values = snapshot(self.strategy)
        up, down = self.totals()
        tensors = {
            "params": params,
            "bytes_up": torch.tensor(up, dtype=torch.int64),
            "bytes_down": torch.tensor(down, dtype=torch.int64),
            **as_tensors("strategy.", arrays),
            **self.fleet.commit(),
        }
        plain = {
            "strategy": values,
            "clock_s": self.fleet.clock_s,
            "best": {str(k): v for k, v in self._best.items()},
        }
        self.journal.checkpoint(Checkpoint(server_round, tensors, plain, 0))

    def _restore(self, checkpoint: Checkpoint) -> Tensor:
        tensors, values = checkpoint.tensors, checkpoint.values
        restore(self.strategy, with_prefix("strategy.", tensors), dict(values["strategy"]))
        self._up.update(dict(enumerate(tensors["bytes_up"].tolist())))
        self._down.update(dict(enumerate(tensors["bytes_down"].tolist())))
        self._best.update({int(k): v for k, v in values["best"].items()})
        self.fleet.restore(tensors, values["clock_s"])
        return tensors["params"].clone()

    def _report(self, line: Mapping[str, Any]) -> None:
        accuracy, drop = float("nan"), float("nan")
        seen = line["accuracy"]
        if seen is not None and self.scenario.stream.order == "shared":
            here = range(line["position"] + 1)
            shares = {j: seen["served"][j] / seen["count"][j] for j in here if seen["count"][j]}
            if shares:
                accuracy = float(np.mean(list(shares.values())))
            past = [self._best[j] - shares[j] for j in shares if j in self._best and j < here[-1]]
            drop = float(np.mean(past)) if past else float("nan")
            if self.stream.ends_experience(line["round"]):  # as the accuracy matrix has it
                for j, share in shares.items():
                    self._best[j] = max(self._best.get(j, 0.0), share)
        elif seen is not None and sum(seen["count"]):
            accuracy = sum(seen["served"]) / sum(seen["count"])
        if self.on_round is not None:
            self.on_round(
                Progress(
                    line["round"],
                    self.scenario.num_rounds,
                    line["position"],
                    accuracy,
                    drop,
                    sum(self._up.values()) + sum(self._down.values()),
                    line["outcomes"],
                )
            )


class _Hook:
    """Context of a strategy's hook: seeded generators, and errors that name the hook."""

    def __init__(self, loop: RoundLoop, name: str, server_round: int) -> None:
        seed = derive(loop.scenario.seed, f"server-{name}", server_round)
        self._seeded = seeded(seed)
        self._what = f"round {server_round}: {type(loop.strategy).__name__}.{name}"

    def __enter__(self) -> None:
        self._seeded.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._seeded.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, EdgelearnError):
            raise RunError(f"{self._what} raised {type(error).__name__}: {error}") from error


_OUTCOMES: dict[int, Outcome] = {
    compat.ErrorCode.EXPIRED: Outcome.LATE,
    compat.ErrorCode.REPLY_EXPIRED: Outcome.LATE,
    compat.ErrorCode.NODE_UNAVAILABLE: Outcome.OFFLINE,
}


# A device's own guard has admitted its reply; the server takes nobody's word for it.
_METRICS_OF_FIT = egress.Schema(scalars=egress.FIT_METRICS)


def _checked(reply: Message, schema: egress.Schema) -> Message:
    """Return a reply without arrays as it is, or as an error if it is not as declared."""
    if reply.has_error():
        return reply
    try:
        schema.admit({}, wire.metrics_of(reply))
    except EdgelearnError as error:
        return Message(Error(compat.ErrorCode.RAISED, str(error)), reply_to=reply)
    return reply


def _problem(device: int, reply: Message, phase: str) -> Line:
    outcome = _OUTCOMES.get(reply.error.code, Outcome.FAILED)
    reason = f"{phase}: {reply.error.reason}"
    return {"device": device, "outcome": outcome.value, "reason": reason}


def _with_samples(replies: Sequence[Message]) -> list[Message]:
    """Leave out replies of devices without test samples: they weigh nothing, and nothing may."""
    return [
        reply
        for reply in replies
        if reply.has_error() or wire.metrics_of(reply).get("num-examples", 0)
    ]


def _pooled(
    replies: Sequence[tuple[int, Mapping[str, Any]]], num_experiences: int
) -> dict[str, list[int]] | None:
    if not replies:
        return None
    total = {name: np.zeros(num_experiences, np.int64) for name in ("count", "served", "float")}
    for _, metrics in replies:
        for name, sums in total.items():
            sums += np.array(metrics[name], np.int64)
    return {name: [int(v) for v in sums] for name, sums in total.items()}


def _device_line(
    replies: Sequence[tuple[int, Mapping[str, Any]]], server_round: int, position: int
) -> Line:
    line: Line = {"kind": "devices", "round": server_round, "position": position}
    line["devices"] = [device for device, _ in replies]
    for name in ("count", "served", "float"):
        line[name] = [[int(v) for v in metrics[name]] for _, metrics in replies]
    return line
