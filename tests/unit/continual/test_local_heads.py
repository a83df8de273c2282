"""FedPer and FedRep: a head of one's own on a body that all share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgelearn.continual.local_heads import FedPer, FedRep, num_in_head
from edgelearn.continual.naive import Naive
from edgelearn.continual.strategy import ClientStrategy, make_strategy
from edgelearn.device.learner import Learner
from edgelearn.device.state import DeviceState, Fit
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.subject import Subject
from edgelearn.testing.toy import toy_devices, toy_learner, toy_model

BODY = 16 * 8 + 8  # the toy's first layer; the head is the rest
HEAD = 8 * 4 + 4


def first_fit(strategy: ClientStrategy, **spec: object) -> tuple[Learner, Tensor, Fit]:
    learner, device = toy_learner(strategy, **spec), toy_devices()[0]
    params = learner.model.initial()
    fit = learner.fit(
        learner.initial_state(device.store), params, device, position=0, server_round=1
    )
    return learner, learner.model.layout.flatten(fit.update.arrays), fit


def served(learner: Learner, state: DeviceState, params: Tensor) -> Tensor:
    device = toy_devices()[0]
    return learner.served(state, params, device.samples(0), position=0, device=0)


@pytest.mark.parametrize("strategy", [FedPer(), FedRep(head_steps=2)])
def test_the_global_head_never_changes(strategy: ClientStrategy) -> None:
    params, states = Subject(lambda: strategy).run()
    start = toy_model().initial()
    assert num_in_head(toy_model()) == HEAD
    assert torch.equal(params[BODY:], start[BODY:])
    assert not torch.equal(params[:BODY], start[:BODY])
    heads = [state.memory["head"] for state in states]
    assert all(head.any() for head in heads)
    assert not torch.equal(heads[0], heads[1])


def test_a_device_answers_with_its_own_head() -> None:
    learner, _, fit = first_fit(FedPer())
    params = torch.randn(learner.model.layout.size)
    own = served(learner, fit.state, params)
    assert torch.equal(own[:BODY], params[:BODY])
    torch.testing.assert_close(own[BODY:], params[BODY:] + fit.state.memory["head"])
    fresh = learner.initial_state(toy_devices()[0].store)
    assert torch.equal(served(learner, fresh, params), params)


def test_alone_it_serves_what_plain_training_comes_to() -> None:
    ends = []
    for strategy in (FedPer(), Naive()):
        learner, device = toy_learner(strategy), toy_devices()[0]
        params, state = learner.model.initial(), learner.initial_state(device.store)
        for server_round in range(1, 5):
            fit = learner.fit(state, params, device, position=0, server_round=server_round)
            state, params = fit.state, params + learner.model.layout.flatten(fit.update.arrays)
        ends.append(served(learner, state, params))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


HARD = {"momentum": 0.9, "weight_decay": 0.3}  # what moves parameters without a gradient


@pytest.mark.parametrize("spec", [{}, HARD, {"optimizer": "adamw", "weight_decay": 0.3}])
def test_first_the_head_alone_then_the_body_alone(spec: dict[str, object]) -> None:
    # 10 samples by 4: three steps in an epoch, six in all.
    _, only_head, long = first_fit(FedRep(head_steps=6), **spec)
    assert not only_head.any()
    assert long.update.metrics["num-steps"] == 6
    assert long.state.memory["head"].any()
    _, _, three = first_fit(FedRep(head_steps=3), **spec, epochs=1)
    _, both, more = first_fit(FedRep(head_steps=3), **spec, epochs=2)
    assert torch.equal(three.state.memory["head"], more.state.memory["head"])
    assert both[:BODY].any()
    assert not both[BODY:].any()


def test_the_heads_steps_are_those_of_training_with_the_body_held() -> None:
    _, _, fit = first_fit(FedRep(head_steps=100), epochs=1, batch_size=100)
    model, batch = toy_model(), toy_devices()[0].samples(0).batch()
    params = model.initial().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(params, batch.x), batch.y)
    (gradient,) = torch.autograd.grad(loss, params)
    expected = -0.1 * gradient[BODY:]
    torch.testing.assert_close(fit.state.memory["head"], expected, rtol=1e-4, atol=1e-6)


def test_the_round_needs_more_than_is_kept() -> None:
    kept = {name: spec for name, spec in toy_learner(FedRep()).declaration.items() if spec.is_kept}
    assert list(kept) == ["head"]
    assert kept["head"].stored_bytes == 4 * HEAD


@pytest.mark.parametrize("name", ["replay+fedper", "replay+fedrep", "fedprox+fedrep"])
def test_they_join_others(name: str) -> None:
    findings = check_strategy(lambda: make_strategy(name, {}))
    assert not [finding for finding in findings if finding.passed is False]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="head_steps is 0; at least 1"):
        FedRep(head_steps=0)


def test_the_part_that_is_held_leaves_no_trace_in_the_optimizer() -> None:
    # Momentum of a body's gradient from the head's steps would move it in its own first step.
    strategy, model = FedRep(head_steps=1), toy_model()
    memory = toy_learner(strategy).initial_state().memory
    params, memory = strategy.enter(model, model.initial(), memory)
    ones = torch.ones(BODY + HEAD)
    first = strategy.adjust(ones, params, memory)
    memory = strategy.after_step(params, params, first, memory)
    then = strategy.adjust(ones, params, memory)
    assert torch.equal(first, torch.cat([torch.zeros(BODY), torch.ones(HEAD)]))
    assert torch.equal(then, 1 - first)
