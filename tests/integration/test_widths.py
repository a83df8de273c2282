"""Whole runs of fleets whose devices hold sub-models of different widths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgelearn.compress.submodel import Part
from edgelearn.device.learners import FleetLearners
from edgelearn.errors import RunError, ScenarioError
from edgelearn.federated.client_app import client_app
from edgelearn.federated.record import RunRecord
from edgelearn.federated.server_app import server_app
from edgelearn.fleet.grid import FleetGrid, app_executor
from edgelearn.fleet.plan import make_plan
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.fleet.workbench import SimulatedData
from edgelearn.params import Layout
from edgelearn.report import kinds as report
from edgelearn.report.page import render_page
from edgelearn.report.tables import summary_table
from edgelearn.scenario.kinds import Kind
from edgelearn.scenario.load import load
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_scenario

from flwr.app import Context, RecordDict  # isort: skip

PROFILE = """
memory_mib = 64
train_gflops = 1e-5
downlink_mbps = 1
uplink_mbps = 0.5
power_w = 2
radio_j_per_mb = 1
"""
METHODS: dict[str, dict[str, Any]] = {
    "naive": {},
    "replay": {"capacity": 4},
    "ewc": {"strength": 10.0},
}


@pytest.fixture
def mixed(tmp_path: Path) -> Callable[..., Scenario]:
    """Return a function that makes a fleet of which each second device holds half a model."""
    for name in ("large", "small"):
        (tmp_path / f"{name}.toml").write_text(PROFILE)
    large, small = str(tmp_path / "large.toml"), str(tmp_path / "small.toml")

    def make(width: float = 0.5, **tables: Any) -> Scenario:
        values = {
            "fleet": {"profiles": {large: 1.0, small: 1.0}, "width": {small: width}},
            "server": {"strategy": "HeteroFL"},
            "client": {"strategy": "replay", "args": {"capacity": 4}},
        }
        for name, table in tables.items():
            values[name] = {**values.get(name, {}), **table}
        return toy_scenario(**values)

    return make


def alike(**tables: Any) -> Scenario:
    """A fleet whose devices all hold half of the toy's network."""
    return toy_scenario(
        **{"fleet": {"width": {"phone-mid": 0.5}}, "server": {"strategy": "HeteroFL"}, **tables}
    )


def narrow(**tables: Any) -> Scenario:
    """A fleet with a network that is physically that narrow."""
    return toy_scenario(**{"model": {"name": "mlp", "args": {"hidden": [4]}}, **tables})


def widths_of(record: RunRecord) -> list[float]:
    return [record.run["kinds"][place]["width"] for place in record.run["kind_of"]]


def places(scenario: Scenario, width: float) -> tuple[Layout, Tensor]:
    learners = FleetLearners(build(scenario))
    whole = learners.whole.layout
    return whole, Part.of(whole, learners.of_kind(Kind("", width=width)).layout).places


def model_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


# -- a device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_device_does_what_one_with_a_narrow_network_does(method: str) -> None:
    client = {"client": {"strategy": method, "args": METHODS[method]}}
    worlds: list[World] = [build(alike(**client)), build(narrow(**client))]
    ours, theirs = (FleetLearners(world).of_device(0) for world in worlds)
    assert ours.declaration == theirs.declaration
    assert ours.memory_bytes == theirs.memory_bytes
    params = torch.randn(theirs.model.layout.size, generator=torch.Generator().manual_seed(0))
    states = [learner.initial_state(worlds[0].train) for learner in (ours, theirs)]
    for server_round, position in ((1, 0), (3, 1)):
        fits = [
            learner.fit(
                state, params, SimulatedData(world, 0), position=position, server_round=server_round
            )
            for learner, state, world in zip((ours, theirs), states, worlds, strict=True)
        ]
        states = [fit.state for fit in fits]
        updates = [
            learner.model.layout.flatten(fit.update.arrays)
            for learner, fit in zip((ours, theirs), fits, strict=True)
        ]
        assert updates[0].any()
        torch.testing.assert_close(*updates, rtol=0, atol=1e-6)
        assert fits[0].update.metrics == pytest.approx(fits[1].update.metrics, abs=1e-6)


