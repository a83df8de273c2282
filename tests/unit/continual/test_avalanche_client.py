"""Avalanche's strategies on devices: each of them, against Avalanche itself, and what it keeps.

All that imports Avalanche for this is in one file, since the import takes 0.8 GiB.
"""

from __future__ import annotations

import math
import re
import sys
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import edgelearn
from edgelearn.continual import avalanche
from edgelearn.continual.avalanche_client import AvalancheStrategy, _State
from edgelearn.continual.avalanche_session import Session, at_work
from edgelearn.continual.combined import Combined
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Memory, TensorSpec
from edgelearn.continual.naive import Naive
from edgelearn.continual.strategy import ClientStrategy, Facts, make_strategy
from edgelearn.device.learner import Learner
from edgelearn.device.state import DeviceState
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.errors import ExtraMissingError, PluginError, ScenarioError, StrategyError
from edgelearn.federated import egress
from edgelearn.params import FlatModel
from edgelearn.scenario import avalanche_names
from edgelearn.scenario.benchmark import from_benchmark
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.load import load
from edgelearn.scenario.samples import OwnedSamples, Samples, SharedSamples
from edgelearn.scenario.world import build
from edgelearn.seeds import derive, permutation, split, torch_generator
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import (
    ENCODING,
    ToyDevice,
    toy_devices,
    toy_images,
    toy_learner,
    toy_model,
    toy_samples,
    toy_scenario,
)

# What a strategy needs to be built, small enough for the toy's ten samples an experience.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AGEM": {"patterns_per_exp": 4, "sample_size": 4},
    "AGEMPlugin": {"patterns_per_experience": 4, "sample_size": 4},
    "CWRStar": {"cwr_layer_name": "3"},
    "Cumulative": {"state_kib": 64},
    "DER": {"mem_size": 8, "batch_size_mem": 2},
    "ER_ACE": {"mem_size": 8, "batch_size_mem": 2},
    "EWC": {"ewc_lambda": 1.0},
    "EWCPlugin": {"ewc_lambda": 1.0},
    "GDumb": {"mem_size": 8},
    "GDumbPlugin": {"mem_size": 8},
    "GEM": {"patterns_per_exp": 4, "memory_strength": 0.5},
    "GEMPlugin": {"patterns_per_experience": 4, "memory_strength": 0.5},
    "LFL": {"lambda_e": 0.1},
    "LFLPlugin": {"lambda_e": 0.1},
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "LwFPlugin": {"alpha": 1.0, "temperature": 2.0},
    "MER": {"mem_size": 8, "batch_size_mem": 2, "n_inner_steps": 2},
    "MIR": {"mem_size": 8, "subsample": 8, "batch_size_mem": 2},
    "MIRPlugin": {"mem_size": 8, "subsample": 8, "batch_size_mem": 2},
    "RARPlugin": {"mem_size": 8, "batch_size_mem": 4},
    "RWalkPlugin": {"delta_t": 1},
    "Replay": {"mem_size": 8},
    "ReplayPlugin": {"mem_size": 8},
}
NEEDS_A_NETWORK = {"LFL", "LFLPlugin"}
# Plug-ins that a strategy of their own runs with, and nothing else: they learn by the same bits.
TWINS = {
    "AGEMPlugin": "AGEM",
    "CWRStarPlugin": "CWRStar",
    "EWCPlugin": "EWC",
    "FromScratchTrainingPlugin": "FromScratchTraining",
    "GDumbPlugin": "GDumb",
    "GEMPlugin": "GEM",
    "LwFPlugin": "LwF",
    "MASPlugin": "MAS",
    "MIRPlugin": "MIR",
    "ReplayPlugin": "Replay",
}
CHECKED = [n for n in avalanche_names.WORKS if n not in NEEDS_A_NETWORK and n not in TWINS]


def strategy(name: str, **more: Any) -> AvalancheStrategy:
    made = make_strategy(f"avalanche:{name}", {**ARGUMENTS.get(name, {}), **more})
    assert isinstance(made, AvalancheStrategy)
    return made


# -- every name ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_what_is_said_to_work_keeps_the_contract(name: str) -> None:
    findings = check_strategy(lambda: strategy(name))
    assert [f for f in findings if f.passed is not True and f.check != "stacked"][1:] == []
    assert [f.message for f in findings if f.passed is False] == []


@pytest.mark.parametrize("name", TWINS)
def test_a_plugin_learns_as_its_strategy_does(name: str) -> None:
    one, other = (learned_by(n, ARGUMENTS.get(n, {}))[0] for n in (name, TWINS[name]))
    assert torch.equal(one, other)


def learned_by(name: str, arguments: dict[str, Any]) -> tuple[Tensor, Learner, DeviceState]:
    made = make_strategy(f"avalanche:{name}", arguments)
    learner, device = toy_learner(made, epochs=1), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in range(3):
        for server_round in (1, 2):
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state, params = fit.state, moved(learner, params, fit.update.arrays)
        state = learner.consolidate(state, params, device, upto=position + 1)
    return params, learner, state


@pytest.mark.parametrize("name", [n for n in CHECKED if n not in ("Naive", "FromScratchTraining")])
def test_what_is_said_to_work_does_something(name: str) -> None:
    naive, *_ = learned_by("Naive", {})
    params, *_ = learned_by(name, ARGUMENTS.get(name, {}))
    assert float((params - naive).abs().max()) > 1e-4


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("name", ["SynapticIntelligence", "SynapticIntelligencePlugin"])
def test_synaptic_intelligence_is_refused_since_it_does_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avalanche_names, "WORKS", {**avalanche_names.WORKS, name: ""})
    params, learner, state = learned_by(name, {"si_lambda": 1e6})
    plugin = plugin_of(learner, state.memory, three_experiences(), "SynapticIntelligencePlugin")
    assert not any(importance.data.any() for importance in plugin.ewc_data[1].values())
    assert torch.equal(params, learned_by("Naive", {})[0])


def test_the_lists_are_in_step_with_the_package() -> None:
    listed = [*avalanche_names.WORKS, *avalanche_names.FAILS]
    assert len(set(listed)) == len(listed)
    assert set(listed) == set(avalanche.offered())


@pytest.mark.parametrize("name", avalanche_names.FAILS)
def test_what_does_not_work_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ScenarioError, match="does not work on a device") as caught:
        strategy(name)
    assert avalanche_names.FAILS[name] in str(caught.value)


