"""Training of int8 codes, without float weights beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgelearn
from edgelearn.compress.codes import grid, nearest_codes, weights
from edgelearn.compress.quantize import quantize_weight
from edgelearn.continual.int8_train import Int8Train
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Memory, kept
from edgelearn.continual.strategy import ClientStrategy, make_strategy
from edgelearn.device.learner import Learner
from edgelearn.errors import DivergenceError, ScenarioError, StrategyError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.spec import ClientSpec
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import toy_devices, toy_facts, toy_learner, toy_model

WEIGHTS = ("1.weight", "3.weight")  # of the toy's network


def fitted(learner: Learner, params: Tensor | None = None) -> dict[str, Tensor]:
    """The update of one device in one round, by name."""
    device = toy_devices(1)[0]
    start = learner.model.initial() if params is None else params
    state = learner.initial_state(device.store)
    done = learner.fit(state, start, device, position=0, server_round=1)
    return dict(done.update.arrays)


def on_grid(params: Tensor, *, headroom: float = 1.5) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of the toy's weights, by name."""
    views = toy_model().layout.views(params)
    scales = {name: grid(views[name], headroom=headroom) for name in WEIGHTS}
    return {name: (nearest_codes(views[name], s), s) for name, s in scales.items()}


def entered(strategy: Int8Train, given: Tensor | None = None) -> tuple[Tensor, Memory]:
    """Parameters and memory when a round begins."""
    memory = Memory.initial(strategy.declare(toy_model(), toy_facts()))
    params = toy_model().initial() if given is None else given
    return strategy.enter(toy_model(), params, memory)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Note what a device holds after each step."""
    held: list[dict[str, Tensor]] = []
    after_step = Int8Train.after_step

    def spy(self: Int8Train, *args: Any) -> Memory:
        memory = after_step(self, *args)
        held.append({**memory, "after": args[1].clone()})
        return memory

    monkeypatch.setattr(Int8Train, "after_step", spy)
    return held


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_scaled", [True, False])
def test_a_step_is_that_of_the_paper_by_autograd_on_codes(is_scaled: bool) -> None:
    """c - lr s^-2 dL/dc, with dL/dc by autograd on codes as leaves; the biases by plain SGD."""
    lr, strategy = 0.3, Int8Train(rounding="nearest", is_scaled=is_scaled)
    update = fitted(toy_learner(strategy, lr=lr, epochs=1, batch_size=64))
    params, batch = toy_model().initial(), toy_devices(1)[0].samples(0).batch()
    held, views = on_grid(params), toy_model().layout.views(params)
    codes = {name: c.float().requires_grad_() for name, (c, _) in held.items()}
    biases = {name: views[name].clone().requires_grad_() for name in ("1.bias", "3.bias")}
    scale = {name: s[:, None] for name, (_, s) in held.items()}
    hidden = F.linear(batch.x.flatten(1), codes["1.weight"] * scale["1.weight"], biases["1.bias"])
    logits = F.linear(hidden.relu(), codes["3.weight"] * scale["3.weight"], biases["3.bias"])
    leaves = {**codes, **biases}
    found = torch.autograd.grad(F.cross_entropy(logits, batch.y), list(leaves.values()))
    by = dict(zip(leaves, found, strict=True))
    for name in WEIGHTS:
        factor = 1 / scale[name] ** 2 if is_scaled else 1.0
        target = codes[name] - lr * factor * by[name]
        change = (target.detach().round() - codes[name]).detach()
        assert bool(change.any()) == is_scaled  # unscaled, no code comes near the next
        torch.testing.assert_close(update[name], change * scale[name], rtol=0, atol=1e-6)
    for name in biases:
        torch.testing.assert_close(update[name], -lr * by[name], rtol=1e-4, atol=1e-6)


def test_all_that_is_left_of_a_step_is_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    held = spied(monkeypatch)
    learner = toy_learner(Int8Train(), lr=0.5)
    fitted(learner)
    assert len(held) >= 6
    layout, start = learner.model.layout, on_grid(learner.model.initial())
    for before, memory in zip([None, *held], held, strict=False):
        assert memory["codes"].dtype == torch.int8
        assert int(memory["codes"].short().abs().max()) <= 127
        views, place = layout.views(memory["after"]), 0
        for name in WEIGHTS:
            codes = memory["codes"][place : place + views[name].numel()].view_as(views[name])
            assert torch.equal(views[name], weights(codes, start[name][1]))
            place += codes.numel()
        if before is not None:
            assert not torch.equal(before["codes"], memory["codes"])
            assert torch.equal(before["scales"], memory["scales"])


def test_a_network_sees_codes_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, seen = toy_learner(Int8Train(), lr=0.5), []
    forward = FlatModel.forward

    def spy(self: FlatModel, params: Tensor, x: Tensor) -> Tensor:
        seen.append(params.detach().clone())
        return forward(self, params, x)

    monkeypatch.setattr(FlatModel, "forward", spy)
    fitted(learner)
    scales = {name: s[:, None] for name, (_, s) in on_grid(learner.model.initial()).items()}
    assert len(seen) >= 6
    for params in seen:
        for name, scale in scales.items():
            ratio = learner.model.layout.views(params)[name] / scale
            assert float((ratio - ratio.round()).abs().max()) < 1e-4
            assert float(ratio.abs().max()) < 127.001


def test_unscaled_no_code_changes_and_scaled_they_do() -> None:
    for rounding in ("stochastic", "nearest"):
        changed = {}
        for is_scaled in (False, True):
            strategy = Int8Train(rounding=rounding, is_scaled=is_scaled)
            update = fitted(toy_learner(strategy, lr=0.05))
            changed[is_scaled] = sum(int(update[name].count_nonzero()) for name in WEIGHTS)
            assert update["3.bias"].any()  # what is no code trains anyway
        assert changed[False] == 0
        assert changed[True] > 100  # of 160


@pytest.mark.parametrize(("rounding", "mean"), [("nearest", 0.0), ("stochastic", 0.6)])
def test_small_moves_are_lost_to_the_nearest_and_kept_in_the_mean(
    rounding: str, mean: float
) -> None:
    """Three moves of a fifth of a step: no fraction is carried from one to the next."""
    strategy, model, moved = Int8Train(rounding=rounding), toy_model(), []
    for seed in range(30):
        torch.manual_seed(seed)
        params, memory = entered(strategy)
        begun, step = params, torch.zeros_like(params)
        model.layout.views(step)["1.weight"].add_(0.2 * memory["scales"][:8, None])
        for _ in range(3):
            after = strategy.proximal(params + step, memory, lr=0.1)
            memory = strategy.after_step(params, after, step, memory)
            params = after
        change = model.layout.views(params - begun)["1.weight"]
        moved.append(change / memory["scales"][:8, None])
    assert float(torch.stack(moved).mean()) == pytest.approx(mean, abs=0.05)


def test_a_step_that_is_not_finite_is_an_error() -> None:
    strategy = Int8Train()
    params, memory = entered(strategy)
    params[3] = float("nan")
    with pytest.raises(DivergenceError, match="not finite"):
        strategy.proximal(params, memory, lr=0.1)


# -- in a federation -------------------------------------------------------------------------------


def test_a_device_begins_with_the_codes_that_the_runtime_serves() -> None:
    params, memory = entered(Int8Train(headroom=1.0))
    views = toy_model().layout.views(toy_model().initial())
    served = [quantize_weight(views[name]) for name in WEIGHTS]
    assert torch.equal(memory["codes"], torch.cat([codes.flatten() for codes, _ in served]))
    assert torch.equal(memory["scales"], torch.cat([scale for _, scale in served]))
    assert torch.equal(memory["rest"], torch.cat([views["1.bias"], views["3.bias"]]))
    entering = toy_model().layout.views(params)
    assert all(torch.equal(entering[n], weights(*s)) for n, s in zip(WEIGHTS, served, strict=True))


def test_what_is_sent_is_whole_steps_and_exactly_zero_where_no_code_changed() -> None:
    start = toy_model().initial()
    update = fitted(toy_learner(Int8Train(), lr=0.02))
    for name, (_, scale) in on_grid(start).items():
        steps = update[name] / scale[:, None]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        still = steps.round() == 0
        assert 0.1 < float(still.float().mean()) < 0.9
        assert not update[name][still].any()  # rounding on arrival is not sent


def test_the_server_keeps_what_is_less_than_a_step() -> None:
    """One device of five moves a code: the mean is a fifth of a step, and is there next round."""
    strategy, model = Int8Train(), toy_model()
    given = model.initial()
    for _ in range(5):
        params, memory = entered(strategy, given)
        moved = params.clone()
        weight, scale = model.layout.views(moved)["1.weight"], memory["scales"][0]
        weight[0, 0] += scale * (-1 if weight[0, 0] > 0 else 1)
        sent = []
        for local in (moved, *[params] * 4):
            passage = Passage(model, given, local, toy_devices(1)[0].samples(0), 1, 0.1)
            sent.append(strategy.leave(passage, memory)[0])
        given = torch.stack(sent).mean(0)
    before = model.layout.views(model.initial())["1.weight"]
    after = model.layout.views(given)["1.weight"]
    assert abs(float(after[0, 0] - before[0, 0])) == pytest.approx(float(scale), rel=1e-3)
    torch.testing.assert_close(after.flatten()[1:], before.flatten()[1:])


def test_of_one_device_the_runtime_serves_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without headroom, in channels whose largest weight is what it was; else on a finer grid."""
    held = spied(monkeypatch)
    learner = toy_learner(Int8Train(headroom=1.0), lr=0.1)
    start = learner.model.initial()
    params = start + learner.model.layout.flatten(fitted(learner))
    x = toy_devices(1)[0].samples(0).batch().x
    served = Int8Runtime().prepare(learner.model, params).calibrated(x).tensors
    place, num_alike, num_changed = 0, 0, 0
    for name, (first, scale) in on_grid(start, headroom=1.0).items():
        layer = name.removesuffix("weight")
        theirs = served[f"{layer}codes"].to(torch.int8)
        own = held[-1]["codes"][place : place + theirs.numel()].view_as(theirs)
        place += theirs.numel()
        # A weight is where its code says, but for the rounding when it arrived.
        apart = (learner.model.layout.views(params)[name] - weights(own, scale)) / scale[:, None]
        assert float(apart.abs().max()) < 0.5001
        for channel, is_alike in enumerate(torch.isclose(served[f"{layer}scale"], scale)):
            if is_alike:
                assert torch.equal(theirs[channel], own[channel])
                num_alike += 1
                num_changed += int((own[channel] != first[channel]).sum())
    assert 0 < num_alike < 12
    assert num_changed > 10