def test_bytes_time_and_energy_are_those_of_a_narrow_network() -> None:
    ours, theirs = simulate(alike()), simulate(narrow(), federation="faithful")
    assert ours.end["bytes_up"] == theirs.end["bytes_up"]
    assert ours.end["bytes_down"] == theirs.end["bytes_down"]
    for mine, other in zip(ours.rounds, theirs.rounds, strict=True):
        assert mine["clock_s"] == other["clock_s"]
        assert mine["energy_j"] == other["energy_j"]
        assert mine["outcomes"]["ok"] + mine["outcomes"]["idle"] == 4
    (part,) = ours.run["kinds"]
    for key in ("num_parameters", "model_bytes", "memory_bytes_per_device"):
        assert part[key] == theirs.run[key]


def test_each_device_is_billed_for_what_it_holds(mixed: Callable[..., Scenario]) -> None:
    found, small, large = simulate(mixed()), simulate(alike()), simulate(toy_scenario())
    widths = widths_of(found)
    assert sorted(widths) == [0.5, 0.5, 1.0, 1.0]
    for device, width in enumerate(widths):
        expected = small if width == 0.5 else large
        assert found.end["bytes_up"][device] == expected.end["bytes_up"][device]
        assert found.end["bytes_down"][device] == expected.end["bytes_down"][device]


def test_a_budget_is_that_of_the_sub_model(mixed: Callable[..., Scenario], tmp_path: Path) -> None:
    wide = {"name": "mlp", "args": {"hidden": [64]}}
    (tmp_path / "small.toml").write_text(PROFILE.replace("64", "0.006"))
    assert simulate(mixed(width=0.1, model=wide)).is_complete
    with pytest.raises(ScenarioError, match=r"small has 0.006 MiB"):
        simulate(mixed(width=0.9, model=wide))


# -- the fleet -------------------------------------------------------------------------------------


def test_with_whole_models_it_is_fedavg_to_the_last_bit(
    mixed: Callable[..., Scenario], tmp_path: Path
) -> None:
    plain = mixed(width=1.0, server={"strategy": "FedAvg"})
    simulate(plain, out=tmp_path / "theirs", federation="faithful", engine="reference")
    simulate(mixed(width=1.0), out=tmp_path / "ours", engine="reference")
    assert same_bits(tmp_path / "ours", tmp_path / "theirs")


def test_what_nobody_holds_stays_as_it_is(tmp_path: Path) -> None:
    scenario = alike()
    simulate(scenario, out=tmp_path / "run")
    layout, held = places(scenario, 0.5)
    before = build(scenario).model().initial()
    after = layout.flatten(model_of(tmp_path / "run"))
    rest = torch.ones(layout.size, dtype=torch.bool)
    rest[held] = False
    assert rest.sum() == 172 - 88
    assert torch.equal(after[rest], before[rest])
    assert not torch.equal(after[held], before[held])


def test_what_only_some_hold_is_learned_by_these(
    mixed: Callable[..., Scenario], tmp_path: Path
) -> None:
    scenario = mixed()
    simulate(scenario, out=tmp_path / "run")
    layout, held = places(scenario, 0.5)
    after = layout.flatten(model_of(tmp_path / "run"))
    rest = torch.ones(layout.size, dtype=torch.bool)
    rest[held] = False
    assert not torch.equal(after[rest], build(scenario).model().initial()[rest])


def test_workers_and_interruptions_change_no_bit(
    mixed: Callable[..., Scenario], tmp_path: Path
) -> None:
    scenario = mixed(
        client={"strategy": "ewc+replay", "args": {"replay": {"capacity": 4}}},
        wire={"codec": "top-k", "args": {"share": 0.3}},
    )
    record = simulate(scenario, out=tmp_path / "one")
    assert record.run["engine"]["tier"] == "reference"
    pool = simulate(scenario, out=tmp_path / "pool", engine="pool", num_workers=2)
    assert same_bits(tmp_path / "one", tmp_path / "pool")
    assert pool.device_rows[-1] == record.device_rows[-1]

    class Stop(BaseException):
        pass

    def stop(progress: Any) -> None:
        if progress.server_round == 3:
            raise Stop

    with pytest.raises(Stop):
        simulate(scenario, out=tmp_path / "parts", on_round=stop, checkpoint_every_s=0)
    resume(tmp_path / "parts")
    assert same_bits(tmp_path / "one", tmp_path / "parts")