# Arguments, and how it fails. The rest would need what a scenario can't give, or a download.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "AETraining": ({}, "device"),
    "BiC": ({}, "'dataset' of 'DatasetExperience' object has no setter"),
    "BiCPlugin": ({}, "'dataset' of 'DatasetExperience' object has no setter"),
    "CoPE": ({"mem_size": 8, "n_classes": 4}, "changed the shape of 3.weight"),
    "CoPEPlugin": ({"mem_size": 8, "n_classes": 4}, "changed the shape of 3.weight"),
    "CurrentDataFeCAMUpdate": ({}, "_check_has_fecam"),
    "CurrentDataNCMUpdate": ({}, "_check_has_ncm"),
    "ExpertGateStrategy": ({}, "requires an ExpertGate model"),
    "FeCAMOracle": ({}, "_check_has_fecam"),
    "FeatureDistillationPlugin": ({}, "must be Tensor, not NoneType"),
    "GSS_greedy": ({"input_size": [1, 4, 4]}, "empty sequence"),
    "GSS_greedyPlugin": ({"input_size": [1, 4, 4]}, "empty sequence"),
    "GenerativeReplay": ({"state_kib": 10_000}, "shape"),
    "GenerativeReplayPlugin": ({}, "no attribute 'generate'"),
    "JointTraining": ({}, "list index out of range"),
    "MemoryFeCAMUpdate": ({}, "_check_has_fecam"),
    "MemoryNCMUpdate": ({}, "_check_has_ncm"),
    "NCMOracle": ({}, "_check_has_ncm"),
    "PNNStrategy": ({}, "requires a PNN model"),
    "PackNet": ({"post_prune_epochs": 1, "prune_proportion": 0.5}, "implements PackNetModule"),
    "SCR": ({}, "instance of avalanche.models.SCRModel"),
    "VAETraining": ({}, "targets of dimension: 2"),
}


@pytest.mark.filterwarnings("ignore:This strategy is currently in the alpha stage:UserWarning")
@pytest.mark.filterwarnings("ignore:When instantiating a strategy, please pass a non-None device")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_does_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it shows when a later Avalanche has mended it."""
    arguments, how = REFUSED[name]
    assert name in avalanche_names.FAILS
    monkeypatch.setattr(avalanche_names, "WORKS", {name: ""})
    assert how in outcome_of(name, arguments)


def outcome_of(name: str, arguments: dict[str, Any]) -> str:
    try:
        learner = toy_learner(make_strategy(f"avalanche:{name}", arguments))
        device, params = toy_devices()[0], learner.model.initial()
        state = learner.initial_state(device.store)
        for position in range(2):
            fit = learner.fit(state, params, device, position=position, server_round=1)
            state = learner.consolidate(fit.state, params, device, upto=position + 1)
    except Exception as error:  # whatever Avalanche raises
        return f"{traceback.extract_tb(error.__traceback__)[-1].name}: {error}"
    return "works"


class _WithFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), nn.Linear(8, 4)

    def get_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.get_features(x)))
        return out


@pytest.mark.parametrize("name", sorted(NEEDS_A_NETWORK))
def test_a_network_may_have_more_than_forward(name: str) -> None:
    torch.manual_seed(0)
    base = avalanche.library().models.BaseModel
    network = type("WithFeatures", (_WithFeatures, base), {})()
    learner = replace(toy_learner(strategy(name)), model=FlatModel(network))
    device = toy_devices()[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    losses = []
    for position in (0, 1):
        for server_round in (1, 2):
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state, params = fit.state, moved(learner, params, fit.update.arrays)
            losses.append(fit.update.metrics["loss"])
        state = learner.consolidate(state, params, device, upto=position + 1)
    assert losses[1] < losses[0]
    assert math.isfinite(losses[-1])


# -- references and arguments ----------------------------------------------------------------------


def faults(name: str, **arguments: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        make_strategy(f"avalanche:{name}", arguments)
    return str(caught.value)


def test_an_unknown_name_is_told_the_nearest() -> None:
    assert "has no strategy or plug-in 'EWCC' (did you mean 'EWC'?)" in faults("EWCC")


def test_arguments_are_checked_by_name() -> None:
    found = faults("EWC", ewc_lamda=1.0, train_epochs=3)
    assert "[client.args] ewc_lamda: EWC does not take it (did you mean 'ewc_lambda'?)" in found
    assert "[client.args] train_epochs: is given by client.epochs" in found
    assert "[client.args] ewc_lambda: is missing; EWC needs it" in found
    assert "state_kib: is -1" in faults("Naive", state_kib=-1)
    assert "state_kib: is 'much'" in faults("Naive", state_kib="much")


def test_what_the_class_itself_refuses_is_a_fault() -> None:
    found = faults("EWC", ewc_lambda=1.0, mode="online")
    assert "You need to set `decay_factor` to use the `online` mode." in found


def test_plugins_beside_a_strategy_are_checked() -> None:
    assert "must be a table of plug-ins" in faults("Naive", plugins=["EWCPlugin"])
    assert "has no strategy or plug-in 'EWCPlugi'" in faults("Naive", plugins={"EWCPlugi": {}})
    assert "EWC: is a strategy, not a plug-in" in faults("Naive", plugins={"EWC": {}})
    found = faults("Naive", plugins={"EWCPlugin": {"lamda": 1.0}})
    assert "[client.args.plugins.EWCPlugin] lamda: EWCPlugin does not take it" in found


def test_plugins_beside_a_strategy_get_the_network_if_they_ask_for_it() -> None:
    made = strategy(
        "Replay", plugins={"CWRStarPlugin": {}, "LwFPlugin": {"alpha": [0.5, 1.0, 2.0]}}
    )
    learner, device = toy_learner(made), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in (0, 1):
        fit = learner.fit(state, params, device, position=position, server_round=1)
        state = learner.consolidate(fit.state, params, device, upto=position + 1)
    kept = kept_by(learner, state.memory, device)["plugins"]
    names = [type(plugin).__name__ for plugin in kept]
    assert names[:2] == ["CWRStarPlugin", "LwFPlugin"]
    assert "ReplayPlugin" in names
    assert sorted(kept[0].model.saved_weights) == [0, 1, 2]


OWN = """
from avalanche.core import SupervisedPlugin

