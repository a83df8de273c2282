"""A fleet behind a real Flower SuperLink, as the round loop sees it.

Flower knows nodes; the scenario knows devices. Each node is asked once which device it is. Nodes
are offered to server strategies in the order of their devices, so that a seeded strategy picks the
same cohort as in simulation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

import edgelearn.federated._flwr_compat as compat
from edgelearn.errors import RunError
from edgelearn.federated import messages as wire
from edgelearn.scenario.presence import presence
from edgelearn.scenario.spec import Scenario

from flwr.app import Message, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip

_POLL_S = 0.5
_HELLO_TTL_S = 60.0


class NetworkGrid(Grid):
    """Flower's grid with three differences: the order of nodes, a deadline, and the run's name."""

    def __init__(
        self, inner: Grid, nodes: Callable[[], Sequence[int]], *, run: str, ttl_s: float
    ) -> None:
        """Wrap a grid.

        Args:
            inner: What messages really travel on.
            nodes: Returns the nodes that can be reached, in the order of devices.
            run: Stamped on every instruction, so that a device knows which run it belongs to.
            ttl_s: Most seconds that an instruction lives; Flower then takes it back.
        """
        self._inner, self._nodes, self._name, self._ttl_s = inner, nodes, run, ttl_s

    def set_run(self, run: Any) -> None:
        """Set Flower's run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._inner.run

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
        """Return the nodes that can be reached, in the order of devices."""
        return self._nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send instructions.

        Raises:
            RunError: If the SuperLink did not take them.
        """
        instructions = list(messages)
        for message in instructions:
            message.metadata.ttl = min(message.metadata.ttl, self._ttl_s)
            for config in message.content.config_records.values():
                config[wire.RUN] = self._name
        ids = list(self._inner.push_messages(instructions))
        if len(ids) != len(instructions):
            raise RunError(
                f"the SuperLink took {len(ids)} of {len(instructions)} messages; its log says why"
            )
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are here."""
        return self._inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait for the replies (or the timeout), and pull."""
        limit = self._ttl_s if timeout is None else timeout
        return receive(self, list(self.push_messages(messages)), timeout_s=limit)


def receive(grid: Grid, message_ids: Sequence[str], *, timeout_s: float) -> list[Message]:
    """Wait for the replies to messages; return those that came in time."""
    until = time.monotonic() + timeout_s
    waiting = {identifier for identifier in message_ids if identifier}
    replies: list[Message] = []
    while waiting:
        arrived = list(grid.pull_messages(sorted(waiting)))
        replies += arrived
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        if time.monotonic() >= until:
            break
        if waiting and not arrived:
            time.sleep(_POLL_S)
    return replies


class NetworkFleet:
    """The fleet behind a SuperLink; devices keep their own state, the server keeps none of it."""

    def __init__(
        self, grid: Grid, scenario: Scenario, *, run: str, wait_s: float, round_timeout_s: float
    ) -> None:
        """Make the fleet; nobody is asked yet.

        Args:
            grid: Flower's grid.
            scenario: What is run.
            run: Name of the run.
            wait_s: Longest wait for devices to come.
            round_timeout_s: Longest wait for the replies of a phase.
        """
        self.grid = NetworkGrid(grid, self._offer, run=run, ttl_s=round_timeout_s)
        self._inner, self._scenario = grid, scenario
        self._wait_s, self._round_timeout_s = wait_s, round_timeout_s
        self._known: dict[int, int] = {}
        self._greeted: dict[str, int] = {}
        self._roster: dict[int, int] = {}
        self._presence = presence(scenario.fleet, scenario.stream.num_experiences, scenario.seed)
        self._position = 0
        self._is_complete = False
        self._offers = 0
        self._offered_at = 0.0
        self._began, self._before_s = time.monotonic(), 0.0

    @property
    def clock_s(self) -> float:
        """Wall time of the run, without pauses between a stop and its resumption."""
        return self._before_s + time.monotonic() - self._began

    @property
    def energy_j(self) -> None:
        """Nobody models the energy of real devices."""
        return None

    def roster(self) -> Mapping[int, int]:
        """Return node id -> device, for the nodes that can be reached now."""
        self._roster = self._taking_part()
        self._offers = 0
        return self._roster

    def begin_round(self, server_round: int, *, min_devices: int) -> None:
        """Wait until enough devices can be reached; at the beginning, until all can.

        Raises:
            RunError: If they don't come in time, or are not those of the scenario.
        """
        num_devices = self._scenario.fleet.num_devices
        self._position = max(server_round - 1, 0) // self._scenario.stream.rounds_per_experience
        wanted, look = num_devices, self._reachable
        if self._is_complete:
            wanted, look = min_devices, self._taking_part
        until = time.monotonic() + self._wait_s
        while len(found := look()) < wanted:
            if time.monotonic() >= until:
                missing = sorted(set(range(num_devices)) - set(found.values()))
                listed = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
                raise RunError(
                    f"{len(found)} of {num_devices} devices came within {self._wait_s:g} s, "
                    f"{wanted} are needed; missing: {listed}"
                )
            time.sleep(_POLL_S)
        self._is_complete = True

    def collect(self, grid: Grid, message_ids: Sequence[str]) -> Iterable[Message]:
        """Wait for the replies; those that do not come in time are late."""
        return receive(grid, message_ids, timeout_s=self._round_timeout_s)

    def commit(self) -> Mapping[str, Tensor]:
        """Return nothing: devices have made their state durable before they replied."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], clock_s: float) -> None:  # noqa: ARG002
        """Set the clock."""
        self._before_s, self._began = clock_s, time.monotonic()

    # -- nodes and devices -------------------------------------------------------------------------

    def _offer(self) -> list[int]:
        """Return what a strategy may choose from; one that asks again and again waits for more."""
        now = time.monotonic()
        if self._offers == 0:
            self._offered_at = now
        elif now - self._offered_at > self._wait_s:
            raise RunError(
                f"the server strategy waits for more devices than the {len(self._roster)} that can "
                f"be reached (the fleet has {self._scenario.fleet.num_devices})"
            )
        else:
            self._roster.update(self._taking_part())
        self._offers += 1
        return sorted(self._roster, key=self._roster.__getitem__)

    def _taking_part(self) -> dict[int, int]:
        """Return what `_reachable` does, without devices that the scenario says are away."""
        found = self._reachable()
        if self._presence is None:
            return found
        there = self._presence.at(self._position)
        return {node: device for node, device in found.items() if there[device]}

    def _reachable(self) -> dict[int, int]:
        """Return node id -> device of the nodes that are here, in the order of devices.

        Nodes that were not asked yet are asked; they count once they have answered.
        """
        online = set(self._inner.get_node_ids())
        self._greet(sorted(online - set(self._known) - set(self._greeted.values())))
        self._hear()
        found = {node: self._known[node] for node in online if node in self._known}
        owners: dict[int, int] = {}
        for node, device in sorted(found.items()):
            if (other := owners.setdefault(device, node)) != node:
                raise RunError(
                    f"the nodes {other} and {node} both say that they are device {device}; give "
                    "each its own partition-id, and a registered key, by which a device that was "
                    "restarted is known again"
                )
        here = ((device, node) for device, node in owners.items() if self._is_ours(device))
        return {node: device for device, node in sorted(here)}

    def _is_ours(self, device: int) -> bool:
        return device < self._scenario.fleet.num_devices

    def _greet(self, nodes: Sequence[int]) -> None:
        """Ask nodes which device they are. The question expires, and is then asked again."""
        if not nodes:
            return
        config = wire.instruction(digest=self._scenario.digest, server_round=0, position=0)
        content = RecordDict({wire.CONFIG: config})
        questions = [Message(content, node, wire.HELLO, ttl=_HELLO_TTL_S) for node in nodes]
        ids = self.grid.push_messages(questions)  # None for what Flower did not take
        self._greeted.update({i: node for i, node in zip(ids, nodes, strict=True) if i})

    def _hear(self) -> None:
        """Take in what nodes have said of themselves."""
        if not self._greeted:
            return
        for reply in self.grid.pull_messages(sorted(self._greeted)):
            node = self._greeted.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                if reply.error.code not in _AWAY:
                    raise RunError(f"node {node} can't take part: {reply.error.reason}")
                continue
            device = wire.metrics_of(reply).get("device")
            if type(device) is not int or device < 0:
                raise RunError(f"node {node} does not say which device it is, but {device!r}")
            self._known[node] = device


_AWAY = (
    compat.ErrorCode.EXPIRED,
    compat.ErrorCode.REPLY_EXPIRED,
    compat.ErrorCode.NODE_UNAVAILABLE,
)
