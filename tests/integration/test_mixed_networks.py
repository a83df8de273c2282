"""Fleets whose devices hold different networks: whole runs, and what leaves a device in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file
from torch import Tensor

import edgelearn
from edgelearn.continual.memory import Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Update
from edgelearn.device.fleet_store import RecordFile
from edgelearn.device.learners import FleetLearners
from edgelearn.device.profile import assign
from edgelearn.device.resident import ResidentDevice
from edgelearn.device.state import OWN
from edgelearn.device.store import DeviceStore
from edgelearn.errors import RunError, ScenarioError
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.plan import make_plan
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.fleet.workbench import SimulatedData
from edgelearn.report.kinds import by_kind, section
from edgelearn.runtime.protocol import make_runtime
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_scenario

N, C = 12, 4
VARIANTS = {"small": {"name": "mlp", "args": {"hidden": [3]}, "share": 0.5}}
SIZES = {"": 16 * 8 + 8 + 8 * 4 + 4, "small": 16 * 3 + 3 + 3 * 4 + 4}
DIFFERS = {"wall_s", "cpu_s", "engine", "updates_per_s"}


def mixed(**tables: Any) -> Scenario:
    """Return the toy with two networks."""
    return toy_scenario(
        **{
            "data": {"public": N},
            "model": {"variants": VARIANTS},
            "client": {"strategy": "fedmd", "args": {"digest_epochs": 2}},
            **tables,
        }
    )


def held_by(world: World) -> list[str]:
    """Return which network each device has."""
    kinds = world.kinds
    return [kinds.of_device(device).variant for device in range(world.scenario.fleet.num_devices)]


def networks_of(directory: Path, world: World) -> dict[int, Tensor]:
    """Return the network that each device has stored, by device, from the fleet's file."""
    learners, found, count = FleetLearners(world), {}, world.scenario.fleet.num_devices
    index = load_file(next((directory / "checkpoint").glob("*.safetensors")))
    for device in range(count):
        layout = learners.record(world.kinds.of_device(device))
        file = RecordFile(directory / "devices.bin", layout, count)
        found[device] = file.read(device, int(index["fleet.live"][device]), world.train)[OWN]
    return found


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in DIFFERS} for line in found]


def test_the_consensus_is_the_weighted_mean_of_what_all_networks_answer(tmp_path: Path) -> None:
    stream = {"num_experiences": 1, "rounds_per_experience": 1, "kind": "new-instances"}
    scenario = mixed(stream=stream, partition={"kind": "dirichlet", "alpha": 0.5})
    simulate(scenario, out=tmp_path, checkpoint_every_s=0)
    world = build(scenario)
    networks = networks_of(tmp_path, world)
    sizes = [len(world.train_parts[d]) for d in range(4)]
    assert len(set(sizes)) > 1
    x, expected = world.train.batch(world.public).x, torch.zeros(N, C)
    for device, own in networks.items():
        held = held_by(world)[device]
        assert len(own) == SIZES[held]
        with torch.no_grad():
            expected += sizes[device] / sum(sizes) * world.model(held)(own, x)
    model = load_file(tmp_path / "model.safetensors")
    assert set(model) == {"shared/logits"}
    torch.testing.assert_close(model["shared/logits"], expected, rtol=1e-5, atol=1e-5)


def test_the_record_tells_networks_apart_and_books_what_is_sent(tmp_path: Path) -> None:
    scenario = mixed()
    record = simulate(scenario, out=tmp_path)
    world, kinds = build(scenario), {kind["variant"]: kind for kind in record.run["kinds"]}
    assert {name: kind["num_parameters"] for name, kind in kinds.items()} == SIZES
    told = [record.run["kinds"][place]["variant"] for place in record.run["kind_of"]]
    assert told == held_by(world)
    beside = N * (4 + 17) + 1 + 8
    for name, size in SIZES.items():
        assert kinds[name]["memory_bytes_per_device"] == 4 * size + beside
        assert kinds[name]["model_bytes"]["served"] < kinds[name]["model_bytes"]["float"]
    assert record.run["memory_bytes_per_device"] == 4 * SIZES[""] + beside
    rounds, sent = scenario.num_rounds, 4 * N * C
    for total in record.end["bytes_up"]:
        assert rounds * sent < total < rounds * (sent + 400), "logits, and what tells about them"
    assert len(set(record.end["bytes_up"])) == 1, "as many for a small network as for a large one"
    large, small = by_kind(record)
    assert (large.title, small.title) == ("phone-mid", "phone-mid (network small)")
    assert (large.num_devices, small.num_devices) == (2, 2)
    assert (large.num_parameters, small.num_parameters) == (SIZES[""], SIZES["small"])
    assert "phone-mid (network small)" in section(record)


