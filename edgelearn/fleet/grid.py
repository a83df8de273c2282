"""FleetGrid: Flower's `Grid` in process, on a virtual clock.

Any Flower ServerApp and Strategy runs on it, with no Ray, daemon or network, and a whole cohort
reaches the executor at once. `push_messages` schedules on the virtual clock, `pull_messages`
returns what has arrived by now.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import edgelearn.federated._flwr_compat as compat
from edgelearn.errors import RunError
from edgelearn.seeds import derive

from flwr.app import (  # isort: skip
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid  # isort: skip


@dataclass(frozen=True, slots=True)
class Delivery:
    """A reply and how long it took.

    Attributes:
        reply: Content or error; not yet addressed.
        latency_s: Virtual seconds from sending the instruction to having the reply.
    """

    reply: RecordDict | Error
    latency_s: float = 0.0


Execute = Callable[[Sequence[Message]], Sequence[Delivery]]

_MAX_POLLS = 10  # Flower's strategies sleep a second between them


class FleetGrid(Grid):
    """A grid whose nodes are simulated devices; node ids are device + 1."""

    def __init__(self, execute: Execute, *, num_devices: int, seed: int = 0) -> None:
        """Make the grid.

        Args:
            execute: Does what a list of instructions asks, one delivery for each, in order.
            num_devices: Size of the fleet.
            seed: Of the run id.
        """
        self._execute = execute
        self._num_devices = num_devices
        self._run = compat.empty_run(derive(seed, "run-id"))
        self._ids = itertools.count(1)
        self._waiting: dict[str, tuple[float, Message]] = {}
        self._polls = 0
        self.clock_s = 0.0
        self.available = list(range(num_devices))
        compat.assume_identity(self._run.run_id)

    @property
    def available(self) -> Sequence[int]:
        """Devices that can be reached now, ascending."""
        return self._available

    @available.setter
    def available(self, devices: Sequence[int]) -> None:
        self._available = devices
        self._nodes = [device + 1 for device in devices]

    # -- Flower's Grid -----------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Set the run that this grid belongs to."""
        self._run = run
        compat.assume_identity(run.run_id)

    @property
    def run(self) -> Any:
        """The run that this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create an instruction."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that can be reached now, in the order of devices.

        Raises:
            RunError: If a strategy polls on and on for more nodes than there are.
        """
        self._polls += 1
        if self._polls > _MAX_POLLS:
            raise RunError(
                f"the server strategy waits for more devices than the {len(self._nodes)} that can "
                f"be reached (the fleet has {self._num_devices})"
            )
        return self._nodes.copy()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Execute instructions; their replies arrive on the virtual clock."""
        instructions = list(messages)
        self._polls = 0
        identifiers = [f"{next(self._ids):032x}" for _ in instructions]
        reachable = set(self._nodes)
        sent: list[Message] = []
        for identifier, message in zip(identifiers, instructions, strict=True):
            compat.set_message_id(message, identifier)
            if message.metadata.dst_node_id in reachable:
                sent.append(message)
            else:
                error = Error(compat.ErrorCode.NODE_UNAVAILABLE, "the device is offline")
                self._file(message, Delivery(error))
        for message, delivery in zip(sent, self._execute(sent), strict=True):
            self._file(message, delivery)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived by now, in the order asked for."""
        ready = [
            m for m in message_ids if m in self._waiting and self._waiting[m][0] <= self.clock_s
        ]
        return [self._waiting.pop(m)[1] for m in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, let virtual time pass until all replies are here (or the timeout), and pull."""
        ids = list(self.push_messages(messages))
        self.advance(ids, timeout_s=timeout)
        return self.pull_messages(ids)

    # -- the virtual clock -------------------------------------------------------------------------

    def advance(self, message_ids: Iterable[str], *, timeout_s: float | None = None) -> None:
        """Let time pass until the replies to these messages are here, at most `timeout_s`."""
        arrivals = [self._waiting[m][0] for m in message_ids if m in self._waiting]
        latest = max(arrivals, default=self.clock_s)
        end = latest if timeout_s is None else min(latest, self.clock_s + timeout_s)
        self.clock_s = max(self.clock_s, end)

    def pass_time(self, seconds: float) -> None:
        """Let time pass in which devices were asked without messages."""
        self._polls = 0
        self.clock_s += seconds

    def _file(self, message: Message, delivery: Delivery) -> None:
        """Address a reply. One that takes longer than the instruction's ttl is an error."""
        ttl, reply = message.metadata.ttl, delivery.reply
        latency_s = delivery.latency_s
        if latency_s > ttl:
            reply = Error(compat.ErrorCode.EXPIRED, too_late(latency_s, ttl))
            latency_s = ttl
        answer = Message(reply, reply_to=message)
        compat.set_message_id(answer, f"{next(self._ids):032x}")
        self._waiting[message.metadata.message_id] = (self.clock_s + latency_s, answer)


def too_late(latency_s: float, ttl_s: float) -> str:
    """Return why a reply is not taken."""
    return f"the reply took {latency_s:.1f} s of virtual time, the deadline is {ttl_s:.1f} s"


def fork(content: RecordDict) -> RecordDict:
    """Return a private copy of a message's content; payloads are immutable and shared.

    Flower's strategies send ONE RecordDict to all nodes: in one process, a client that writes into
    it would change what the next one receives.
    """
    out = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            out[key] = ArrayRecord(dict(record))
        elif isinstance(record, MetricRecord):
            out[key] = MetricRecord(dict(record))
        else:
            out[key] = ConfigRecord(dict(record))
    return out


def app_executor(
    client_app: Any, contexts: Mapping[int, Any]
) -> Callable[[Sequence[Message]], list[Delivery]]:
    """Return an executor that calls any Flower ClientApp, one message after another.

    Args:
        client_app: A `flwr.clientapp.ClientApp`.
        contexts: Flower's `Context` of each node; a node's state is kept only if its call succeeds.
    """
    held = dict(contexts)

    def execute(messages: Sequence[Message]) -> list[Delivery]:
        deliveries = []
        for message in messages:
            node = message.metadata.dst_node_id
            own = Message(
                fork(message.content),
                node,
                message.metadata.message_type,
                group_id=message.metadata.group_id,
            )
            compat.set_message_id(own, message.metadata.message_id)
            context = held[node]
            trial = type(context)(
                context.run_id,
                context.node_id,
                dict(context.node_config),
                fork(context.state),
                dict(context.run_config),
            )
            try:
                reply = client_app(message=own, context=trial)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                deliveries.append(Delivery(Error(compat.ErrorCode.RAISED, reason)))
                continue
            if reply.has_content():
                held[node] = trial
                deliveries.append(Delivery(reply.content))
            else:
                deliveries.append(Delivery(reply.error))
        return deliveries

    return execute
