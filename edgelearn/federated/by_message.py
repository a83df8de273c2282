"""The faithful way: one Flower message for each device, and any strategy over any grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from edgelearn.errors import EdgelearnError
from edgelearn.federated import _flwr_compat as compat
from edgelearn.federated import egress, exchange
from edgelearn.federated import messages as wire
from edgelearn.federated.exchange import Evaluated, Fitted, Outcome, Run, Traffic
from edgelearn.federated.record import Line

from flwr.app import Error, Message, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp.strategy import Strategy  # isort: skip


class Reachable(Protocol):
    """What a fleet has to tell beyond Flower's Grid."""

    def roster(self) -> Mapping[int, int]:
        """Return node id -> device, for the nodes that can be reached now."""

    def collect(self, grid: Grid, message_ids: Sequence[str]) -> Iterable[Message]:
        """Wait for the replies to these messages, and return those that came in time."""


@final
class ByMessage:
    """One message for each device."""

    def __init__(self, run: Run, grid: Grid, fleet: Reachable) -> None:
        self._run, self._grid, self._fleet = run, grid, fleet
        # A device's own guard has admitted its reply; the server takes nobody's word for it.
        self._metrics_of_fit = egress.Schema(scalars=egress.fit_metrics(detects=run.detects))
        self.traffic = Traffic(run.scenario.fleet.num_devices)

    @property
    def strategy(self) -> Strategy:
        """Flower's strategy."""
        return self._run.strategy

    def fit(self, server_round: int, position: int, params: Tensor) -> Fitted:
        """Let a cohort train, and hand each reply to the strategy."""
        run, roster = self._run, self._fleet.roster()
        config = run.instruction(server_round, position)
        with run.hook("configure_train", server_round):
            arrays = wire.encode_params(run.layout, params)
            instructions = list(
                run.strategy.configure_train(server_round, arrays, config, self._grid)
            )
        outcomes: dict[int, Outcome] = {}
        problems: list[Line] = []
        admitted: list[Message] = []
        losses: list[tuple[float, int]] = []
        alarms: dict[int, int] = {}
        limit = run.norm_limit(params)
        for device, reply in self._exchange(instructions, roster):
            outcome, reason, ready = self._admit(device, reply, params, limit)
            outcomes[device] = outcome
            if outcome in (Outcome.OK, Outcome.IDLE):
                metrics = wire.metrics_of(ready)
                losses.append((float(metrics["loss"]), int(metrics["num-examples"])))
                if num_alarms := int(metrics.get("num-alarms", 0)):
                    alarms[device] = num_alarms
            else:
                problems.append(exchange.problem(device, outcome, reason))
            if outcome is not Outcome.IDLE:
                admitted.append(ready)
        if Outcome.OK in outcomes.values():
            with run.hook("aggregate_train", server_round):
                found, _ = run.strategy.aggregate_train(server_round, admitted)
            if found is not None:
                params = run.accept(wire.decode_params(run.layout, found), server_round)
        exchange.refuse_failure(outcomes, problems, server_round)
        total = sum(count for _, count in losses)
        loss = sum(value * count for value, count in losses) / total if total else None
        return Fitted(params, outcomes, problems, loss, alarms if run.detects else None)

    def consolidate(self, server_round: int, position: int, params: Tensor) -> list[Line]:
        """Let every device that can be reached consolidate, on the final global parameters."""
        run, roster = self._run, self._fleet.roster()
        config = run.instruction(server_round, position)
        arrays = wire.encode_params(run.layout, params)
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: config})
        instructions = [Message(content, node, wire.CONSOLIDATE) for node in roster]
        answers = self._exchange(instructions, roster)
        return [_problem(d, r, "consolidation") for d, r in answers if r.has_error()]

    def evaluate(self, server_round: int, position: int, params: Tensor) -> Evaluated:
        """Let devices evaluate what they serve."""
        run, roster = self._run, self._fleet.roster()
        config = run.instruction(server_round, position)
        with run.hook("configure_evaluate", server_round):
            arrays = wire.encode_params(run.layout, params)
            instructions = list(
                run.strategy.configure_evaluate(server_round, arrays, config, self._grid)
            )
        schema = egress.evaluate_schema(run.stream.num_experiences)
        answers = [
            (device, _checked(reply, schema))
            for device, reply in self._exchange(instructions, roster)
        ]
        with_samples = _with_samples([reply for _, reply in answers])
        if with_samples:
            with run.hook("aggregate_evaluate", server_round):
                run.strategy.aggregate_evaluate(server_round, with_samples)
        problems = [_problem(d, r, "evaluation") for d, r in answers if r.has_error()]
        found = [(d, wire.metrics_of(reply)) for d, reply in answers if not reply.has_error()]
        exchange.refuse_blindness(problems, len(found), server_round)
        return exchange.table(found, problems)

    # -- replies -----------------------------------------------------------------------------------

    def _admit(
        self, device: int, reply: Message, params: Tensor, limit: float
    ) -> tuple[Outcome, str, Message]:
        """Classify a reply; return it with local parameters in place of the update."""
        if reply.has_error():
            return Outcome.of_error(reply.error.code), reply.error.reason or "", reply
        run = self._run
        try:
            self._metrics_of_fit.admit({}, wire.metrics_of(reply))
            delta = run.update_in(wire.arrays_of(reply), device)
        except EdgelearnError as error:
            return _reject(reply, str(error))
        if not bool(torch.isfinite(delta).all()):
            return _reject(reply, exchange.NOT_FINITE)
        norm = float(delta.norm())
        if norm > limit:
            return _reject(reply, exchange.too_large(norm, limit))
        if int(wire.metrics_of(reply).get("num-examples", 0)) == 0:
            return Outcome.IDLE, "", reply
        content = RecordDict(dict(reply.content))
        local = wire.as_local(run.layout_of(device), run.held_by(device, params), delta)
        content[next(iter(reply.content.array_records))] = local
        reply.content = content
        return Outcome.OK, "", reply

    def _exchange(
        self, instructions: Sequence[Message], roster: Mapping[int, int]
    ) -> list[tuple[int, Message]]:
        """Send, wait, and return an answer for each instruction, in their order.

        A reply that did not come becomes an error reply, so nobody is missing.
        """
        if not instructions:
            return []
        self._cut(instructions, roster)
        deadline = self._run.scenario.fleet.deadline_s
        if deadline:
            for message in instructions:
                message.metadata.ttl = deadline
        sizes: dict[int, int] = {}
        for message in instructions:
            key = id(message.content)
            if key not in sizes:
                sizes[key] = wire.num_bytes(message.content)
            self.traffic.down[roster[message.metadata.dst_node_id]] += sizes[key]
        ids = list(self._grid.push_messages(instructions))
        replies = {
            reply.metadata.reply_to_message_id: reply
            for reply in self._fleet.collect(self._grid, ids)
        }
        answers = []
        for message_id, message in zip(ids, instructions, strict=True):
            device = roster[message.metadata.dst_node_id]
            reply = replies.get(message_id)
            if reply is None:
                late = Error(compat.ErrorCode.REPLY_EXPIRED, "no reply before the deadline")
                reply = Message(late, reply_to=message)
            elif reply.has_content():
                self.traffic.up[device] += wire.num_bytes(reply.content)
            answers.append((device, reply))
        return answers

    def _cut(self, instructions: Sequence[Message], roster: Mapping[int, int]) -> None:
        """Leave in each instruction what its device holds; equal parts share one content."""
        run = self._run
        if not run.holdings.widths:
            return
        whole = [message.content for message in instructions]
        made: dict[tuple[int, str], RecordDict] = {}
        for message, given in zip(instructions, whole, strict=True):
            part = run.holdings.of_device(roster[message.metadata.dst_node_id])
            if part is None:
                continue
            key = (id(given), part.layout.digest)
            if key not in made:
                ((name, arrays),) = given.array_records.items()
                content = RecordDict(dict(given))
                held = part.take(wire.decode_params(run.layout, arrays))
                content[name] = wire.encode_params(part.layout, held)
                made[key] = content
            message.content = made[key]


def _reject(reply: Message, reason: str) -> tuple[Outcome, str, Message]:
    refused = Message(Error(compat.ErrorCode.RAISED, reason), reply_to=reply)
    return Outcome.REJECTED, reason, refused


def _checked(reply: Message, schema: egress.Schema) -> Message:
    """Return a reply without arrays as it is, or as an error if it is not as declared."""
    if reply.has_error():
        return reply
    try:
        schema.admit({}, wire.metrics_of(reply))
    except EdgelearnError as error:
        return Message(Error(compat.ErrorCode.RAISED, str(error)), reply_to=reply)
    return reply


def _problem(device: int, reply: Message, phase: str) -> dict[str, Any]:
    outcome = Outcome.of_error(reply.error.code)
    return exchange.problem(device, outcome, f"{phase}: {reply.error.reason}")


def _with_samples(replies: Sequence[Message]) -> list[Message]:
    """Leave out replies of devices without test samples: they weigh nothing, and nothing may."""
    return [
        reply
        for reply in replies
        if reply.has_error() or wire.metrics_of(reply).get("num-examples", 0)
    ]