def test_where_all_hold_a_variant_it_is_what_the_record_speaks_of() -> None:
    small = {**VARIANTS["small"], "share": 1.0}
    record = simulate(mixed(model={"variants": {"small": small}}))
    assert record.run["num_parameters"] == SIZES["small"]
    assert [kind.title for kind in by_kind(record)] == ["phone-mid (network small)"]


def test_a_kind_has_a_network_and_a_runtime() -> None:
    """Variants by share, bits by profile: up to four kinds, each served as it says."""
    fleet = {
        "num_devices": 8,
        "cohort": 4,
        "profiles": {"phone-mid": 1.0, "sensor-hub": 1.0},
        "runtime_args": {"sensor-hub": {"weight_bits": 4}},
    }
    scenario = mixed(fleet=fleet)
    world, record = build(scenario), simulate(scenario)
    profiles = assign(fleet["profiles"], 8, scenario.seed)
    found = [record.run["kinds"][place] for place in record.run["kind_of"]]
    assert [kind["variant"] for kind in found] == held_by(world)
    assert [kind["name"] for kind in found] == [profile.name for profile in profiles]
    served = {(k["name"], k["variant"]): k["model_bytes"]["served"] for k in record.run["kinds"]}
    assert len(served) == 4
    for held in SIZES:
        assert served["sensor-hub", held] < served["phone-mid", held]


@pytest.mark.parametrize("federation", ["faithful", "fused"])
def test_any_number_of_workers_and_a_crash_change_no_bit(tmp_path: Path, federation: str) -> None:
    scenario = mixed()
    simulate(scenario, out=tmp_path / "one", engine="reference", federation=federation)
    one = (tmp_path / "one" / "model.safetensors").read_bytes(), lines(tmp_path / "one")
    assert load_file(tmp_path / "one" / "model.safetensors")["shared/logits"].any()

    class Stop(BaseException):
        """Stands for the death of the process."""

    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 3:
            raise Stop

    parts = tmp_path / "parts"
    with pytest.raises(Stop):
        simulate(
            scenario,
            out=parts,
            on_round=stop,
            checkpoint_every_s=0,
            engine="reference",
            federation=federation,
        )
    resume(parts)
    assert ((parts / "model.safetensors").read_bytes(), lines(parts)) == one
    if federation == "faithful":
        return
    simulate(scenario, out=tmp_path / "two", engine="pool", num_workers=2)
    assert ((tmp_path / "two" / "model.safetensors").read_bytes(), lines(tmp_path / "two")) == one


def test_fused_equals_faithful(tmp_path: Path) -> None:
    scenario = mixed(fleet={"cohort": 3}, wire={"codec": "int8"})
    for mode in ("faithful", "fused"):
        record = simulate(scenario, out=tmp_path / mode, federation=mode)
        assert record.run["engine"]["federation"] == mode
    found = [load_file(tmp_path / m / "model.safetensors") for m in ("fused", "faithful")]
    largest = float(found[0]["shared/logits"].abs().max())
    torch.testing.assert_close(*found, rtol=0, atol=largest / 127)
    one, other = (lines(tmp_path / m)[-1]["bytes_up"] for m in ("fused", "faithful"))
    assert one == other


def test_only_engines_that_go_device_by_device_run_it() -> None:
    world = build(mixed())
    learner = FleetLearners(world).whole
    assert make_plan(world, learner).tier in ("reference", "pool")
    for tier in ("native", "batched"):
        with pytest.raises(RunError, match=r"FedMD keeps the network|computes what|not installed"):
            make_plan(world, learner, engine=tier)


class KeepsAndDeclares(ClientStrategy):
    """Keeps the network, and has no hook of its own."""

    keeps_network = True

    def shares(self, model: Any, facts: Any) -> dict[str, TensorSpec]:
        return {"logits": TensorSpec((2,))}


def test_a_strategy_without_hooks_does_not_slip_through() -> None:
    world = build(mixed(client={"strategy": f"{__file__}:KeepsAndDeclares", "args": {}}))
    learner = FleetLearners(world).whole
    assert learner.strategy.is_declared
    assert make_plan(world, learner).tier in ("reference", "pool")