# -- what trains -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "trained"),
    [
        ("all", {"1.weight", "1.bias", "3.weight", "3.bias"}),
        ("biases", {"1.bias", "3.bias"}),
        ("3", {"3.weight", "3.bias"}),
        (["3", "biases"], {"1.bias", "3.weight", "3.bias"}),
    ],
)
def test_a_sparse_update_leaves_the_rest_as_it_is(scope: Any, trained: set[str]) -> None:
    strategy = make_strategy(
        "ewc+int8-train", {"int8-train": {"scope": scope}, "ewc": {"strength": 1.0}}
    )
    learner = toy_learner(strategy, weight_decay=0.1)  # which moves what has no gradient, too
    update = fitted(learner)
    assert {name for name, change in update.items() if change.any()} == trained


def test_a_scope_has_to_be_there() -> None:
    with pytest.raises(StrategyError, match=r"scope is 'head'; allowed: all, biases, .* 1, 2, 3"):
        toy_learner(Int8Train(scope="head"))
    with pytest.raises(StrategyError, match="scope is 2: nothing that trains is in it"):
        toy_learner(Int8Train(scope="2"))


def test_what_a_device_needs_is_a_byte_a_weight() -> None:
    strategy = Int8Train()
    assert kept(strategy.declare(toy_model(), toy_facts())) == {}
    learner = toy_learner(strategy)
    codes, scales, biases, fingerprint, table = 16 * 8 + 8 * 4, 4 * 12, 4 * 12, 8, 4 * 4 * 4
    assert learner.memory_bytes == codes + scales + biases + fingerprint + table
    big = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(1024, 256), nn.Linear(256, 10)))
    needed = sum(s.stored_bytes for s in strategy.declare(big, toy_facts()).values())
    assert needed < 1.02 * big.layout.size  # of 4 bytes in float32


