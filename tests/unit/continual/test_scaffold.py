"""SCAFFOLD against its definition, written out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Memory
from edgelearn.continual.naive import Naive
from edgelearn.continual.scaffold import Scaffold
from edgelearn.continual.strategy import Facts, make_strategy, supervised_loss
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.subject import Subject
from edgelearn.testing.toy import toy_learner

FACTS = Facts(1, 1, 1)
LR, STEPS = 0.1, 5


@dataclass(frozen=True)
class Quadratic:
    """f(x) = stiffness / 2 (x - center)^2: one device's objective."""

    stiffness: float
    center: float

    def gradient(self, x: float) -> float:
        return self.stiffness * (x - self.center)


FLEET = (Quadratic(1.0, -1.0), Quadratic(5.0, 2.0), Quadratic(0.2, 4.0), Quadratic(2.0, 0.0))


def by_the_paper(cohorts: list[list[int]]) -> tuple[float, float]:
    """Algorithm 1 with option II, in plain numbers: x and c at the end."""
    x, c, own = 0.0, 0.0, [0.0] * len(FLEET)
    for cohort in cohorts:
        moves, changes = [], []
        for i in cohort:
            y = x
            for _ in range(STEPS):
                y -= LR * (FLEET[i].gradient(y) - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * LR)
            moves.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x += sum(moves) / len(cohort)
        c += len(cohort) / len(FLEET) * sum(changes) / len(cohort)
    return x, c


def by_the_strategy(cohorts: list[list[int]]) -> tuple[float, float]:
    """The same through the hooks; the server only averages."""
    strategy = Scaffold()
    plain = FlatModel(nn.Linear(1, 1, bias=False))
    shapes = {name: spec.shape for name, spec in strategy.shares(plain, FACTS).items()}
    model = FlatModel(plain.module, shapes)
    nothing = Samples(SharedSamples(torch.zeros(0, 1), torch.zeros(0), Encoding()), torch.zeros(0))
    params = torch.zeros(model.layout.size)
    memories = [Memory.initial(strategy.declare(model, FACTS)) for _ in FLEET]
    for cohort in cohorts:
        sent = []
        for i in cohort:
            given, memory = strategy.enter(model, params, memories[i])
            current = given[:1].clone()
            for _ in range(STEPS):
                gradient = torch.tensor([FLEET[i].gradient(float(current))])
                current = current - LR * strategy.adjust(gradient, current, memory)
            passage = Passage(
                model=model,
                given=params,
                local=torch.cat([current, given[1:]]),
                samples=nothing,
                num_steps=STEPS,
                lr=LR,
                cohort=len(cohort),
                num_devices=len(FLEET),
            )
            local, memory = strategy.leave(passage, memory)
            memories[i] = memory.replace(begin=torch.zeros(1), correction=torch.zeros(1))
            sent.append(local)
        params = torch.stack(sent).mean(0)
    return float(params[0]), float(model.layout.shared(params)["control"])


@pytest.mark.parametrize(
    "cohorts",
    [[[0, 1, 2, 3]], [[0, 1, 2, 3]] * 7, [[0, 1], [2, 3], [1, 2], [0, 3]] * 3],
    ids=["one round", "whole fleet", "cohorts"],
)
def test_it_is_algorithm_1(cohorts: list[list[int]]) -> None:
    assert by_the_strategy(cohorts) == pytest.approx(by_the_paper(cohorts), rel=1e-4)


def test_it_finds_the_optimum_that_averaging_misses() -> None:
    optimum = sum(f.stiffness * f.center for f in FLEET) / sum(f.stiffness for f in FLEET)
    found, control = by_the_strategy([[0, 1, 2, 3]] * 300)
    assert found == pytest.approx(optimum, abs=1e-4)
    assert control == pytest.approx(0.0, abs=1e-4)  # the mean gradient vanishes there
    # FedAvg's fixed point: the mean of what each device comes to from it
    keep = [(1 - LR * f.stiffness) ** STEPS for f in FLEET]
    pulls = [(1 - k) * f.center for k, f in zip(keep, FLEET, strict=True)]
    averaged = sum(pulls) / sum(1 - k for k in keep)
    assert abs(averaged - optimum) > 0.1


