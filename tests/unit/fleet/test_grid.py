"""FleetGrid under plain Flower: its ServerApp, its strategies, its ClientApp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import edgelearn.federated._flwr_compat as compat
from edgelearn.errors import RunError
from edgelearn.fleet.grid import Delivery, FleetGrid, app_executor, fork

from flwr.app import (  # isort: skip
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian  # isort: skip

compat.quieten()


def arrays(*values: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.array(values, np.float32))})


def values_of(record: ArrayRecord) -> list[float]:
    found: list[float] = record["w"].numpy().tolist()
    return found


def content(*values: float, **config: Any) -> RecordDict:
    return RecordDict({"arrays": arrays(*values), "config": ConfigRecord(config)})


def context(node: int, **state: float) -> Context:
    records = RecordDict({"own": MetricRecord(dict(state))} if state else {})
    return Context(
        run_id=1, node_id=node, node_config={"number": node}, state=records, run_config={}
    )


def client_app() -> ClientApp:
    """Return an app that adds its node's number to the weights, and weighs as much."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["number"])
        new = [v + number for v in values_of(message.content["arrays"])]  # type: ignore[arg-type]
        metrics = MetricRecord({"num-examples": number, "seen": float(number)})
        return Message(RecordDict({"arrays": arrays(*new), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        (value,) = values_of(message.content["arrays"])  # type: ignore[arg-type]
        metrics = MetricRecord({"num-examples": 1, "value": value})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def grid_of(app: ClientApp, num_devices: int = 3) -> FleetGrid:
    contexts = {node: context(node) for node in range(1, num_devices + 1)}
    return FleetGrid(app_executor(app, contexts), num_devices=num_devices)


# -- any Flower app --------------------------------------------------------------------------------


def test_a_plain_server_app_runs_on_it() -> None:
    grid, found = grid_of(client_app()), {}
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(min_available_nodes=3)
        found["result"] = strategy.start(grid=grid, initial_arrays=arrays(10.0), num_rounds=2)

    app(grid=grid, context=context(0))
    result = found["result"]
    mean = (1 * 1 + 2 * 2 + 3 * 3) / 6  # each node adds its number, and weighs as much
    assert values_of(result.arrays) == pytest.approx([10 + 2 * mean])
    assert result.train_metrics_clientapp[1]["seen"] == pytest.approx(mean)
    assert result.evaluate_metrics_clientapp[2]["value"] == pytest.approx(10 + 2 * mean)


@pytest.mark.parametrize(
    ("strategy", "expected"), [(FedMedian, [12.0]), (lambda **o: FedAdam(eta=0.1, **o), [10.1])]
)
def test_other_strategies_of_flower_run_unchanged(strategy: Any, expected: list[float]) -> None:
    made = strategy(min_available_nodes=3, fraction_evaluate=0.0)
    result = made.start(grid=grid_of(client_app()), initial_arrays=arrays(10.0), num_rounds=1)
    assert values_of(result.arrays) == pytest.approx(expected, abs=0.05)


def test_one_client_cannot_change_what_the_next_one_receives() -> None:
    """Flower's strategies send one RecordDict to all nodes."""
    seen: list[tuple[list[float], dict[str, Any]]] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        records: Any = message.content
        seen.append((values_of(records["arrays"]), dict(records["config"])))
        records["arrays"]["w"] = Array(np.array([-1.0], np.float32))
        records["arrays"]["more"] = Array(np.array([-1.0], np.float32))
        records["config"]["lr"] = 99.0
        records["mine"] = MetricRecord({"a": 1})
        del records["config"]["keep"]
        own = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays(1.0), "metrics": own}), reply_to=message)

    grid = grid_of(app)
    sent = content(5.0, lr=0.1, keep=7)
    replies = grid.send_and_receive([Message(sent, node, "train") for node in (1, 2, 3)])
    assert len(list(replies)) == 3
    assert seen == [([5.0], {"lr": 0.1, "keep": 7})] * 3
    assert values_of(sent["arrays"]) == [5.0]  # type: ignore[arg-type]
    assert dict(sent["config"]) == {"lr": 0.1, "keep": 7}
    assert set(sent) == {"arrays", "config"}


def test_a_fork_is_equal_apart_and_shares_the_payload() -> None:
    original = RecordDict(
        {"a": arrays(1.0), "m": MetricRecord({"x": 1, "l": [1.5]}), "c": ConfigRecord({"k": b"v"})}
    )
    copy = fork(original)
    assert copy == original
    assert copy["a"]["w"].data is original["a"]["w"].data  # type: ignore[index]
    copy["m"]["x"] = 2  # type: ignore[index]
    assert original["m"]["x"] == 1  # type: ignore[index]