class Counts(SupervisedPlugin):
    def __init__(self, first=0):
        super().__init__()
        self.steps = first
        self.ended = []

    def after_update(self, strategy, **kwargs):
        self.steps += 1

    def after_training_exp(self, strategy, **kwargs):
        self.ended.append(self.steps)

class NotOne:
    pass
"""


def test_ones_own_plugin_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    reference = f"avalanche:{tmp_path}/own.py:Counts"
    assert toy_scenario(client={"strategy": reference}).client.strategy == reference
    made = make_strategy(reference, {"first": 5})
    learner, states = toy_learner(made), []
    device = toy_devices()[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in (0, 1):
        for server_round in (1, 2, 3):
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state = fit.state
        state = learner.consolidate(state, params, device, upto=position + 1)
        states.append(state)
    steps = 3 * 2 * 3  # rounds, epochs, batches of four of ten samples
    plugin = plugin_of(learner, states[1].memory, device, "Counts")
    assert plugin.ended == [5 + steps, 5 + 2 * steps]
    with pytest.raises(ScenarioError, match="neither a strategy"):
        make_strategy(f"avalanche:{tmp_path}/own.py:NotOne", {})
    with pytest.raises(PluginError, match="no file"):
        make_strategy(f"avalanche:{tmp_path}/gone.py:Counts", {})


def test_what_the_documentation_shows_can_be_built() -> None:
    text = (Path(__file__).parents[3] / "docs" / "avalanche.md").read_text()
    shown = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.S)]
    named = [tables for tables in shown if tables["client"]["strategy"].startswith("avalanche:")]
    for tables in named:
        client = toy_scenario(client=tables["client"]).client
        assert isinstance(make_strategy(client.strategy, client.args), AvalancheStrategy)
    assert len(named) == 2


@pytest.mark.parametrize("other", ["ewc", "replay"])
def test_it_does_not_join_with_strategies_of_steps(other: str) -> None:
    message = f"EWC trains by itself, so {other} can't change the steps"
    with pytest.raises(ScenarioError, match=message):
        make_strategy(f"avalanche:EWC+{other}", {"EWC": {"ewc_lambda": 1.0}})


def test_without_the_package_one_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "avalanche", None)
    avalanche.library.cache_clear()
    try:
        with pytest.raises(ExtraMissingError, match=r"pip install 'edgelearn\[avalanche\]'"):
            strategy("Naive")
    finally:
        monkeypatch.undo()
        avalanche.library.cache_clear()


# -- what a device keeps ---------------------------------------------------------------------------


def moved(learner: Learner, params: Tensor, arrays: Any) -> Tensor:
    return params + learner.model.layout.flatten(arrays)


def session_of(learner: Learner, memory: Memory, device: ToyDevice, position: int = 0) -> Session:
    """A session with what the device keeps, as it is now."""
    made = learner.strategy
    assert isinstance(made, AvalancheStrategy)
    with at_work(0):
        batch = device.samples(position).batch()
        session = Session(made._recipe(), learner.model, learner.spec, batch)
        session.thaw(_State.unpack(memory["state"]).now)
    return session


def kept_by(learner: Learner, memory: Memory, device: ToyDevice) -> dict[str, Any]:
    return vars(session_of(learner, memory, device).strategy)


def plugin_of(learner: Learner, memory: Memory, device: ToyDevice, name: str) -> Any:
    (found,) = (p for p in kept_by(learner, memory, device)["plugins"] if type(p).__name__ == name)
    return found


def three_experiences() -> ToyDevice:
    """A device that meets classes 0 and 1, then 2, then 3."""
    store = toy_samples(12)
    ids = torch.arange(len(store.y), dtype=torch.int32)
    labels = store.labels(ids)
    return ToyDevice(0, store, (ids[labels <= 1], ids[labels == 2], ids[labels == 3]))


def test_ewc_keeps_one_anchor_for_each_experience_however_many_rounds() -> None:
    learner, device = toy_learner(strategy("EWC")), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    anchors = []
    for position in range(3):
        for server_round in range(4):
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state, params = fit.state, moved(learner, params, fit.update.arrays)
            plugin = plugin_of(learner, state.memory, device, "EWCPlugin")
            assert len(plugin.saved_params) == position  # none within an experience
        state = learner.consolidate(state, params, device, upto=position + 1)
        anchors.append(params)
    plugin = plugin_of(learner, state.memory, device, "EWCPlugin")
    assert len(plugin.saved_params) == len(plugin.importances) == 3
    for position, params in enumerate(anchors):  # the final global parameters of each
        anchor = {k: v.data for k, v in plugin.saved_params[position].items()}
        assert torch.equal(learner.model.layout.flatten(anchor), params)


def test_counters_go_on_across_rounds_and_experiences() -> None:
    learner, device = toy_learner(strategy("Naive")), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in range(2):
        for server_round in range(2):
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state = fit.state
        state = learner.consolidate(state, params, device, upto=position + 1)
    clock = kept_by(learner, state.memory, device)["clock"]
    assert clock.train_exp_counter == 2
    assert clock.train_iterations == 2 * 2 * (6 + 3)  # rounds, epochs, batches of four


def test_an_experience_without_training_leaves_no_trace() -> None:
    learner, device = toy_learner(strategy("Replay")), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    away = learner.consolidate(state, params, device, upto=1)
    assert torch.equal(away.memory["state"], state.memory["state"])
    fit = learner.fit(state, params, device, position=2, server_round=1)
    done = learner.consolidate(fit.state, params, device, upto=3)
    clock = kept_by(learner, done.memory, device)["clock"]
    assert clock.train_exp_counter == 1


def test_too_little_room_says_how_much_it_takes() -> None:
    made = make_strategy("avalanche:EWC", {"ewc_lambda": 1.0, "state_kib": 4})
    learner, device = toy_learner(made), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    assert learner.memory_bytes == 4096

    def learn(state: DeviceState) -> None:
        for position in range(3):
            fit = learner.fit(state, params, device, position=position, server_round=1)
            state = learner.consolidate(fit.state, params, device, upto=position + 1)

    with pytest.raises(StrategyError, match=r"has (\d+) KiB to remember and room for 4") as caught:
        learn(state)
    needed = int(str(caught.value).split(" has ")[1].split()[0])
    assert needed > 4
    assert "give state_kib in [client.args]" in str(caught.value)


def test_the_room_follows_from_the_network_and_the_arguments() -> None:
    model, facts = toy_model(), Facts(3, 4, sample_bytes=17)
    networks = (2 * 3 + 8) * 4 * model.layout.size
    for name, samples in (("EWC", 200), ("Replay", 8), ("AGEM", 3 * 4)):
        (spec,) = strategy(name).declare(model, facts).values()
        assert spec.shape == (2**16 + networks + samples * 4 * 17,), name


def test_samples_are_kept_on_the_device_and_nothing_of_them_is_sent() -> None:
    learner, device = toy_learner(strategy("Replay")), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    fit = learner.fit(state, params, device, position=0, server_round=1)
    state = learner.consolidate(fit.state, params, device, upto=1)
    fit = learner.fit(state, params, device, position=1, server_round=2)
    buffer = plugin_of(learner, state.memory, device, "ReplayPlugin").storage_policy.buffer
    assert len(buffer) == 8
    pixels = buffer[0][0].numpy().tobytes()
    assert pixels in state.memory["state"].numpy().tobytes()
    egress.fit_schema(learner.model.layout).admit(fit.update.arrays, fit.update.metrics)
    assert list(fit.update.arrays) == list(learner.model.layout.names)


def test_a_small_buffer_does_not_hold_the_data_that_it_was_taken_from() -> None:
    store = toy_samples(500)
    ids = torch.arange(len(store.y), dtype=torch.int32)
    device = ToyDevice(0, store, (ids, ids[:0]))
    learner = toy_learner(strategy("Replay"), batch_size=100)
    state, params = learner.initial_state(store), learner.model.initial()
    fit = learner.fit(state, params, device, position=0, server_round=1)
    state = learner.consolidate(fit.state, params, device, upto=1)
    assert len(_State.unpack(state.memory["state"]).before) < 8 * 64 + 6000
    assert len(ids) * 64 > 100_000


# -- against Avalanche itself ----------------------------------------------------------------------


TEN: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("Naive", {}),
    "EWC": ("EWCPlugin", {"ewc_lambda": 1.0}),
    "EWC-online": ("EWC", {"ewc_lambda": 1.0, "mode": "online", "decay_factor": 0.9}),
    "LwF": ("LwF", {"alpha": 1.0, "temperature": 2.0}),
    "MAS": ("MASPlugin", {}),
    "RWalk": ("RWalkPlugin", {"delta_t": 2}),
    "Replay": ("Replay", {"mem_size": 8}),
    "GEM": ("GEMPlugin", {"patterns_per_experience": 4, "memory_strength": 0.5}),
    "EWC+Replay": (
        "Naive",
        {"plugins": {"EWCPlugin": {"ewc_lambda": 1.0}, "ReplayPlugin": {"mem_size": 8}}},
    ),
    "FromScratch": ("FromScratchTrainingPlugin", {}),
    # Samples when an experience begins: what was before that has to be kept too.
    "GDumb": ("GDumb", {"mem_size": 8}),
}
SPEC: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 0.05, "momentum": 0.9}
ROUNDS = 3


def by_learner(name: str, folder: Path | None) -> list[Tensor]:
    """The parameters after each round; with a folder, all is stored and built anew each time."""
    reference, arguments = TEN[name]

    def new() -> Learner:
        return toy_learner(make_strategy(f"avalanche:{reference}", arguments), **SPEC)

    learner, device = new(), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    steps = []

    def again(state: DeviceState) -> tuple[Learner, DeviceState]:
        if folder is None:
            return learner, state
        disk = DeviceStore(folder, digest="test")
        owned = OwnedSamples.empty((1, 4, 4), torch.uint8, ENCODING)
        disk.save(Stored(state, owned), learner.declaration)
        stored = disk.load(learner.declaration, ENCODING)
        assert stored is not None
        return new(), stored.state

    for position in range(3):
        for turn in range(ROUNDS):
            server_round = position * ROUNDS + turn + 1
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            learner, state = again(fit.state)
            params = moved(learner, params, fit.update.arrays)
            steps.append(params)
        state = learner.consolidate(state, params, device, upto=position + 1)
        learner, state = again(state)
    return steps


def by_avalanche(name: str) -> list[Tensor]:
    """The same by one living strategy of Avalanche that is never stored."""
    reference, arguments = TEN[name]
    lib, device, learner = avalanche.library(), three_experiences(), toy_learner(Naive(), **SPEC)
    layout, network = learner.model.layout, toy_model().module
    arguments = dict(arguments)
    beside = [lib.plugins.__dict__[k](**v) for k, v in arguments.pop("plugins", {}).items()]
    kind = avalanche.offered()[reference]
    if issubclass(kind, lib.core.BasePlugin):
        beside, kind, arguments = [kind(**arguments)], lib.supervised.Naive, {}
    with at_work(0):
        live = kind(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            train_epochs=2,
            plugins=beside,
            evaluator=lib.plugins.EvaluationPlugin(),
            **arguments,
        )
    params, steps = learner.model.initial(), []

    def load() -> None:
        with torch.no_grad():
            for key, value in live.model.named_parameters():
                value.copy_(layout.views(params)[key])

    for position in range(3):
        batch = device.samples(position).batch()
        data = avalanche.dataset(batch.x, batch.y.tolist(), [0] * len(batch))
        for turn in range(ROUNDS):
            seed = split(derive(0, "steps", position * ROUNDS + turn + 1), 0)
            if turn == 0:
                with at_work(derive(seed, "begin") | 1):
                    live.is_training, live._stop_training, live._eval_streams = True, False, []
                    load()
                    live.model.train()
                    live._before_training()
                    live.experience = avalanche.experience(data, position, [])
                    live._before_training_exp()
            with at_work(derive(seed, "round")):
                load()
                live.make_optimizer(reset_optimizer_state=True)
                live._train_exp(live.experience, [])
            local = layout.flatten({k: v.detach() for k, v in live.model.named_parameters()})
            params = params + (local - params)
            steps.append(params)
        generator = torch_generator(0, "finish", position, 0)
        with at_work(int(torch.randint(2**62, (), generator=generator))):
            load()
            live._after_training_exp()
            live._after_training()
            live._train_cleanup()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN)
def test_stored_and_built_anew_equals_a_living_strategy_by_the_bit(
    name: str, tmp_path: Path
) -> None:
    expected = by_avalanche(name)
    assert len(expected) == 9
    for found in (by_learner(name, None), by_learner(name, tmp_path)):
        assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 9


# -- against what devices do without Avalanche -----------------------------------------------------


class WithNorm(nn.Module):
    """A network with statistics beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