def test_each_device_is_measured_with_its_own_network(tmp_path: Path) -> None:
    """What the record counts is what the stored networks answer, rounded to int8 or not."""
    scenario = mixed()
    record = simulate(scenario, out=tmp_path, checkpoint_every_s=0)
    world, last = build(scenario), record.device_rows[-1]
    hits = {}
    for device, own in networks_of(tmp_path, world).items():
        model, tests = world.model(held_by(world)[device]), []
        for experience in range(2):
            batch = world.test_samples(device, experience).batch()
            with torch.no_grad():
                tests.append(int((model(own, batch.x).argmax(1) == batch.y).sum()))
        hits[device] = tests
    assert last["float"] == [hits[device] for device in last["devices"]]
    served, count = np.array(last["served"]), np.array(last["count"])
    assert (np.abs(served - np.array(last["float"])) <= 0.2 * count + 1).all()
    assert len({str(found) for found in hits.values()}) > 1


# -- what may not happen ---------------------------------------------------------------------------


def test_strategies_that_average_networks_are_refused() -> None:
    scenario = mixed(client={"strategy": "ewc", "args": {}})
    with pytest.raises(ScenarioError, match="can't average them, as 'ewc' does"):
        simulate(scenario)


def test_widths_are_of_the_one_network_that_all_have() -> None:
    with pytest.raises(ScenarioError, match=r"width: .*model\.variants.*a variant that is"):
        mixed(fleet={"width": {"phone-mid": 0.5}})
    with pytest.raises(ScenarioError, match="shares tensors beside the network"):
        simulate(mixed(model={}, fleet={"width": {"phone-mid": 0.5}}))
    simulate(mixed(fleet={"width": {"phone-mid": 1.0}}, stream={"rounds_per_experience": 1}))


def test_there_have_to_be_public_samples() -> None:
    with pytest.raises(ScenarioError, match="public"):
        simulate(mixed(data={"public": 0}))


def test_what_is_shared_has_to_have_the_same_shape_everywhere() -> None:
    scenario = mixed(client={"strategy": "fedmd+scaffold", "args": {}})
    with pytest.raises(ScenarioError, match=r"model\.variants\.small.*other shapes"):
        simulate(scenario)


def test_a_step_of_the_server_on_logits_is_refused() -> None:
    with pytest.raises(ScenarioError, match="FedAdam makes steps of its own"):
        simulate(mixed(server={"strategy": "FedAdam"}))


def test_memory_is_checked_against_the_device_that_holds_the_network(tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.toml"
    tiny.write_text(
        "memory_mib = 0.01\ntrain_gflops = 1\ndownlink_mbps = 1\nuplink_mbps = 1\npower_w = 1\n"
        "radio_j_per_mb = 1\n"
    )
    large = {"name": "mlp", "args": {"hidden": [64]}, "profile": "phone-mid"}
    fleet = {"profiles": {str(tiny): 1.0, "phone-mid": 1.0}}
    simulate(mixed(model={"variants": {"large": large}}, fleet=fleet))
    large["profile"] = str(tiny)
    with pytest.raises(ScenarioError, match=r"tiny has 0\.01 MiB"):
        simulate(mixed(model={"variants": {"large": large}}, fleet=fleet))


# -- what leaves a device --------------------------------------------------------------------------


class Listener(FedAvg):
    """FedAvg that writes down the names, shapes and bytes of all that reaches the server."""

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
        kept = list(replies)
        with Path(os.environ["EDGELEARN_TEST_LISTEN"]).open("ab") as file:
            for reply in kept:
                for record in reply.content.values():
                    for name, value in record.items():
                        shape = list(getattr(value, "shape", ()))
                        file.write(json.dumps([name, shape]).encode() + b"\n")
                        file.write(getattr(value, "data", b"").hex().encode() + b"\n")
        return super().aggregate_train(server_round, kept)


def heard(path: Path) -> tuple[set[tuple[str, tuple[int, ...]]], bytes]:
    names, data = set(), b""
    rows = path.read_text().split("\n")
    for head, body in zip(rows[::2], rows[1::2], strict=False):
        if head:
            name, shape = json.loads(head)
            names.add((name, tuple(shape)))
            data += bytes.fromhex(body)
    return names, data


@pytest.fixture
def overheard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "overheard"
    monkeypatch.setenv("EDGELEARN_TEST_LISTEN", str(path))
    return path


def test_nothing_but_logits_leaves_a_device(tmp_path: Path, overheard: Path) -> None:
    scenario = mixed(server={"strategy": f"{__file__}:Listener"})
    out = tmp_path / "run"
    record = simulate(scenario, out=out, federation="faithful", checkpoint_every_s=0)
    assert all(line["outcomes"]["ok"] == 4 for line in record.rounds)
    names, data = heard(overheard)
    metrics = {("num-examples", ()), ("loss", ()), ("num-steps", ())}
    assert names == {("shared/logits", (N, C)), *metrics}
    assert len(data) >= 4 * 4 * N * C
    world = build(scenario)
    for own in networks_of(out, world).values():
        raw = own.numpy().tobytes()  # a network that answers everything alike shows its last bias
        assert not any(raw[i : i + 20] in data for i in range(0, len(raw) - 20, 4))
    pixels = world.train.x.flatten(1)
    for row in torch.cat([torch.from_numpy(part) for part in world.train_parts]).tolist():
        assert pixels[row].numpy().tobytes() not in data
        assert world.train.batch(torch.tensor([row])).x.numpy().tobytes()[:16] not in data


class SendsNetwork(ClientStrategy):
    """Shares logits, and tries to send its network too."""

    keeps_network = True

    def shares(self, model: Any, facts: Any) -> dict[str, TensorSpec]:
        return {"logits": TensorSpec((facts.num_public, facts.num_classes))}

    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        return Update({**update.arrays, "1.weight": torch.zeros(8, 16)}, update.metrics)


class SendsMoreLogits(SendsNetwork):
    """Sends answers to samples of its own behind those to public ones."""

    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        logits = update.arrays["shared/logits"]
        return Update({"shared/logits": torch.cat([logits, logits[:1]])}, update.metrics)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SendsNetwork", "a tensor that is not declared"),
        ("SendsMoreLogits", r"'shared/logits' is not \(12, 4\)"),
    ],
)
def test_the_guard_admits_the_logits_alone(name: str, message: str) -> None:
    scenario = mixed(client={"strategy": f"{__file__}:{name}", "args": {}})
    with pytest.raises(RunError, match=f"EgressError: not sent: .*{message}"):
        simulate(scenario)