def whole_batch_step() -> tuple[Tensor, Tensor, Memory, Tensor]:
    """One device's first round of one step: what it sends, c_i, and the gradient by hand."""
    device = Subject(Scaffold).new_device()
    learner = toy_learner(Scaffold(), epochs=1, batch_size=1000)
    learner = replace(learner, facts=replace(learner.facts, num_devices=8, cohort=2))
    params = learner.model.initial()
    fit = learner.fit(
        learner.initial_state(device.store), params, device, position=0, server_round=1
    )
    batch = device.samples(0).batch()
    leaf = params[: learner.model.layout.num_trained].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(supervised_loss(learner.model(leaf, batch.x), batch), leaf)
    delta = learner.model.layout.flatten(fit.update.arrays)
    return delta, gradient, fit.state.memory, learner.model.layout.shared(delta)["control"]


def test_after_one_step_the_control_variate_is_the_gradient() -> None:
    delta, gradient, memory, sent = whole_batch_step()
    size = len(gradient)
    torch.testing.assert_close(memory["own"], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(delta[:size], -0.1 * gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sent, gradient / 4, rtol=1e-4, atol=1e-6)  # 2 of 8 devices
    assert not memory["correction"].any()  # of that round alone


def test_a_lone_device_does_plain_sgd() -> None:
    ends = []
    for strategy in (Scaffold(), Naive()):
        learner, device = toy_learner(strategy), Subject(Naive).new_device()
        params, state = learner.model.initial(), learner.initial_state(device.store)
        for server_round in range(1, 6):
            fit = learner.fit(state, params, device, position=0, server_round=server_round)
            state, params = fit.state, params + learner.model.layout.flatten(fit.update.arrays)
        ends.append(params[: learner.model.layout.num_network])
        if isinstance(strategy, Scaffold):
            control = learner.model.layout.shared(params)["control"]
            torch.testing.assert_close(control, state.memory["own"])
            assert control.norm() > 0.01
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_a_device_without_samples_changes_nothing() -> None:
    subject = Subject(Scaffold)
    state, params = subject.at_start(device := subject.odd_devices()["no samples"])
    fit = subject.fit(state, params, device, 0)
    assert not any(value.any() for value in fit.update.arrays.values())
    assert not fit.state.memory["own"].any()


def test_what_travels_and_what_stays() -> None:
    learner = toy_learner(Scaffold())
    layout = learner.model.layout
    assert layout.size == 2 * layout.num_network
    assert learner.memory_bytes == 3 * 4 * layout.num_trained
    assert [name for name, spec in learner.declaration.items() if spec.is_kept] == ["own"]


@pytest.mark.parametrize("spec", [{"optimizer": "adam"}, {"momentum": 0.9}])
@pytest.mark.parametrize("name", ["scaffold", "replay+scaffold"])
def test_steps_that_are_no_gradients_are_refused(name: str, spec: dict[str, object]) -> None:
    with pytest.raises(ScenarioError, match="needs sgd with momentum 0; got"):
        toy_learner(make_strategy(name, {}), **spec)


def test_it_joins_others() -> None:
    findings = check_strategy(lambda: make_strategy("replay+scaffold", {}))
    assert not [finding for finding in findings if finding.passed is False]


@pytest.mark.parametrize("name", ["scaffold+fedper", "fedper+scaffold"])
def test_a_head_of_ones_own_is_no_drift(name: str) -> None:
    device = Subject(Scaffold).new_device()
    learner = toy_learner(make_strategy(name, {}), epochs=1, batch_size=1000)
    layout = learner.model.layout
    params, state = learner.model.initial(), learner.initial_state(device.store)
    for server_round in (1, 2):
        began = params[: layout.num_trained].clone()
        began[136:] += state.memory["fedper.head"]  # behind the toy's first layer
        fit = learner.fit(state, params, device, position=0, server_round=server_round)
        state, params = fit.state, params + layout.flatten(fit.update.arrays)
    batch = device.samples(0).batch()
    leaf = began.requires_grad_()
    (gradient,) = torch.autograd.grad(supervised_loss(learner.model(leaf, batch.x), batch), leaf)
    own = state.memory["scaffold.own"]
    torch.testing.assert_close(own[:136], gradient[:136], rtol=1e-3, atol=1e-5)
    # Who comes after the head knows it as its own; who comes before never sees it.
    expected = gradient[136:] if name == "fedper+scaffold" else torch.zeros(36)
    torch.testing.assert_close(own[136:], expected, rtol=1e-3, atol=1e-5)