def test_convolutions_and_norms() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    )
    learner = Learner(
        FlatModel(module),
        Int8Train(),
        ClientSpec(strategy="int8-train", epochs=4, batch_size=4, lr=0.1),
        toy_facts(),
        seed=0,
    )
    assert learner.strategy.declare(learner.model, toy_facts())["codes"].shape == (12 + 108,)
    update = fitted(learner)
    assert all(change.any() for change in update.values())  # running statistics, too
    start = learner.model.layout.views(learner.model.initial())["0.weight"]
    steps = update["0.weight"] / grid(start, headroom=1.5).view(-1, 1, 1, 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_layers_that_the_runtime_leaves_float_are_left_so() -> None:
    class Own(nn.Linear):
        pass

    model = FlatModel(nn.Sequential(nn.Flatten(), Own(16, 5), nn.BatchNorm1d(5)))
    declared = Int8Train().declare(model, toy_facts())
    assert declared["codes"].shape == (0,)
    assert declared["rest"].shape == (16 * 5 + 3 * 5,)


# -- whole runs ------------------------------------------------------------------------------------


def accuracy(strategy: str, args: dict[str, Any]) -> float:
    scenario = edgelearn.load(
        "split-digits",
        data={"max_train": 400, "max_test": 200},
        fleet={"num_devices": 4, "cohort": 4},
        stream={"num_experiences": 1, "rounds_per_experience": 4},
        client={"strategy": strategy, "args": args, "epochs": 2, "lr": 0.1},
    )
    return edgelearn.simulate(scenario).scores().average_accuracy


def test_it_comes_close_to_float_and_unscaled_it_does_not() -> None:
    in_float, scaled = accuracy("naive", {}), accuracy("int8-train", {})
    unscaled = accuracy("int8-train", {"is_scaled": False})
    held_in = accuracy("int8-train", {"headroom": 1.0})  # initial weights are small
    assert in_float > 0.7
    assert held_in < scaled - 0.1
    assert scaled > in_float - 0.1
    assert unscaled < in_float - 0.3


# -- joined with others ----------------------------------------------------------------------------

JOINED: dict[str, dict[str, Any]] = {
    "replay+int8-train": {"replay": {"capacity": 8}},
    "int8-train+ewc": {"ewc": {"strength": 10.0}},
    "ewc+int8-train": {"ewc": {"strength": 1.0, "step": "explicit"}},
    "int8-train+qat": {},
    "int8-train+pruned": {"pruned": {"num_prunings": 0}},
    "agem+int8-train": {"agem": {"capacity": 8}},
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_with_others_it_keeps_to_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = spied(monkeypatch)
    learner = toy_learner(make_strategy(name, JOINED[name]))
    update = fitted(learner)
    layout, place = toy_model().layout, 0
    for key, (_, scale) in on_grid(toy_model().initial()).items():
        after = layout.views(held[-1]["after"])[key]
        codes = held[-1]["codes"][place : place + after.numel()].view_as(after)
        assert torch.equal(after, weights(codes, scale))
        assert update[key].any()
        place += after.numel()


def test_joined_with_replay_and_a_penalty_it_keeps_the_contract() -> None:
    tables = {"replay": {"capacity": 8}, "ewc": {"strength": 10.0}}
    findings = check_strategy(lambda: make_strategy("ewc+replay+int8-train", tables))
    assert [f for f in findings if f.passed is False] == []


def test_a_penalty_pulls_codes() -> None:
    """EWC so strong that nothing moves: its pull comes before the rounding."""
    tables = {"ewc": {"strength": 1e9}, "int8-train": {"rounding": "nearest"}}
    learner, device = toy_learner(make_strategy("ewc+int8-train", tables)), toy_devices(1)[0]
    params, layout = learner.model.initial(), learner.model.layout
    state = learner.initial_state(device.store)
    first = learner.fit(state, params, device, position=0, server_round=1)
    params = params + layout.flatten(first.update.arrays)
    state = learner.consolidate(first.state, params, device, upto=1)
    second = learner.fit(state, params, device, position=1, server_round=2)
    matters = layout.views(state.memory["ewc.fisher"])
    for name in WEIGHTS:
        assert first.update.arrays[name].any()
        assert not second.update.arrays[name][matters[name] > 1e-4].any()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("int8-train+fedper", "something moved them off these after the last step; name it before"),
        (
            "int8-train+reptile",
            "something moved them off these after the last step; name it before",
        ),
        ("fedper+int8-train", "something put others in their place; name it behind"),
        ("fedrep+int8-train", "something put others in their place; name it behind"),
    ],
)
def test_what_contradicts_codes_is_refused(name: str, what: str) -> None:
    learner, device = toy_learner(make_strategy(name, {})), toy_devices(1)[0]

    def two_rounds() -> None:
        state, params = learner.initial_state(device.store), learner.model.initial()
        for server_round in (1, 2):
            done = learner.fit(state, params, device, position=0, server_round=server_round)
            state, params = done.state, params + learner.model.layout.flatten(done.update.arrays)

    with pytest.raises(StrategyError, match=what):
        two_rounds()


