"""One mask for all devices, from what the server sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgelearn.compress.prune import largest, prunable, two_of_four
from edgelearn.continual.memory import Memory
from edgelearn.continual.pruned import Pruned
from edgelearn.continual.strategy import make_strategy
from edgelearn.device.learner import Learner
from edgelearn.device.state import DeviceState
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import toy_devices, toy_learner

COMPOSED: dict[str, dict[str, Any]] = {
    "pruned": {},
    "pruned+ewc": {"ewc": {"strength": 1000.0}},
    "ewc+pruned": {"ewc": {"strength": 1000.0}},
    "pruned+replay": {"replay": {"capacity": 8}},
}
SPEC: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01, "lr": 0.05}


def pruned_learner(name: str = "pruned", **arguments: Any) -> Learner:
    own = {"sparsity": 0.6, "num_prunings": 3, "begin": 2, **arguments}
    tables = own if name == "pruned" else {"pruned": own, **COMPOSED[name]}
    return toy_learner(make_strategy(name, tables), **SPEC)


class Fleet:
    """Three devices and the mean of what they send."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.devices = learner, toy_devices()
        self.states: list[DeviceState] = [learner.initial_state(d.store) for d in self.devices]
        self.params = learner.model.initial()
        self.locals: list[Tensor] = []

    def round(self, number: int, position: int) -> None:
        self.locals = []
        for i, device in enumerate(self.devices):
            done = self.learner.fit(
                self.states[i], self.params, device, position=position, server_round=number
            )
            delta = self.learner.model.layout.flatten(done.update.arrays)
            self.states[i] = done.state
            self.locals.append(self.params + delta)
        self.params = torch.stack(self.locals).mean(0)

    def consolidate(self, upto: int) -> None:
        for i, device in enumerate(self.devices):
            self.states[i] = self.learner.consolidate(
                self.states[i], self.params, device, upto=upto
            )


@pytest.mark.parametrize("name", COMPOSED)
def test_pruned_weights_are_zero_from_then_on(name: str) -> None:
    fleet = Fleet(pruned_learner(name))
    layout = fleet.learner.model.layout
    may = prunable(layout)
    count, zeros = int(may.sum()), torch.zeros(layout.num_trained, dtype=torch.bool)
    # begin is 2: s = 0.6 - 0.6 (1 - done / 3)^3
    shares = [0.0, 0.0, *(0.6 - 0.6 * (1 - d / 3) ** 3 for d in (1, 2, 3)), 0.6, 0.6, 0.6]
    for i, share in enumerate(shares):
        position = int(i >= 5)
        if i == 5:
            fleet.consolidate(1)  # EWC anchors what there is, and pulls from now on
        fleet.round(i + 1, position)
        number = round(share * count)
        for local in fleet.locals:
            own = local[: layout.num_trained] == 0
            assert int((own & may).sum()) == number
            assert not bool((zeros & ~own).any())  # what was pruned stays so
        assert all(torch.equal(fleet.locals[0] == 0, local == 0) for local in fleet.locals)
        zeros = fleet.params[: layout.num_trained] == 0
        assert int((zeros & may).sum()) == number
        assert float(layout.shared(fleet.params)["rounds"]) == i + 1


def test_the_update_of_a_weight_is_its_negative_once_and_then_zero() -> None:
    fleet = Fleet(pruned_learner(begin=1, num_prunings=0))
    layout, before = fleet.learner.model.layout, fleet.params
    stays = largest(before[: layout.num_trained], layout, 0.6)
    deltas = []
    for number in (1, 2):
        given = fleet.params
        fleet.round(number, 0)
        deltas.append([(local - given)[: layout.num_trained] for local in fleet.locals])
    for first, second in zip(*deltas, strict=True):
        assert torch.equal(first[~stays], -before[: layout.num_trained][~stays])
        assert not second[~stays].any()
        assert second[stays].abs().min() > 0