def test_the_apps_on_real_devices_end_where_the_simulator_does(
    mixed: Callable[..., Scenario], tmp_path: Path
) -> None:
    small = str(tmp_path / "small.toml")
    scenario = mixed(
        fleet={"runtime_args": {small: {"weight_bits": 3}}},
        wire={"codec": "random-k"},
        client={"strategy": "ewc", "args": {}},
        stream={"rounds_per_experience": 1},
    )
    simulated = simulate(scenario, out=tmp_path / "simulated", engine="reference")
    source = str(tmp_path / "simulated" / "scenario.toml")
    config = {
        "scenario": source,
        "state-dir": str(tmp_path / "state"),
        "out": str(tmp_path / "real"),
    }
    contexts = {
        device + 1: Context(1, device + 1, {"partition-id": device}, RecordDict(), config)
        for device in range(4)
    }
    grid = FleetGrid(app_executor(client_app(), contexts), num_devices=4)
    server_app()(grid, Context(1, 1, {}, RecordDict(), config))
    record = RunRecord.read(tmp_path / "real")
    assert load(source).digest == scenario.digest
    assert same_bits(tmp_path / "real", tmp_path / "simulated")
    assert record.end["bytes_up"] == simulated.end["bytes_up"]
    assert record.device_rows == simulated.device_rows
    stored = [load_file(path) for path in sorted((tmp_path / "state").glob("*/state.safetensors"))]
    held = [len(state["memory.anchor"]) for state in stored]
    assert held == [172 if width == 1 else 88 for width in widths_of(record)]


def test_the_record_and_the_report_tell_widths_apart(mixed: Callable[..., Scenario]) -> None:
    record = simulate(mixed())
    wide, small = report.by_kind(record)
    assert (wide.width, wide.num_devices, wide.num_parameters) == (1.0, 2, 172)
    assert (small.width, small.num_devices, small.num_parameters) == (0.5, 2, 88)
    assert small.model_bytes < wide.model_bytes
    assert small.up < wide.up
    line = record.device_rows[-1]
    rows = [k for k, device in enumerate(line["devices"]) if widths_of(record)[device] == 0.5]
    correct, count = (sum(sum(line[name][k]) for k in rows) for name in ("served", "count"))
    assert small.served == correct / count
    assert "small (width 0.5): 2 devices" in str(summary_table(record).caption)
    assert "By kind of device" in render_page(record, {})
    plain = simulate(toy_scenario())
    assert report.by_kind(plain) == ()
    assert report.section(plain) == ""


# -- bits ------------------------------------------------------------------------------------------


def test_a_kind_of_device_may_serve_with_fewer_bits(
    mixed: Callable[..., Scenario], tmp_path: Path
) -> None:
    small = str(tmp_path / "small.toml")

    def run(bits: int, fleet: dict[str, Any]) -> RunRecord:
        runtime = {"args": {"weight_bits": bits}}
        return simulate(
            mixed(width=1.0, server={"strategy": "FedAvg"}, runtime=runtime, fleet=fleet)
        )

    both = run(8, {"runtime_args": {small: {"weight_bits": 2}}})
    assert both.run["engine"]["federation"] == "fused"
    coarse, fine = run(2, {}), run(8, {})
    rows = [record.device_rows[-1] for record in (both, coarse, fine)]
    assert rows[1]["served"] != rows[2]["served"]
    for device, kind in enumerate(both.run["kind_of"]):
        expected = {8: rows[2], 2: rows[1]}[both.run["kinds"][kind]["runtime_args"]["weight_bits"]]
        assert rows[0]["devices"][device] == device
        for name in ("count", "served", "float"):
            assert rows[0][name][device] == expected[name][device]
    first, last = report.by_kind(both)
    assert (first.title, last.title) == ("large (weight_bits 8)", "small (weight_bits 2)")
    assert last.model_bytes == coarse.run["model_bytes"]["served"]
    assert first.model_bytes == fine.run["model_bytes"]["served"]