def test_a_part_that_trains_by_itself_is_refused() -> None:
    with pytest.raises(ScenarioError, match="so int8-train can't change the steps"):
        make_strategy("gdumb+int8-train", {})


@pytest.mark.parametrize("spec", [{"momentum": 0.9}, {"optimizer": "adam"}])
def test_an_optimizer_with_a_state_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match="no room for an optimizer's state"):
        toy_learner(Int8Train(), **spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, "rounding is 'up'; allowed: stochastic, nearest"),
        ({"scope": []}, "scope is"),
        ({"scope": ""}, "scope is ''"),
        ({"scope": [3]}, "scope is"),
        ({"headroom": 0.5}, "headroom is 0.5; at least 1"),
        ({"headroom": float("nan")}, "headroom is nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Train(**arguments)


def test_the_ablation_keeps_the_contract() -> None:
    findings = check_strategy(lambda: Int8Train(is_scaled=False, rounding="nearest", scope="3"))
    assert [f for f in findings if f.passed is False] == []


# -- the right to draw when a step is rounded ------------------------------------------------------


class DrawsUnseeded(ClientStrategy):
    """Devices may train in a stack, where nothing seeds torch's generator for each."""

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        return params + 1e-6 * torch.rand(params.shape)


class DrawsSeeded(DrawsUnseeded):
    def view(self, model: FlatModel) -> FlatModel:
        return model


def test_only_who_trains_device_by_device_may_draw_in_a_proximal_step() -> None:
    broken = {f.check for f in check_strategy(DrawsUnseeded) if f.passed is False}
    assert "seeded" in broken
    assert [f for f in check_strategy(DrawsSeeded) if f.passed is False] == []