@pytest.mark.parametrize("name", COMPOSED)
def test_it_is_zero_in_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever momentum, weight decay and penalties do."""
    fleet = Fleet(pruned_learner(name, begin=3, num_prunings=0))
    fleet.round(1, 0)
    fleet.round(2, 0)
    fleet.consolidate(1)  # the anchor is that of a network without zeros
    layout, strategy = fleet.learner.model.layout, fleet.learner.strategy
    stays = largest(fleet.params[: layout.num_trained], layout, 0.6)
    seen: list[Tensor] = []
    proximal = type(strategy).proximal

    def spy(self: Any, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        out = proximal(self, params, memory, lr=lr)
        seen.append(out.detach().clone())
        return out

    monkeypatch.setattr(type(strategy), "proximal", spy)
    fleet.round(3, 1)
    assert len(seen) > 3
    assert all(not params[~stays].any() and params[stays].all() for params in seen)


def test_ewc_still_pulls_what_is_left() -> None:
    ends = []
    for strength in (0.0, 1e6):
        tables = {"pruned": {"num_prunings": 0}, "ewc": {"strength": strength}}
        fleet = Fleet(toy_learner(make_strategy("pruned+ewc", tables)))
        fleet.round(1, 0)
        fleet.consolidate(1)
        before = fleet.params
        fleet.round(2, 1)
        ends.append(float((fleet.params - before)[:-1].norm()))
    assert ends[1] < 0.2 * ends[0]


@pytest.mark.parametrize("dust", [0.0, 1e-9])
def test_the_served_int8_model_has_zeros_there(dust: float) -> None:
    fleet = Fleet(pruned_learner(begin=1, num_prunings=0))
    for number in (1, 2, 3):
        fleet.round(number, 0)
    model = fleet.learner.model
    trained = slice(0, model.layout.num_trained)
    stays = fleet.params[trained] != 0
    dusty = fleet.params.clone()
    dusty[trained] += dust * (~stays & prunable(model.layout))  # of a mean that was rounded
    device = fleet.devices[0]
    own = fleet.learner.served(
        fleet.states[0], dusty, device.samples(0), position=0, device=device.device
    )
    assert torch.equal(own, fleet.params)
    predictor = Int8Runtime().prepare(model, own).calibrated(device.samples(0).batch().x)
    for name, place in model.layout.places.items():
        if name.endswith("weight"):
            codes = predictor.tensors[name.replace("weight", "codes")].flatten()
            assert not codes[~stays[place]].any()
    assert int((~stays).sum()) == round(0.6 * int(prunable(model.layout).sum()))


def test_what_is_served_is_pruned_as_the_round_before_was() -> None:
    """Not as the next one will be: the weights that it will prune have not been made up for."""
    fleet = Fleet(pruned_learner(begin=1, num_prunings=4))
    for number in (1, 2, 3):
        fleet.round(number, 0)
        own = fleet.learner.served(
            fleet.states[0], fleet.params, fleet.devices[0].samples(0), position=0, device=0
        )
        assert torch.equal(own, fleet.params)


def test_two_of_four() -> None:
    strategy = Pruned(pattern="2:4", num_prunings=0)
    fleet = Fleet(toy_learner(strategy, **SPEC))
    layout = fleet.learner.model.layout
    expected = two_of_four(fleet.params[: layout.num_trained], layout)
    for number in (1, 2, 3):
        fleet.round(number, 0)
        for local in fleet.locals:
            assert torch.equal(local[: layout.num_trained] != 0, expected)


def test_each_layer_for_itself() -> None:
    fleet = Fleet(pruned_learner(begin=1, num_prunings=0, scope="layer"))
    fleet.round(1, 0)
    views = fleet.learner.model.layout.views(fleet.params)
    for name, view in views.items():
        if name.endswith("weight"):
            assert int((view == 0).sum()) == round(0.6 * view.numel())


def test_a_device_without_samples_sends_the_same_zeros() -> None:
    learner = pruned_learner(begin=1, num_prunings=0)
    device = toy_devices(1)[0]
    nothing = type(device)(0, device.store, tuple(ids[:0] for ids in device.ids))
    params, layout = learner.model.initial(), learner.model.layout
    done = learner.fit(
        learner.initial_state(device.store), params, nothing, position=0, server_round=1
    )
    local = params + layout.flatten(done.update.arrays)
    stays = largest(params[: layout.num_trained], layout, 0.6)
    expected = torch.where(stays, params[: layout.num_trained], 0.0)
    assert torch.equal(local[: layout.num_trained], expected)


def test_nothing_is_kept_between_rounds() -> None:
    fleet = Fleet(pruned_learner(begin=1))
    fleet.round(1, 0)
    fleet.round(2, 0)
    assert not any(state.memory["stays"].any() for state in fleet.states)


@pytest.mark.parametrize("names", [n for n in COMPOSED if "+" in n])
def test_combinations_keep_the_contract(names: str) -> None:
    tables = {"pruned": {"begin": 1, "num_prunings": 1}, **COMPOSED[names]}
    findings = check_strategy(lambda: make_strategy(names, tables))
    assert [f for f in findings if f.passed is not True] == []


@pytest.mark.parametrize(
    "arguments",
    [{"pattern": "2:4", "num_prunings": 0}, {"scope": "layer", "begin": 2, "every": 2}],
)
def test_arguments_keep_the_contract(arguments: dict[str, Any]) -> None:
    findings = check_strategy(Pruned, **arguments)
    assert [f for f in findings if f.passed is not True] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1\.0; allowed: 0 to less than 1"),
        ({"initial": 0.7}, r"initial is 0\.7"),
        ({"begin": 0}, "begin is 0"),
        ({"num_prunings": -1}, "num_prunings is -1"),
        ({"every": 0}, "every is 0"),
        ({"scope": "all"}, "scope is 'all'"),
        ({"pattern": "1:4"}, "pattern is '1:4'"),
        ({"pattern": "2:4"}, "in one shot"),
    ],
)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruned(**arguments)