def test_a_real_device_learns_as_a_simulated_one(tmp_path: Path) -> None:
    """It stores public samples itself, and still has them when its own are forgotten."""
    world = build(mixed(client={"strategy": "fedmd+replay", "args": {"replay": {"capacity": 4}}}))
    device = held_by(world).index("small")
    learner = FleetLearners(world).of_device(device)
    store = DeviceStore(tmp_path, digest="toy")
    resident = ResidentDevice(world, learner, make_runtime("int8", {}), store, device=device)
    data, state = SimulatedData(world, device), learner.initial_state(world.train, world.public)
    params = learner.initial()
    for server_round, position in enumerate((0, 0, 1, 1), 1):
        update, stored = resident.fit(params, position=position, server_round=server_round)
        resident.commit(stored)
        fit = learner.fit(state, params, data, position=position, server_round=server_round)
        state = fit.state
        ours = learner.layout.flatten(update.arrays)
        assert torch.equal(ours, learner.layout.flatten(fit.update.arrays))
        params = params + 0.5 * ours
        if server_round % 2 == 0:
            _, stored = resident.consolidate(params, position=position)
            resident.commit(stored)
            state = learner.consolidate(state, params, data, upto=position + 1)
            replayed = int((state.memory["replay.buffer"] >= 0).sum())
            assert int(stored.samples.used.sum()) == N + replayed
    counts, _ = resident.evaluate(params, position=1)
    assert sum(counts.count) == world.num_test_samples(device)
    assert counts.model_bytes < 4 * SIZES["small"] + 4 * 100


# -- what it is for --------------------------------------------------------------------------------


def accuracy_of(record: RunRecord, world: World, held: str) -> float:
    rows = [d for d, name in enumerate(held_by(world)) if name == held]
    last = record.device_rows[-1]
    return float(np.array(last["served"])[rows].sum() / np.array(last["count"])[rows].sum())


def test_small_networks_gain_from_large_ones() -> None:
    """One seed, a direction: eight devices with 32 digits each, 200 public ones without labels."""
    found = {}
    for epochs in (0, 20):
        scenario = edgelearn.load(
            "mixed-digits",
            seed=1,
            data={"max_train": 460},
            model={"args": {"hidden": [64]}},
            fleet={"num_devices": 8, "cohort": 8},
            stream={"rounds_per_experience": 4},
            client={
                "args": {
                    "loss": "kl",
                    "digest_lr": 0.003,
                    "digest_epochs": epochs,
                    "transfer_epochs": 0,
                }
            },
            evaluate={"every_rounds": 4},
        )
        found[epochs] = accuracy_of(simulate(scenario), build(scenario), "small")
    assert found[20] > found[0] + 0.05, found