def test_arguments_that_a_runtime_does_not_take(tmp_path: Path) -> None:
    wrong = {"phone-mid": {"weight_bits": 9}}
    told = r"\[fleet.runtime_args\] phone-mid: weight_bits is 9; allowed: 2 to 8"
    with pytest.raises(ScenarioError, match=told):
        simulate(toy_scenario(fleet={"runtime_args": wrong}))
    wrong = {"phone-mid": {"bits": 4}}
    with pytest.raises(ScenarioError, match=r"\[fleet.runtime_args\] phone-mid: bits: Int8Runtime"):
        simulate(toy_scenario(fleet={"runtime_args": wrong}))
    both = {"fleet": {"runtime_args": wrong}, "runtime": {"args": {"bats": 4}}}
    with pytest.raises(ScenarioError, match=r"\[runtime.args\] bats: Int8Runtime"):
        simulate(toy_scenario(**both))
    with pytest.raises(ScenarioError, match="expected a table, got 4"):
        toy_scenario(fleet={"runtime_args": {"phone-mid": 4}})
    with pytest.raises(ScenarioError, match="no profile of the fleet"):
        toy_scenario(fleet={"runtime_args": {"hub": {"weight_bits": 4}}})


# -- what does not go ------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["batched", "native", "ray"])
def test_engines_that_stack_devices_say_why_not(
    mixed: Callable[..., Scenario], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tier in ("native", "ray"):
        monkeypatch.setattr(f"edgelearn.fleet.{tier}.is_installed", lambda: True)
    world = build(mixed())
    with pytest.raises(RunError, match="devices hold sub-models of different widths"):
        make_plan(world, FleetLearners(world).whole, engine=engine)


def test_a_strategy_that_takes_whole_models_is_refused(mixed: Callable[..., Scenario]) -> None:
    with pytest.raises(ScenarioError, match=r"FedAvg aggregates whole models.*HeteroFL"):
        simulate(mixed(server={"strategy": "FedAvg"}))
    with pytest.raises(RunError, match="fused federation needs a server strategy that only"):
        simulate(mixed(), federation="fused")


def test_what_is_shared_beside_the_network_is_refused(mixed: Callable[..., Scenario]) -> None:
    with pytest.raises(ScenarioError, match="'scaffold' shares tensors beside the network"):
        simulate(mixed(client={"strategy": "scaffold", "args": {}}))


def normed(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a network that has no sub-models."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def test_a_network_that_is_no_stack_is_refused(mixed: Callable[..., Scenario]) -> None:
    model = {"name": f"{__file__}:normed", "args": {}}
    with pytest.raises(ScenarioError, match=r"BatchNorm1d is neither .*\(layer '2'\)"):
        simulate(mixed(model=model))
    simulate(mixed(width=1.0, model=model))


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"phone-mid": 0}, "got 0; a number above 0 and at most 1"),
        ({"phone-mid": 1.5}, "got 1.5; a number above 0 and at most 1"),
        ({"phone-mid": True}, "got True; a number above 0 and at most 1"),
        ({"phone-mit": 0.5}, r"no profile of the fleet \(did you mean 'phone-mid'\?\)"),
    ],
)
def test_a_width_that_is_none(width: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        toy_scenario(fleet={"width": width}, server={"strategy": "HeteroFL"})


def test_a_server_without_our_loop_is_refused(tmp_path: Path) -> None:
    scenario = {"scenario": "split-digits", "state-dir": str(tmp_path / "state")}
    overrides = {
        "data.max_train": 100, "fleet.num_devices": 1, "fleet.cohort": 1,
        "fleet.width": {"phone-mid": 0.5}, "server.strategy": "HeteroFL",
    }  # fmt: skip
    config = {**scenario, "overrides": json.dumps(overrides)}
    context = {1: Context(1, 1, {"partition-id": 0}, RecordDict(), config)}
    grid = FleetGrid(app_executor(client_app(), context), num_devices=1)
    world = build(load("split-digits", overrides))
    from edgelearn.federated.heterofl import HeteroFL
    from edgelearn.federated.messages import encode_params

    from flwr.app import ConfigRecord  # isort: skip

    model = world.model()
    strategy = HeteroFL(min_train_nodes=1, min_available_nodes=1)
    arrays = encode_params(model.layout, model.initial())
    (question,) = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    (reply,) = grid.send_and_receive([question])
    assert "sub-model of width 0.5" in reply.error.reason
