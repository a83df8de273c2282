"""The Flower apps in one process: the same results as the simulator, and state on the device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import edgelearn
from edgelearn.errors import RunError, StateError
from edgelearn.federated import _flwr_compat as compat
from edgelearn.federated import messages as wire
from edgelearn.federated.client_app import client_app
from edgelearn.federated.record import RunRecord
from edgelearn.federated.server_app import server_app
from edgelearn.fleet.grid import FleetGrid, app_executor
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.load import load
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build

from flwr.app import Context, Message, RecordDict  # isort: skip
from flwr.serverapp.strategy import FedAvg  # isort: skip

OVERRIDES: dict[str, Any] = {
    "data.max_train": 240,
    "data.max_test": 60,
    "model.args": {"hidden": [12]},
    "fleet.num_devices": 4,
    "fleet.cohort": 2,
    "stream.num_experiences": 2,
    "stream.rounds_per_experience": 2,
    "client.args": {"capacity": 6},
    "client.epochs": 1,
}
Reply = Message
EVALUATED = {"num-examples", "model-bytes", "count", "served", "float"}


def run_config(state: Path, **more: Any) -> dict[str, Any]:
    overrides = json.dumps(OVERRIDES | more.pop("overrides", {}))
    return {"scenario": "split-digits", "overrides": overrides, "state-dir": str(state)} | more


def scenario_of(config: Mapping[str, Any]) -> Scenario:
    return load(config["scenario"], json.loads(config["overrides"]))


def fleet(config: dict[str, Any], num_devices: int = 4) -> FleetGrid:
    contexts = {
        device + 1: Context(1, device + 1, {"partition-id": device}, RecordDict(), config)
        for device in range(num_devices)
    }
    return FleetGrid(app_executor(client_app(), contexts), num_devices=num_devices)


def serve(grid: FleetGrid, config: dict[str, Any]) -> RunRecord:
    server_app()(grid, Context(1, 1, {}, RecordDict(), config))
    return RunRecord.read(config["out"])


def accuracies(record: RunRecord) -> list[Any]:
    rows = [line["accuracy"] for line in record.lines if "accuracy" in line]
    return [*rows, *[(d["devices"], d["served"], d["float"]) for d in record.device_rows]]


def states(root: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(root.glob("device-*/state.safetensors"))]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"client.strategy": "ewc", "client.args": {}, "server.strategy": "FedAdam"},
        {
            "stream.kind": "domain-incremental",
            "stream.transform": "rotate",
            "stream.order": "per-device",
            "client.args.policy": "reservoir",
        },
        {"stream.kind": "task-incremental", "server.strategy": "FedProx", "fleet.cohort": 1},
        {"client.strategy": "replay+scaffold", "client.args": {}},
        {"client.strategy": "fedcurv+fedper", "client.args": {}},
        {"wire.codec": "int4"},
        {"runtime.recalibrate": "tracked", "wire.codec": "int8"},
        {
            "wire.codec": "top-k",
            "wire.args": {"values": "int8"},
            "client.strategy": "scaffold",
            "client.args": {},
        },
        {
            "data.public": 40,
            "model.variants": {"small": {"name": "mlp", "args": {"hidden": [5]}, "share": 0.5}},
            "client.strategy": "fedmd+replay",
            "client.args": {"fedmd": {"transfer_epochs": 1}},
        },
    ],
    ids=[
        "replay",
        "ewc",
        "rotated",
        "tasks",
        "control variates",
        "curvature and heads",
        "4 bits",
        "kept ranges",
        "error feedback",
        "different networks",
    ],
)
def test_same_bits_as_the_simulator(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = run_config(tmp_path / "state", out=str(tmp_path / "real"), overrides=overrides)
    record = serve(fleet(config), config)
    how = {"engine": "reference", "federation": "faithful"}
    simulated = simulate(scenario_of(config), out=tmp_path / "simulated", **how)
    assert accuracies(record) == accuracies(simulated)
    ours = load_file(tmp_path / "real" / "model.safetensors")
    theirs = load_file(tmp_path / "simulated" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert record.is_complete
    assert record.end["bytes_up"] == simulated.end["bytes_up"]


def test_devices_keep_what_they_declared_and_no_more(tmp_path: Path) -> None:
    config = run_config(tmp_path / "state", out=str(tmp_path / "out"))
    serve(fleet(config), config)
    world = build(scenario_of(config))
    for device, state in enumerate(states(tmp_path / "state")):
        used = state["samples.used"].bool()
        assert 0 < used.sum() <= 6
        assert state["samples.x"].dtype == torch.uint8
        assert not state["samples.x"][~used].any()  # erased, not merely unreferenced
        assert not any(name.startswith("pending.") for name in state)
        own = world.train.stored(torch.from_numpy(world.train_parts[device]))
        for kept in state["samples.x"][used]:
            assert (own == kept).flatten(1).all(1).any()
    assert len(states(tmp_path / "state")) == 4


# What a step leaves in memory shows in the next round: to train twice would show too.
MOMENTUM = """
import edgelearn