MASKS = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()


@pytest.mark.parametrize(
    "case", ["sgd", "momentum", "decay", "adam", "adamw", "proximal", "norm", "tasks"]
)
def test_naive_of_avalanche_equals_ours(case: str) -> None:
    """With all samples in a batch, since the two shuffle otherwise."""
    spec: dict[str, Any] = {"epochs": 4, "batch_size": 100, "lr": 0.05}
    spec |= {
        "momentum": {"momentum": 0.9},
        "decay": {"weight_decay": 0.1},
        "adam": {"optimizer": "adam", "weight_decay": 0.01},
        "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    }.get(case, {})
    mu = 0.7 if case == "proximal" else 0.0
    encoding = replace(ENCODING, task_masks=MASKS if case == "tasks" else None)
    store = SharedSamples(toy_samples(5).x, toy_samples(5).y, encoding)
    ids = torch.arange(20, dtype=torch.int32)
    parts = (ids[store.labels(ids) < 2], ids[store.labels(ids) >= 2])
    device = ToyDevice(0, store, parts)
    results = []
    for made in (Naive(), strategy("Naive")):
        learner = toy_learner(made, **spec)
        if case == "norm":
            torch.manual_seed(1)
            learner = replace(learner, model=FlatModel(WithNorm()))
        state, params = learner.initial_state(store), learner.model.initial()
        start = params.clone()
        for position in (0, 1):
            for server_round in (1, 2):
                fit = learner.fit(
                    state,
                    params,
                    device,
                    position=position,
                    server_round=server_round,
                    proximal_mu=mu,
                )
                state, params = fit.state, moved(learner, params, fit.update.arrays)
        assert fit.update.metrics["num-steps"] == 4
        assert fit.num_samples == 4 * 10
        results.append((params, fit.update.metrics["loss"]))
        assert float((params - start).abs().max()) > 0.05
    (ours, our_loss), (theirs, their_loss) = results
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert their_loss == pytest.approx(our_loss, rel=1e-5)


STATISTICS = """
from avalanche.core import SupervisedPlugin

class Statistics(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def before_training_exp(self, strategy, **kwargs):
        self.begun.append(strategy.model.layers[1].running_mean.clone())

    def after_training_exp(self, strategy, **kwargs):
        self.ended.append(strategy.model.layers[1].running_mean.clone())
"""


def test_statistics_beside_parameters_are_those_of_the_fleet(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STATISTICS)
    made = make_strategy(f"avalanche:{tmp_path}/own.py:Statistics", {})
    torch.manual_seed(1)
    learner, device = replace(toy_learner(made), model=FlatModel(WithNorm())), toy_devices()[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    begun, ended = [], []
    for position in (0, 1):
        begun.append(params)
        for server_round in (1, 2):
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state, params = fit.state, moved(learner, params, fit.update.arrays)
        params = params + 0.25  # what others have learned
        state = learner.consolidate(state, params, device, upto=position + 1)
        ended.append(params)
    plugin = plugin_of(learner, state.memory, device, "Statistics")
    for vectors, found in ((begun, plugin.begun), (ended, plugin.ended)):
        means = [learner.model.layout.views(v)["layers.1.running_mean"] for v in vectors]
        assert [torch.equal(a, b) for a, b in zip(means, found, strict=True)] == [True, True]


class CountsBeside(ClientStrategy):
    """Something else that travels beside the network."""

    def shares(self, model: FlatModel, facts: Facts) -> dict[str, TensorSpec]:
        return {"rounds": TensorSpec((1,))}

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        local = passage.local.clone()
        passage.model.layout.shared(local)["rounds"] += 1
        return local, memory


def test_what_other_strategies_share_passes_by() -> None:
    made = Combined({"beside": CountsBeside(), "replay": strategy("Replay")})
    learner, device = toy_learner(made), toy_devices()[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in (0, 1):
        fit = learner.fit(state, params, device, position=position, server_round=1)
        params = moved(learner, params, fit.update.arrays)
        state = learner.consolidate(fit.state, params, device, upto=position + 1)
    assert learner.model.layout.shared(params)["rounds"].tolist() == [2.0]


def test_ours_equals_naive_of_avalanche_step_by_step_with_the_same_batches() -> None:
    """Avalanche alone, through its own `train`, given the samples in the order of our batches."""
    lib, spec = avalanche.library(), {"epochs": 1, "batch_size": 4, "lr": 0.1}
    learner, device = toy_learner(Naive(), **spec), three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    network = toy_model().module
    with at_work(0):
        live = lib.supervised.Naive(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            evaluator=lib.plugins.EvaluationPlugin(),
        )
    for position in range(3):
        for server_round in (1, 2):
            samples = device.samples(position)
            seed = split(derive(0, "steps", server_round), 0)
            batch = samples.batch(torch.from_numpy(permutation(split(seed, 0), len(samples))))
            data = avalanche.dataset(batch.x, batch.y.tolist(), [0] * len(batch))
            with at_work(0):
                live.train(avalanche.experience(data, 0, []), eval_streams=[], shuffle=False)
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state, params = fit.state, moved(learner, params, fit.update.arrays)
            theirs = {name: p.detach() for name, p in network.named_parameters()}
            found = learner.model.layout.flatten(theirs)
            torch.testing.assert_close(params, found, rtol=0, atol=2e-6)


def test_replay_of_other_tasks_is_masked_by_their_own() -> None:
    store = SharedSamples(toy_samples(5).x, toy_samples(5).y, replace(ENCODING, task_masks=MASKS))
    ids = torch.arange(20, dtype=torch.int32)
    device = ToyDevice(0, store, (ids[store.labels(ids) < 2], ids[store.labels(ids) >= 2]))
    for name in ("Replay", "LwF", "EWC", "ER_ACE", "AGEM", "GEM", "MIR", "MAS"):
        learner = toy_learner(strategy(name))
        state, params = learner.initial_state(store), learner.model.initial()
        for position in (0, 1):
            for server_round in (1, 2, 3):
                fit = learner.fit(
                    state, params, device, position=position, server_round=server_round
                )
                state, params = fit.state, moved(learner, params, fit.update.arrays)
            state = learner.consolidate(state, params, device, upto=position + 1)
        batch = store.batch(ids)
        assert batch.mask is not None
        answers = learner.model(params, batch.x).masked_fill(~batch.mask, -math.inf).argmax(1)
        assert float((answers == batch.y).float().mean()) > 0.9, name
        session = session_of(learner, state.memory, device)
        assert sorted(session.strategy.model.masks) == [0, 2]
        logits = session.strategy.model(batch.x[:2], torch.tensor([0, 2]))
        assert (logits > avalanche.MASKED).tolist() == MASKS[[0, 2]].tolist()


def test_who_asks_for_logits_without_a_task_is_told_so() -> None:
    store = SharedSamples(toy_samples(5).x, toy_samples(5).y, replace(ENCODING, task_masks=MASKS))
    ids = torch.arange(20, dtype=torch.int32)
    device = ToyDevice(0, store, (ids[:10], ids[10:]))
    learner = toy_learner(strategy("DER"))
    state, params = learner.initial_state(store), learner.model.initial()
    fit = learner.fit(state, params, device, position=0, server_round=1)

    def go_on(state: DeviceState) -> None:
        state = learner.consolidate(state, params, device, upto=1)
        learner.fit(state, params, device, position=1, server_round=2)

    with pytest.raises(StrategyError, match="without saying of which task"):
        go_on(fit.state)


def test_a_network_that_grows_is_refused_by_name() -> None:
    lib = avalanche.library()
    network = nn.Sequential(nn.Flatten(), lib.modules.IncrementalClassifier(16, 2))
    learner = replace(toy_learner(strategy("Naive")), model=FlatModel(network))
    device = three_experiences()
    state, params = learner.initial_state(device.store), learner.model.initial()
    fit = learner.fit(state, params, device, position=0, server_round=1)
    with pytest.raises(StrategyError, match=r"changed the shape of 1.classifier.weight"):
        learner.fit(fit.state, params, device, position=2, server_round=2)


# -- experiences that come in parts ----------------------------------------------------------------


@dataclass(frozen=True)
class PartsDevice(ToyDevice):
    """A device each of whose rounds brings a third of an experience, as online streams do."""

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:
        whole = ToyDevice.samples(self, position)
        if server_round is None:
            return whole
        part, count = (server_round - 1) % 3, len(whole)
        return Samples(self.store, whole.ids[count * part // 3 : count * (part + 1) // 3])


def parts_device(num_per_class: int = 6) -> PartsDevice:
    """It meets classes 0 and 1, class 1 at the last, and then 2 and 3."""
    store = toy_samples(num_per_class)
    ids = torch.arange(len(store.y), dtype=torch.int32)
    labels = store.labels(ids)
    parts = tuple(torch.cat([ids[labels == c] for c in pair]) for pair in ((0, 1), (2, 3)))
    return PartsDevice(0, store, parts)


def samples_in(held: Any, depth: int = 12) -> list[Any]:
    """All samples in data sets that an object holds."""
    if isinstance(held, avalanche.library().utils.AvalancheDataset):
        return [held[k][0] for k in range(len(held))]
    if depth == 0 or isinstance(held, nn.Module | Tensor):
        return []
    if isinstance(held, dict):
        inner = list(held.values())
    elif isinstance(held, list | tuple):
        inner = list(held)
    else:
        inner = list(vars(held).values()) if hasattr(held, "__dict__") else []
    return [x for value in inner for x in samples_in(value, depth - 1)]


def remembered(learner: Learner, memory: Memory, device: ToyDevice) -> set[int]:
    """Ids of the samples that the device keeps for its strategy."""
    kept = {n: v for n, v in kept_by(learner, memory, device).items() if n not in ("model",)}
    store = device.store
    assert isinstance(store, SharedSamples)
    every = store.batch(torch.arange(len(store.y), dtype=torch.int32)).x
    found = samples_in(kept)
    return {int((every - x).flatten(1).abs().sum(1).argmin()) for x in found}


AT_ONCE = ["Cumulative", "ER_ACE", "GDumb", "GDumbPlugin"]
AT_THE_END = ["AGEM", "DER", "MER", "MIR", "Replay"]
ROOM = {"mem_size": 99, "patterns_per_exp": 99, "subsample": 99}


@pytest.mark.parametrize("name", [*AT_ONCE, *AT_THE_END])
def test_what_arrives_in_parts_is_kept_as_it_arrives(name: str) -> None:
    room = {key: ROOM[key] for key in ARGUMENTS[name] if key in ROOM}
    learner = toy_learner(strategy(name, **room, state_kib=256))
    device = parts_device()
    state, params = learner.initial_state(device.store), learner.model.initial()
    arrived: set[int] = set()
    for position in (0, 1):
        before = set(arrived)
        for server_round in (1, 2, 3):
            now = 3 * position + server_round
            fit = learner.fit(state, params, device, position=position, server_round=now)
            state, params = fit.state, moved(learner, params, fit.update.arrays)
            arrived |= set(device.samples(position, server_round=now).ids.tolist())
            kept = remembered(learner, state.memory, device)
            assert kept == (arrived if name in AT_ONCE else before), (position, server_round)
        state = learner.consolidate(state, params, device, upto=position + 1)
        assert remembered(learner, state.memory, device) == arrived


def test_classes_that_arrive_late_are_those_of_the_experience() -> None:
    learner, device = toy_learner(strategy("LwF")), parts_device()
    state, params = learner.initial_state(device.store), learner.model.initial()
    for server_round in (1, 2, 3):
        state = learner.fit(state, params, device, position=0, server_round=server_round).state
    assert session_of(learner, state.memory, device)._classes == [[0, 1]]
    state = learner.consolidate(state, params, device, upto=1)
    fit = learner.fit(state, params, device, position=1, server_round=4)
    session = session_of(learner, fit.state.memory, device)
    assert session._classes == [[0, 1], [2]]
    (plugin,) = [p for p in session.strategy.plugins if hasattr(p, "lwf")]
    assert plugin.lwf.prev_classes_by_task == {0: {0, 1}}


def test_what_counts_an_experience_when_it_begins_is_refused_in_parts() -> None:
    learner, device = toy_learner(strategy("CWRStar")), parts_device()
    state, params = learner.initial_state(device.store), learner.model.initial()
    state = learner.fit(state, params, device, position=0, server_round=1).state
    again = learner.fit(state, params, device, position=0, server_round=1)  # no more than before
    with pytest.raises(StrategyError, match=r"CWRStar counts .* it needs stream.online = false"):
        learner.fit(again.state, params, device, position=0, server_round=2)


def test_a_fleet_learns_an_online_stream_with_er_ace_of_avalanche() -> None:
    scenario = toy_scenario(
        fleet={"num_devices": 2, "cohort": 2},
        stream={"online": True, "rounds_per_experience": 3},
        client={
            "strategy": "avalanche:ER_ACE",
            "args": {"mem_size": 24, "batch_size_mem": 4},
            "epochs": 4,
        },
    )
    record = edgelearn.simulate(scenario, engine="reference")
    assert all(line["outcomes"]["ok"] == 2 for line in record.rounds)
    assert record.scores().average_accuracy > 0.9


# -- whole runs ------------------------------------------------------------------------------------


def test_a_fleet_runs_with_replay_of_avalanche() -> None:
    client = {"strategy": "avalanche:Replay", "args": {"mem_size": 8}, "epochs": 3}
    record = edgelearn.simulate(toy_scenario(client=client), engine="reference")
    naive = edgelearn.simulate(toy_scenario(client={"epochs": 3}), engine="reference")
    assert all(line["outcomes"]["ok"] == 4 for line in record.rounds)
    assert record.scores().average_accuracy > 0.9
    losses = [[line["loss"] for line in run.rounds] for run in (record, naive)]
    assert losses[0][2:] != losses[1][2:]  # the buffer is in the second experience


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_as_a_benchmark_of_avalanche() -> None:
    world = build(toy_scenario(stream={"order": "per-device"}))
    for device in (0, 1):
        benchmark = avalanche.as_avalanche(world, device)
        assert len(benchmark.train_stream) == len(benchmark.test_stream) == 2
        for position, made in enumerate(benchmark.train_stream):
            samples = world.train_samples(device, position)
            assert made.current_experience == position
            assert made.classes_in_this_experience == list(
                world.stream.experience(device, position).classes
            )
            assert torch.equal(torch.stack([x for x, _, _ in made.dataset]), samples.batch().x)
            assert [int(y) for _, y, _ in made.dataset] == samples.labels.tolist()
            assert made.task_labels == [0]
        for position, made in enumerate(benchmark.test_stream):
            found = world.stream.experience_id(device, position)
            assert len(made.dataset) == len(world.test_samples(device, found))


def test_task_labels_of_a_benchmark_are_those_of_the_stream() -> None:
    world = build(toy_scenario(stream={"kind": "task-incremental"}))
    benchmark = avalanche.as_avalanche(world, 0)
    assert [made.task_labels for made in benchmark.train_stream] == [[0], [1]]


def test_avalanche_alone_learns_such_a_benchmark() -> None:
    world = build(toy_scenario())
    benchmark = avalanche.as_avalanche(world, 0)
    lib, network = avalanche.library(), toy_model().module
    with at_work(0):
        live = lib.supervised.LwF(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            alpha=1.0,
            temperature=2.0,
            train_mb_size=4,
            train_epochs=6,
            evaluator=lib.plugins.EvaluationPlugin(),
        )
        for made in benchmark.train_stream:
            live.train(made, eval_streams=[])
    last = benchmark.test_stream[1].dataset
    answers = network(torch.stack([x for x, _, _ in last])).argmax(1)
    assert float((answers == torch.tensor([int(y) for _, y, _ in last])).float().mean()) > 0.9


def test_a_device_without_samples_of_an_experience_has_no_benchmark() -> None:
    world = build(toy_scenario(partition={"kind": "shards", "shards_per_device": 1}))
    with pytest.raises(ScenarioError, match="has no train samples at position"):
        avalanche.as_avalanche(world, 0)


def tensors(num_per_class: int, part: str, shift: int = 0) -> Any:
    x, y = toy_images(num_per_class, part)
    x = np.roll(x, shift, axis=-1)
    pairs = TensorDataset(torch.from_numpy(x).float() / 255, torch.from_numpy(y))
    return avalanche.library().utils._make_taskaware_classification_dataset(
        pairs, targets=y.tolist(), task_labels=0
    )


def benchmark(kind: str) -> Any:
    lib = avalanche.library().benchmarks
    train, test = tensors(6, "train"), tensors(3, "test")
    with at_work(0):
        if kind == "nc":
            order = {"fixed_class_order": [2, 0, 3, 1], "shuffle": False}
            return lib.nc_benchmark(train, test, n_experiences=2, task_labels=False, **order)
        if kind == "ni":
            return lib.ni_benchmark(train, test, n_experiences=3, task_labels=False)
        if kind == "new-instances":
            return lib.new_instances_benchmark(train, test, num_experiences=3)
        if kind == "domains":
            return lib.benchmark_from_datasets(
                train=[tensors(4, "train", shift) for shift in range(3)],
                test=[tensors(2, "test", shift) for shift in range(3)],
            )
        if kind == "uneven":
            order = {"fixed_class_order": [2, 0, 3, 1], "shuffle": False}
            return lib.nc_benchmark(
                train, test, n_experiences=2, task_labels=False, per_exp_classes={0: 3}, **order
            )
        return lib.class_incremental_benchmark(
            {"train": train, "test": test}, num_experiences=2, class_order=[2, 0, 3, 1]
        )


def as_set(x: Tensor, labels: Sequence[int]) -> set[tuple[bytes, int]]:
    rows = zip((x * 255).round().to(torch.uint8), labels, strict=True)
    return {(row.numpy().tobytes(), int(label)) for row, label in rows}


@pytest.mark.parametrize("kind", ["nc", "class_incremental"])
def test_a_class_incremental_benchmark_as_a_stream(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = benchmark(kind)
    dataset = from_benchmark(given)
    assert (dataset.num_classes, dataset.x_train.dtype, dataset.scale) == (4, np.uint8, 1 / 255)
    monkeypatch.setattr("edgelearn.testing.toy.toy_dataset", lambda _spec: dataset)
    world = build(toy_scenario(fleet={"num_devices": 1, "cohort": 1}))
    number = {2: 1, 0: 0, 3: 3, 1: 2}  # in the order of the experiences, sorted within each
    for name, stream in (("train", given.train_stream), ("test", given.test_stream)):
        for position, made in enumerate(stream):
            ask = world.train_samples if name == "train" else world.test_samples
            samples = ask(0, position)
            items = [made.dataset[k] for k in range(len(made.dataset))]
            theirs = as_set(torch.stack([i[0] for i in items]), [number[int(i[1])] for i in items])
            assert as_set(samples.batch().x, samples.labels.tolist()) == theirs
            assert len(samples) == len(items) > 0


def test_a_benchmark_of_new_instances_names_the_experience_of_each_sample() -> None:
    given = benchmark("ni")
    dataset = from_benchmark(given)
    assert dataset.users_train is not None
    assert dataset.num_classes == 4
    for user, made in enumerate(given.train_stream):
        own = dataset.users_train == user
        items = [made.dataset[k] for k in range(len(made.dataset))]
        theirs = as_set(torch.stack([i[0] for i in items]), [int(i[1]) for i in items])
        x = torch.from_numpy(dataset.x_train[own]).float() / 255
        assert as_set(x, dataset.y_train[own].tolist()) == theirs
    assert np.unique(dataset.users_test).tolist() == list(range(len(given.test_stream)))


GIVEN = {"ni": 3, "new-instances": 3, "domains": 3, "uneven": 2, "class_incremental": 2}


@pytest.fixture(scope="session", params=GIVEN)
def given_benchmark(request: pytest.FixtureRequest) -> tuple[Any, Dataset]:
    """A benchmark that Avalanche itself built, and its data set."""
    made = benchmark(request.param)
    dataset = from_benchmark(made)
    assert dataset.num_experiences == GIVEN[request.param]
    # Some streams can be counted only by going through them.
    whole = {name: list(getattr(made, name)) for name in ("train_stream", "test_stream")}
    return SimpleNamespace(**whole), dataset


def contents(data: Any, number: Mapping[int, int]) -> set[tuple[bytes, int]]:
    items = [data[k] for k in range(len(data))]
    found = as_set(torch.stack([i[0] for i in items]), [number[int(i[1])] for i in items])
    assert len(found) == len(items) > 0
    return found


def numbers(given: Any, dataset: Dataset) -> dict[int, int]:
    """Return what labels of a benchmark are called in its data set."""
    theirs = [
        int(made.dataset[k][1]) for made in given.train_stream for k in range(len(made.dataset))
    ]
    return dict(zip(theirs, dataset.y_train.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_a_fleet_meets_the_experiences_of_a_benchmark_in_time(
    given_benchmark: tuple[Any, Dataset], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, dataset = given_benchmark
    monkeypatch.setattr("edgelearn.testing.toy.toy_dataset", lambda _spec: dataset)
    T, number = len(given.train_stream), numbers(given, dataset)
    world = build(
        toy_scenario(
            fleet={"num_devices": 3, "cohort": 3},
            stream={"kind": "given", "num_experiences": T},
            partition={"kind": kind},
        )
    )
    tested: set[tuple[bytes, int]] = set()
    for position, made in enumerate(given.train_stream):
        shown: set[tuple[bytes, int]] = set()
        for device in range(3):
            samples = world.train_samples(device, position)
            found = as_set(samples.batch().x, samples.labels.tolist())
            assert len(found) == len(samples)
            assert not shown & found
            shown |= found
        assert shown == contents(made.dataset, number)
        occurring = {label for _, label in contents(made.dataset, number)}
        assert world.stream.classes(position) == tuple(sorted(occurring))
        tests = [world.test_samples(device, position) for device in range(3)]
        own = {pair for s in tests for pair in as_set(s.batch().x, s.labels.tolist())}
        if len(given.test_stream) == T:
            assert own == contents(given.test_stream[position].dataset, number)
        assert not tested & own
        tested |= own
    everything = [contents(made.dataset, number) for made in given.test_stream]
    assert tested == set().union(*everything)


def test_there_and_back_a_benchmark_is_the_same(
    given_benchmark: tuple[Any, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, dataset = given_benchmark
    monkeypatch.setattr("edgelearn.testing.toy.toy_dataset", lambda _spec: dataset)
    T, number = len(given.train_stream), numbers(given, dataset)
    world = build(
        toy_scenario(
            fleet={"num_devices": 1, "cohort": 1}, stream={"kind": "given", "num_experiences": T}
        )
    )
    back = avalanche.as_avalanche(world, 0)
    same = dict(zip(range(4), range(4), strict=True))
    assert len(back.train_stream) == len(back.test_stream) == T
    seen: set[int] = set()
    for ours, theirs in zip(back.train_stream, given.train_stream, strict=True):
        assert contents(ours.dataset, same) == contents(theirs.dataset, number)
        assert ours.previous_classes == sorted(seen)
        seen |= {label for _, label in contents(theirs.dataset, number)}
        assert ours.classes_seen_so_far == sorted(seen)
    if len(given.test_stream) == T:
        for ours, theirs in zip(back.test_stream, given.test_stream, strict=True):
            assert contents(ours.dataset, same) == contents(theirs.dataset, number)


def test_another_number_of_experiences_than_the_benchmark_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = from_benchmark(benchmark("domains"), name="shifted")
    monkeypatch.setattr("edgelearn.testing.toy.toy_dataset", lambda _spec: dataset)
    with pytest.raises(ScenarioError, match="num_experiences: got 5; the data set 'shifted' has 3"):
        build(toy_scenario(stream={"kind": "given", "num_experiences": 5}))


def test_a_device_without_samples_of_a_given_experience_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = from_benchmark(benchmark("domains"))
    monkeypatch.setattr("edgelearn.testing.toy.toy_dataset", lambda _spec: dataset)
    world = build(  # each experience is a user of its own: a device has one, and idles in others
        toy_scenario(
            fleet={"num_devices": 3, "cohort": 3},
            stream={"kind": "given", "num_experiences": 3},
            partition={"kind": "user"},
        )
    )
    assert [len(world.train_samples(1, position)) for position in range(3)] == [0, 16, 0]
    with pytest.raises(ScenarioError, match="device 1 has no train samples at position 0"):
        avalanche.as_avalanche(world, 1)


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[3] / "docs/avalanche.md").read_text()
    for name, code in re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["turned.py", "turned.toml"]
    monkeypatch.chdir(tmp_path)
    record = edgelearn.simulate(load("turned.toml"))
    assert len(record.rounds) == 12
    assert record.scores().learning_accuracy > 0.8
