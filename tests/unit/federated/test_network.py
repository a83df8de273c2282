"""Nodes and devices: who is who, in which order, and what is said when somebody is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import edgelearn
from edgelearn.errors import RunError
from edgelearn.federated import _flwr_compat as compat
from edgelearn.federated import messages as wire
from edgelearn.federated import network
from edgelearn.federated.network import NetworkFleet, receive
from edgelearn.federated.server_app import serve, server_app
from edgelearn.fleet.grid import Delivery, FleetGrid
from edgelearn.scenario.spec import Scenario

from flwr.app import Context, Error, Message, RecordDict  # isort: skip
from flwr.serverapp.strategy import FedAvg  # isort: skip

Answer = Callable[[Message], RecordDict | Error]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_POLL_S", 0.01)


class Network(FleetGrid):
    """A grid whose nodes are in no order, come and go, and can be slow."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        self.answers, self.online = answers, list(answers)
        self.sent: list[Message] = []
        self.silent: set[int] = set()
        super().__init__(self._answer, num_devices=1000)

    def _answer(self, messages: Iterable[Message]) -> list[Delivery]:
        self.sent += messages
        return [Delivery(self.answers[m.metadata.dst_node_id](m)) for m in messages]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in self.sent}
        return super().pull_messages([i for i in message_ids if nodes[i] not in self.silent])


def says(device: Any) -> Answer:
    return lambda _message: wire.reply_content({"device": device})


def scenario(num_devices: int, **fleet: Any) -> Scenario:
    sizes = {"num_devices": num_devices, "cohort": num_devices, **fleet}
    return edgelearn.load("split-digits", fleet=sizes)


def fleet_of(grid: Network, num_devices: int, wait_s: float = 0.3) -> NetworkFleet:
    return NetworkFleet(grid, scenario(num_devices), run="r", wait_s=wait_s, round_timeout_s=0.2)


def test_nodes_come_in_the_order_of_devices() -> None:
    grid = Network({70: says(2), 11: says(0), 40: says(1)})
    fleet = fleet_of(grid, 3)
    fleet.begin_round(0, min_devices=1)
    assert list(fleet.roster().items()) == [(11, 0), (40, 1), (70, 2)]
    assert list(fleet.grid.get_node_ids()) == [11, 40, 70]
    fleet.begin_round(1, min_devices=3)
    assert len(grid.sent) == 3  # asked once
    assert all(m.metadata.message_type == "query.hello" for m in grid.sent)
    assert all(wire.config_of(m)[wire.RUN] == "r" for m in grid.sent)
    assert all(m.metadata.ttl <= 0.2 for m in grid.sent)


def test_devices_beyond_the_scenario_are_left_alone() -> None:
    fleet = fleet_of(Network({11: says(5), 12: says(0)}), 1)
    fleet.begin_round(0, min_devices=1)
    assert dict(fleet.roster()) == {12: 0}


def test_who_the_scenario_says_is_away_is_not_asked() -> None:
    grid = Network({10 + device: says(device) for device in range(10)})
    comers = scenario(10, cohort=4, late_share=0.5)
    fleet = NetworkFleet(grid, comers, run="r", wait_s=0.3, round_timeout_s=0.2)
    fleet.begin_round(0, min_devices=1)
    rounds = comers.stream.rounds_per_experience
    seen = []
    for position in range(comers.stream.num_experiences):
        fleet.begin_round(position * rounds + 1, min_devices=4)
        roster = dict(fleet.roster())
        assert list(fleet.grid.get_node_ids()) == list(roster)
        seen.append(set(roster.values()))
        fleet.begin_round((position + 1) * rounds, min_devices=4)
        assert set(fleet.roster().values()) == seen[-1]
    assert len(seen[0]) == 5
    assert seen[0] < seen[-1] == set(range(10))


def test_who_is_missing_is_said() -> None:
    fleet = fleet_of(Network({11: says(2), 12: says(0)}), 4)
    with pytest.raises(RunError, match=r"2 of 4 devices came within 0.3 s, 4 are needed; .*: 1, 3"):
        fleet.begin_round(0, min_devices=1)


def test_two_nodes_that_are_one_device() -> None:
    fleet = fleet_of(Network({11: says(0), 12: says(0)}), 2)
    with pytest.raises(RunError, match="the nodes 11 and 12 both say that they are device 0"):
        fleet.begin_round(0, min_devices=1)


