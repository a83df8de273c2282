"""MOON's contrast against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgelearn.continual.memory import Memory
from edgelearn.continual.moon import Moon
from edgelearn.continual.naive import Naive
from edgelearn.continual.strategy import make_strategy, supervised_loss
from edgelearn.scenario.samples import Batch
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.subject import Subject
from edgelearn.testing.toy import toy_devices, toy_learner, toy_model


def features_by_hand(params: Tensor, x: Tensor) -> Tensor:
    weight, bias = params[:128].view(8, 16), params[128:136]
    return (x.flatten(1) @ weight.T + bias).relu()


def batch_of() -> Batch:
    return toy_devices()[0].samples(0).batch()


def memory_of(previous: Tensor, everyones: Tensor) -> Memory:
    return Memory({"previous": previous, "everyones": everyones})


def test_the_loss_is_equation_3() -> None:
    model, batch = toy_model(), batch_of()
    own, previous, everyones = (
        model.initial() + 0.3 * torch.randn(model.layout.size) for _ in range(3)
    )
    found = Moon(mu=0.7, temperature=0.2).loss(model, own, batch, memory_of(previous, everyones))
    terms = []
    for x in batch.x:
        z, z_glob, z_prev = (
            features_by_hand(params, x[None])[0] for params in (own, everyones, previous)
        )
        near = math.exp(float(torch.cosine_similarity(z, z_glob, dim=0)) / 0.2)
        far = math.exp(float(torch.cosine_similarity(z, z_prev, dim=0)) / 0.2)
        terms.append(-math.log(near / (near + far)))
    plain = float(supervised_loss(model(own, batch.x), batch))
    assert float(found) == pytest.approx(plain + 0.7 * sum(terms) / len(terms), rel=1e-4)


def test_weights_of_samples_count_in_both_terms() -> None:
    model, batch = toy_model(), batch_of()
    own, previous, everyones = (torch.randn(model.layout.size) for _ in range(3))
    memory = memory_of(previous, everyones)
    only_first = torch.zeros(len(batch))
    only_first[0] = 1
    weighted = Batch(batch.x, batch.y, only_first)
    alone = Batch(batch.x[:1], batch.y[:1])
    found, expected = (Moon().loss(model, own, b, memory) for b in (weighted, alone))
    torch.testing.assert_close(found, expected)


def test_a_device_that_is_new_has_nothing_to_contrast_with() -> None:
    device = toy_devices()[0]
    ends = []
    for strategy in (Moon(mu=5.0), Naive()):
        learner = toy_learner(strategy)
        state, params = learner.initial_state(device.store), learner.model.initial()
        fit = learner.fit(state, params, device, position=0, server_round=1)
        ends.append((learner.model.layout.flatten(fit.update.arrays), fit))
    (delta, fit), (plain, _) = ends
    torch.testing.assert_close(delta, plain, rtol=0, atol=1e-6)
    assert fit.state.memory["has_previous"].all()
    torch.testing.assert_close(fit.state.memory["previous"], toy_model().initial() + delta)
    assert not fit.state.memory["everyones"].any()  # of that round alone


def test_from_the_second_round_on_it_pulls_towards_the_global_features() -> None:
    device, x = toy_devices()[0], batch_of().x

    def closeness(mu: float) -> float:
        learner = toy_learner(Moon(mu=mu))
        state, params = learner.initial_state(device.store), learner.model.initial()
        fit = learner.fit(state, params, device, position=0, server_round=1)
        # The global network stays where it was, so it is the device that drifts.
        fit = learner.fit(fit.state, params, device, position=0, server_round=2)
        local = params + learner.model.layout.flatten(fit.update.arrays)
        both = features_by_hand(local, x), features_by_hand(params, x)
        return float(torch.cosine_similarity(*both, dim=1).mean())

    assert closeness(20.0) > closeness(0.0)


def test_it_joins_others() -> None:
    for name in ("replay+moon", "fedprox+moon"):
        findings = check_strategy(lambda name=name: make_strategy(name, {}))
        assert not [finding for finding in findings if finding.passed is False]


def test_combined_it_adds_to_cross_entropy_once() -> None:
    subject = Subject(lambda: make_strategy("moon+fedprox", {"fedprox": {"mu": 0.0}}))
    both, _ = subject.run()
    alone, _ = Subject(Moon).run()
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mu": -1.0}, "mu is -1.0; at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moon(**arguments)