class Momentum(edgelearn.ClientStrategy):
    def declare(self, model, facts):
        return {"velocity": edgelearn.TensorSpec((model.layout.num_trained,))}

    def adjust(self, gradients, params, memory):
        return gradients + 0.5 * memory["velocity"]

    def after_step(self, before, after, gradients, memory):
        return memory.replace(velocity=gradients)
"""


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "momentum.py").write_text(MOMENTUM)
    own = {"client.strategy": f"{tmp_path}/momentum.py:Momentum", "client.args": {}}
    config = run_config(tmp_path / "state", out=str(tmp_path / "out"), overrides=own)
    serve(fleet(config), config)
    expected = load_file(tmp_path / "out" / "model.safetensors")

    # hello, evaluate; fit, evaluate; fit, consolidate, evaluate; fit, evaluate; fit, consolidate
    for stop_at in (3, 5, 6, 8, 10, 11):
        out, state = tmp_path / f"out-{stop_at}", tmp_path / f"state-{stop_at}"
        config = run_config(state, out=str(out), overrides=own)
        grid = fleet(config)
        pushes, push = 0, grid.push_messages

        def dies(messages: Any, push: Any = push, stop_at: int = stop_at) -> Any:
            nonlocal pushes
            pushes += 1
            ids = push(messages)  # the devices have worked and committed: their answers are lost
            if pushes == stop_at:
                raise KeyboardInterrupt
            return ids

        grid.push_messages = dies  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            serve(grid, config)
        record = serve(fleet(config), config)
        assert record.is_complete
        resumed = load_file(out / "model.safetensors")
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)
        again = serve(fleet(config), config)
        assert again.lines == record.lines


def test_it_does_so_with_what_was_not_sent_yet(tmp_path: Path) -> None:
    """A device that is asked once more sends the same message, and its residual moves on once."""
    codec = {"wire.codec": "top-k", "fleet.cohort": 4}
    config = run_config(tmp_path / "state", out=str(tmp_path / "out"), overrides=codec)
    serve(fleet(config), config)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(state["memory.wire-residual"].any()) for state in states(tmp_path / "state"))
    for stop_at in (3, 5):
        out = tmp_path / f"out-{stop_at}"
        config = run_config(tmp_path / f"state-{stop_at}", out=str(out), overrides=codec)
        grid = fleet(config)
        pushes, push = 0, grid.push_messages

        def dies(messages: Any, push: Any = push, stop_at: int = stop_at) -> Any:
            nonlocal pushes
            pushes += 1
            ids = push(messages)
            if pushes == stop_at:
                raise KeyboardInterrupt
            return ids

        grid.push_messages = dies  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            serve(grid, config)
        assert serve(fleet(config), config).is_complete
        resumed = load_file(out / "model.safetensors")
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_ranges_stay_on_the_device_from_one_evaluation_to_the_next(tmp_path: Path) -> None:
    """Nothing of them is sent, and an interrupted run goes on with them."""
    kept = {"runtime.recalibrate": "tracked"}
    runs, seen = [], 0
    for name, stop_at in (("whole", 0), ("stopped", 6)):
        out, state = tmp_path / f"out-{name}", tmp_path / f"state-{name}"
        config = run_config(state, out=str(out), overrides=kept)
        grid = fleet(config)
        pushes, push, pull = 0, grid.push_messages, grid.pull_messages

        def push_some(messages: Any, push: Any = push, stop_at: int = stop_at) -> Any:
            nonlocal pushes
            pushes += 1
            ids = push(messages)  # evaluated and committed: the answers are lost
            if pushes == stop_at:
                raise KeyboardInterrupt
            return ids

        def pull_all(ids: Any, pull: Any = pull) -> Any:
            nonlocal seen
            found = list(pull(ids))
            for reply in found:
                if reply.metadata.message_type.startswith("evaluate"):
                    assert {*wire.metrics_of(reply)} == EVALUATED
                    assert not reply.content.array_records
                    seen += 1
            return found

        grid.push_messages, grid.pull_messages = push_some, pull_all  # type: ignore[method-assign]
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                serve(grid, config)
            grid = fleet(config)
        found = accuracies(serve(grid, config))
        tables = [s["memory.kept-ranges"].tolist() for s in states(state)]
        counts = [int(s["memory.kept-ranges-observed"]) for s in states(state)]
        runs.append((found, tables, counts))
    assert runs[0] == runs[1]
    assert seen >= 5 * 4
    assert 4 < sum(runs[0][2]) < 5 * 4  # less often than each of four devices was evaluated


def test_a_server_that_cannot_decode_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path / "state", overrides={"wire.codec": "int8"})
    model = build(scenario_of(config)).model()
    strategy = FedAvg(fraction_train=1.0, min_train_nodes=4, min_available_nodes=4)
    result = strategy.start(
        fleet(config),
        initial_arrays=wire.encode_params(model.layout, model.initial()),
        num_rounds=1,
    )
    assert not result.train_metrics_clientapp
    assert not states(tmp_path / "state")  # nobody has trained for nothing


def test_any_flower_strategy_runs_without_our_loop(tmp_path: Path) -> None:
    config = run_config(tmp_path / "state")
    scenario = scenario_of(config)
    model = build(scenario).model()
    strategy = FedAvg(fraction_train=1.0, min_train_nodes=4, min_available_nodes=4)
    result = strategy.start(
        fleet(config),
        initial_arrays=wire.encode_params(model.layout, model.initial()),
        num_rounds=scenario.num_rounds,
    )
    assert len(result.train_metrics_clientapp) == len(result.evaluate_metrics_clientapp) == 4
    params = wire.decode_params(model.layout, result.arrays)
    assert torch.isfinite(params).all()
    assert 0.1 < (params - model.initial()).norm() < 100  # local parameters, not deltas
    losses = [float(result.train_metrics_clientapp[r]["loss"]) for r in (1, 2, 3, 4)]  # type: ignore[arg-type]
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]
    assert [s["progress"].tolist() for s in states(tmp_path / "state")] == [[2, 1]] * 4


# -- one message at a time -------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Message]:
    """Return a function that sends one message to one device."""
    base = run_config(tmp_path / "state")

    def send(
        kind: str,
        *,
        config: dict[str, Any] | None = None,
        node: dict[str, Any] | None = None,
        instruction: dict[str, Any] | None = None,
    ) -> Message:
        compat.assume_identity(1)
        scenario = scenario_of(base)
        model = build(scenario).model()
        record = wire.instruction(digest=scenario.digest, server_round=1, position=0)
        for key, value in (instruction or {}).items():
            record[key] = value
        content = RecordDict(
            {"arrays": wire.encode_params(model.layout, model.initial()), "config": record}
        )
        message = Message(content, 1, kind)
        compat.set_message_id(message, "1")
        own = {"partition-id": 0} if node is None else node
        context = Context(1, 1, own, RecordDict(), base if config is None else config)
        return client_app()(message, context)

    return send


def test_hello_names_the_device(ask: Callable[..., Reply]) -> None:
    reply = ask("query.hello", node={"partition-id": 3})
    assert wire.metrics_of(reply) == {"device": 3}


def test_the_same_question_gets_the_same_answer(ask: Callable[..., Reply], tmp_path: Path) -> None:
    first = wire.arrays_of(ask("train"))
    state = states(tmp_path / "state")[0]
    again = wire.arrays_of(ask("train"))
    assert all(np.array_equal(first[name].numpy(), again[name].numpy()) for name in first)
    after = states(tmp_path / "state")[0]
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_delta_or_local_parameters(ask: Callable[..., Reply], tmp_path: Path) -> None:
    delta = wire.arrays_of(ask("train"))
    local = wire.arrays_of(ask("train", instruction={"edgelearn-wire": "local"}))
    model = build(scenario_of(run_config(tmp_path))).model()
    start = model.layout.views(model.initial())
    for name, value in local.items():
        moved = value.numpy() - start[name].numpy()
        np.testing.assert_allclose(moved, delta[name].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "names no scenario"),
        ({"config": {"scenario": "split-digits", "overrides": "{"}}, "overrides is not JSON"),
        ({"config": {"scenario": "split-digits", "overrides": "[1]"}}, "expected an object"),
        ({"config": {"scenario": "split-digits"}}, "device 0 has the scenario"),
        ({"node": {}}, "partition-id is missing"),
        ({"node": {"partition-id": "one"}}, "partition-id is 'one'"),
        ({"node": {"partition-id": 9}}, "there is no device 9"),
        ({"node": {"partition-id": 0, "state-dir": "here"}}, "an absolute path is expected"),
        ({"instruction": {"edgelearn-digest": "0"}}, "the server runs '0'"),
        ({"instruction": {"position": 2}}, "beyond the stream"),
        ({"instruction": {"position": "x"}}, "not a number"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    ask: Callable[..., Reply], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(edgelearn.EdgelearnError, match=message):
        ask("train", **changes)


def test_no_place_for_state(ask: Callable[..., Reply], tmp_path: Path) -> None:
    config = run_config(tmp_path)
    del config["state-dir"]
    with pytest.raises(RunError, match="nowhere to keep its state"):
        ask("train", config=config)


def test_a_foreign_exception_does_not_take_its_message_along(
    ask: Callable[..., Reply], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def leaks(*_args: object, **_kwargs: object) -> None:
        raise ValueError("pixels 3 1 4 1 5")

    monkeypatch.setattr("edgelearn.device.learner.Learner.fit", leaks)
    with pytest.raises(RunError, match=r"device 0: ValueError at test_client_app\.py") as caught:
        ask("train")
    assert "pixels" not in str(caught.value)
    assert not states(tmp_path / "state")


def test_a_new_run_begins_afresh_and_an_old_one_is_refused(
    ask: Callable[..., Reply], tmp_path: Path
) -> None:
    ask("train", instruction={"edgelearn-run": "20260102T000000-a"})
    ask("query.consolidate", instruction={"edgelearn-run": "20260102T000000-a"})
    assert states(tmp_path / "state")[0]["progress"].tolist() == [1, 1]
    ask("train", instruction={"edgelearn-run": "20260103T000000-b"})
    assert states(tmp_path / "state")[0]["progress"].tolist() == [1, 0]
    with pytest.raises(StateError, match="has moved on to the run 20260103T000000-b"):
        ask("train", instruction={"edgelearn-run": "20260102T000000-a"})


def test_the_module_imports_no_torch() -> None:
    code = "import sys, edgelearn.federated.client_app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