# -- state and failures ----------------------------------------------------------------------------


def counting_app(fails: Callable[[int, int], bool]) -> ClientApp:
    """Return an app that counts its calls in Flower's context, and fails when told to."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        own: Any = context.state.setdefault("own", MetricRecord({"calls": 0}))
        own["calls"] += 1
        node = int(context.node_config["number"])
        if fails(node, own["calls"]):
            raise ValueError(f"node {node} gives up")
        metrics = MetricRecord({"num-examples": 1, "calls": own["calls"]})
        records = RecordDict({"arrays": arrays(float(node)), "metrics": metrics})
        return Message(records, reply_to=message)

    return app


def ask(grid: FleetGrid, nodes: Sequence[int] = (1, 2, 3), **options: Any) -> dict[int, Message]:
    sent = [Message(content(0.0), node, "train", **options) for node in nodes]
    return {r.metadata.src_node_id: r for r in grid.send_and_receive(sent)}


def calls(reply: Message) -> Any:
    return reply.content["metrics"]["calls"]  # type: ignore[index]


def test_a_context_is_kept_from_call_to_call() -> None:
    grid = grid_of(counting_app(lambda node, call: False))
    assert {n: calls(r) for n, r in ask(grid).items()} == {1: 1, 2: 1, 3: 1}
    assert {n: calls(r) for n, r in ask(grid, [2]).items()} == {2: 2}
    assert {n: calls(r) for n, r in ask(grid).items()} == {1: 2, 2: 3, 3: 2}


def test_an_exception_is_an_error_reply_and_the_others_go_on() -> None:
    grid = grid_of(counting_app(lambda node, call: node == 2))
    replies = ask(grid)
    assert replies[2].has_error()
    assert replies[2].error.code == 2
    assert "ValueError" in replies[2].error.reason
    assert "node 2 gives up" in replies[2].error.reason
    assert calls(replies[1]) == calls(replies[3]) == 1


def test_the_context_of_a_call_that_failed_is_as_before_it() -> None:
    broken = [True]
    grid = grid_of(counting_app(lambda node, call: broken[0] and node == 2 and call == 2))
    ask(grid)
    assert ask(grid)[2].has_error()
    broken[0] = False
    assert calls(ask(grid)[2]) == 2


def test_fedavg_goes_on_without_who_failed() -> None:
    grid = grid_of(counting_app(lambda node, call: node == 3))
    strategy = FedAvg(min_available_nodes=3, fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=arrays(0.0), num_rounds=1)
    assert values_of(result.arrays) == [1.5]


def test_a_node_that_is_offline_is_an_error_and_is_not_asked() -> None:
    asked: list[int] = []

    def execute(messages: Sequence[Message]) -> list[Delivery]:
        asked.extend(m.metadata.dst_node_id for m in messages)
        return [Delivery(RecordDict({"metrics": MetricRecord({"a": 1})})) for _ in messages]

    grid = FleetGrid(execute, num_devices=3)
    grid.available = [0, 2]
    assert list(grid.get_node_ids()) == [1, 3]
    replies = ask(grid)
    assert asked == [1, 3]
    assert [replies[n].has_error() for n in (1, 2, 3)] == [False, True, False]
    assert replies[2].error.code == compat.ErrorCode.NODE_UNAVAILABLE
    assert "offline" in replies[2].error.reason


# -- messages and the clock ------------------------------------------------------------------------


def slow(*latencies: float) -> Callable[[Sequence[Message]], list[Delivery]]:
    """Return an executor whose nodes 1, 2, ... take so long."""

    def execute(messages: Sequence[Message]) -> list[Delivery]:
        return [
            Delivery(
                RecordDict({"metrics": MetricRecord({"node": m.metadata.dst_node_id})}),
                latencies[m.metadata.dst_node_id - 1],
            )
            for m in messages
        ]

    return execute


def test_replies_answer_their_instructions_in_order() -> None:
    grid = FleetGrid(slow(3, 1, 2), num_devices=3)
    ids = list(grid.push_messages([Message(content(), n, "train") for n in (3, 1, 2)]))
    assert len(set(ids)) == 3
    grid.advance(ids)
    replies = list(grid.pull_messages(ids))
    assert [r.metadata.reply_to_message_id for r in replies] == ids
    assert [r.metadata.src_node_id for r in replies] == [3, 1, 2]
    assert [r.content["metrics"]["node"] for r in replies] == [3, 1, 2]  # type: ignore[index]
    assert len({r.metadata.message_id for r in replies} | set(ids)) == 6


def test_replies_arrive_when_their_time_has_come_and_once() -> None:
    grid = FleetGrid(slow(10, 20, 30), num_devices=3)
    ids = list(grid.push_messages([Message(content(), n, "train") for n in (1, 2, 3)]))

    def here() -> list[int]:
        return [r.metadata.src_node_id for r in grid.pull_messages(ids)]

    assert here() == []
    grid.clock_s = 9.99
    assert here() == []
    grid.clock_s = 20.0
    assert here() == [1, 2]
    assert here() == []
    grid.advance(ids)
    assert grid.clock_s == 30.0
    assert here() == [3]


def test_time_passes_until_the_last_reply_and_never_backwards() -> None:
    grid = FleetGrid(slow(10, 4, 7), num_devices=3)
    ask(grid)
    assert grid.clock_s == 10.0
    ask(grid, [2])
    assert grid.clock_s == 14.0
    grid.advance([])
    grid.advance(["unknown"])
    grid.advance(list(grid.push_messages([])))
    assert grid.clock_s == 14.0


def test_a_timeout_ends_the_wait() -> None:
    grid = FleetGrid(slow(10, 4, 70), num_devices=3)
    messages = [Message(content(), n, "train") for n in (1, 2, 3)]
    replies = list(grid.send_and_receive(messages, timeout=12.0))
    assert [r.metadata.src_node_id for r in replies] == [1, 2]
    assert grid.clock_s == 12.0


def test_after_the_deadline_a_reply_is_late_and_costs_no_more_than_the_deadline() -> None:
    grid = FleetGrid(slow(5, 60, 6), num_devices=3)
    replies = ask(grid, ttl=6.0)
    assert [replies[n].has_error() for n in (1, 2, 3)] == [False, True, False]
    assert replies[2].error.code == compat.ErrorCode.EXPIRED
    assert "took 60.0 s of virtual time, the deadline is 6.0 s" in replies[2].error.reason
    assert grid.clock_s == 6.0


def test_an_error_takes_its_time_too() -> None:
    def execute(messages: Sequence[Message]) -> list[Delivery]:
        return [Delivery(Error(compat.ErrorCode.RAISED, "broken"), 8.0) for _ in messages]

    grid = FleetGrid(execute, num_devices=3)
    assert ask(grid, [1])[1].error.reason == "broken"
    assert grid.clock_s == 8.0


def test_a_cohort_reaches_the_executor_at_once() -> None:
    sizes: list[int] = []

    def execute(messages: Sequence[Message]) -> list[Delivery]:
        sizes.append(len(messages))
        return slow(0, 0, 0)(messages)

    def one_by_one() -> Iterator[Message]:
        for node in (1, 2, 3):
            yield Message(content(), node, "train")

    FleetGrid(execute, num_devices=3).push_messages(one_by_one())
    assert sizes == [3]


def test_messages_made_by_the_grid_are_flowers() -> None:
    grid = FleetGrid(slow(0, 0, 0), num_devices=3, seed=4)
    message = grid.create_message(content(1.0), "train", 2, "group", ttl=5.0)
    assert message.metadata.dst_node_id == 2
    assert message.metadata.ttl == 5.0
    assert message.metadata.group_id == "group"
    assert grid.run.run_id == FleetGrid(slow(), num_devices=3, seed=4).run.run_id
    assert grid.run.run_id != FleetGrid(slow(), num_devices=3, seed=5).run.run_id


# -- strategies that wait for more devices than there are ------------------------------------------


def test_a_strategy_that_polls_for_more_nodes_than_there_are_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _seconds: None)
    strategy = FedAvg(min_available_nodes=9)
    with pytest.raises(RunError, match=r"more devices than the 3 that can be reached .* has 3"):
        strategy.start(grid=grid_of(client_app()), initial_arrays=arrays(0.0), num_rounds=1)


def test_asking_for_the_nodes_now_and_then_is_fine() -> None:
    grid = FleetGrid(slow(0, 0, 0), num_devices=3)
    for _ in range(300):
        grid.get_node_ids()
        grid.get_node_ids()
        ask(grid, [1])