@pytest.mark.parametrize("device", [-1, 0.5, [0]])
def test_a_node_that_does_not_know_who_it_is(device: object) -> None:
    fleet = fleet_of(Network({11: says(device)}), 1)
    with pytest.raises(RunError, match="node 11 does not say which device it is"):
        fleet.begin_round(0, min_devices=1)


def test_a_node_that_can_not_take_part_is_the_first_cause() -> None:
    refuses = Network({11: lambda _m: Error(compat.ErrorCode.RAISED, "no such scenario")})
    with pytest.raises(RunError, match="node 11 can't take part: no such scenario"):
        fleet_of(refuses, 1).begin_round(0, min_devices=1)


def test_a_device_that_comes_late_or_back_is_found() -> None:
    grid = Network({11: says(0), 12: says(1)})
    grid.silent = {12}
    fleet = fleet_of(grid, 2, wait_s=5)
    polls, ids = 0, grid.get_node_ids

    def later() -> Iterable[int]:
        nonlocal polls
        polls += 1
        if polls == 2:
            grid.silent = set()
        return ids()

    grid.get_node_ids = later  # type: ignore[method-assign]
    fleet.begin_round(0, min_devices=1)
    assert set(fleet.roster().values()) == {0, 1}
    grid.online = [11]
    assert set(fleet.roster().values()) == {0}
    assert list(fleet.grid.get_node_ids()) == [11]
    grid.online = [11, 12]
    assert list(fleet.grid.get_node_ids()) == [11, 12]  # a strategy that asks again sees it


def test_a_strategy_that_waits_for_more_than_there_are_ends() -> None:
    fleet = fleet_of(Network({11: says(0)}), 1, wait_s=0.5)
    fleet.begin_round(0, min_devices=1)
    fleet.roster()
    strategy = FedAvg(min_available_nodes=2, min_train_nodes=2)
    arrays = wire.encode_params(*layout_and_params())
    with pytest.raises(RunError, match="waits for more devices than the 1"):
        strategy.configure_train(1, arrays, wire.instruction(
            digest="d", server_round=1, position=0
        ), fleet.grid)  # fmt: skip


def layout_and_params() -> tuple[Any, Any]:
    from edgelearn.scenario.world import build

    model = build(scenario(1)).model()
    return model.layout, model.initial()


def test_replies_that_do_not_come_are_left_out() -> None:
    grid = Network({11: says(0), 12: says(1)})
    fleet = fleet_of(grid, 2)
    fleet.begin_round(0, min_devices=1)
    grid.silent = {12}
    content = RecordDict({"config": wire.instruction(digest="d", server_round=1, position=0)})
    ids = list(fleet.grid.push_messages([Message(content, n, "train") for n in (11, 12)]))
    began = time.monotonic()
    replies = list(fleet.collect(fleet.grid, ids))
    assert [r.metadata.reply_to_message_id for r in replies] == ids[:1]
    assert 0.2 <= time.monotonic() - began < 2
    assert receive(fleet.grid, ["", ids[1]], timeout_s=0) == []


def test_what_the_superlink_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Network({11: says(0)})
    monkeypatch.setattr(grid, "push_messages", lambda _messages: [])
    with pytest.raises(RunError, match="took 0 of 1 messages"):
        fleet_of(grid, 1).begin_round(0, min_devices=1)


# -- the run directory and the configuration -------------------------------------------------------


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    grid = Network({})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        serve(grid, scenario(1), out=tmp_path)
    other = tmp_path / "other"
    edgelearn.simulate(small(), out=other)
    with pytest.raises(RunError, match="holds a run of the scenario"):
        serve(grid, scenario(1), out=other)
    (other / "model.safetensors").unlink()
    with pytest.raises(RunError, match="holds a simulated run"):
        serve(grid, small(), out=other)


def small() -> Scenario:
    return edgelearn.load(
        "split-digits",
        data={"max_train": 60, "max_test": 20},
        model={"args": {"hidden": [4]}},
        fleet={"num_devices": 1, "cohort": 1},
        stream={"num_experiences": 1, "rounds_per_experience": 1},
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no scenario"),
        ({"scenario": "split-digits"}, "out is None"),
        ({"scenario": "split-digits", "out": "here"}, "out is 'here'"),
        ({"scenario": "split-digits", "out": "/tmp/x", "wait-s": -1}, "wait-s is -1"),
        ({"scenario": "split-digits", "out": "/tmp/x", "round-timeout-s": "1"}, "is '1'"),
    ],
)
def test_the_configuration_is_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        server_app()(Network({}), Context(1, 1, {}, RecordDict(), config))
