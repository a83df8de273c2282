from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.ewc import EWC
from edgelearn.continual.fisher import empirical_fisher, true_fisher
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.strategy import Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples

FACTS = Facts(num_experiences=3, num_classes=3, sample_bytes=9)


def model():
    torch.manual_seed(0)
    return FlatModel(nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)))


def experience(seed, num=20):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (num, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 3, (num,), generator=generator)
    store = SharedSamples(x, y, Encoding(1 / 255))
    return Samples(store, torch.arange(num, dtype=torch.int32))


def anchors(m, count=3):
    generator = torch.Generator().manual_seed(9)
    return [
        m.initial() + 0.3 * torch.randn(m.layout.size, generator=generator) for _ in range(count)
    ]


def initial(strategy, m):
    return Memory.initial(strategy.declare(m, FACTS))


def learn(strategy, m, params, sizes=(20, 20, 20)):
    memory = initial(strategy, m)
    for seed, (theta, size) in enumerate(zip(params, sizes, strict=True)):
        memory = strategy.finish(m, theta, experience(seed, size), memory, torch.Generator())
    check(memory, strategy.declare(m, FACTS))
    return memory


def value_and_gradient(penalty, theta):
    theta = theta.clone().requires_grad_()
    value = penalty(theta)
    (gradient,) = torch.autograd.grad(value, theta)
    return value.detach(), gradient


# -- the penalty -----------------------------------------------------------------------------------


def test_merged_quadratics_are_the_sum_of_all():
    m = model()
    strategy = EWC(strength=7.0, mode="separate")
    params = anchors(m)
    memory = learn(strategy, m, params)
    fishers = [empirical_fisher(m, p, experience(seed)) for seed, p in enumerate(params)]

    def explicit(theta):
        terms = [(f * (theta - p) ** 2).sum() for f, p in zip(fishers, params, strict=True)]
        return 7.0 / 2 * sum(terms)

    for theta in (*anchors(m, 5), params[0], memory["anchor"], torch.zeros(m.layout.size)):
        merged = value_and_gradient(lambda t: strategy.penalty(t, memory), theta)
        expected = value_and_gradient(explicit, theta)
        torch.testing.assert_close(merged[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged[1], expected[1], rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow():
    m = model()
    strategy = EWC(mode="separate")
    size = m.layout.num_trained
    for count in (1, 3):
        memory = learn(strategy, m, anchors(m, count), (20,) * count)
        assert {name: tuple(t.shape) for name, t in memory.items()} == {
            "fisher": (size,),
            "anchor": (size,),
            "constant": (1,),
        }


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_online_keeps_one_fisher_around_the_latest_parameters(decay):
    m = model()
    params = anchors(m)
    memory = learn(EWC(mode="online", decay=decay), m, params)
    first, second, third = (
        empirical_fisher(m, p, experience(seed)) for seed, p in enumerate(params)
    )
    torch.testing.assert_close(memory["fisher"], decay**2 * first + decay * second + third)
    assert torch.equal(memory["anchor"], params[-1])
    assert not memory["constant"].any()
    assert memory["anchor"].data_ptr() != params[-1].data_ptr()


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_a_first_experience_is_the_same_in_both_modes(mode):
    m = model()
    params = anchors(m, 1)
    memory = learn(EWC(mode=mode), m, params, (20,))
    torch.testing.assert_close(memory["fisher"], empirical_fisher(m, params[0], experience(0)))
    torch.testing.assert_close(memory["anchor"], params[0])
    assert float(memory["constant"]) == 0


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_an_experience_without_samples_changes_nothing(mode):
    m = model()
    params = anchors(m)
    with_gap = learn(EWC(mode=mode), m, params, (20, 0, 20))
    strategy = EWC(mode=mode)
    memory = initial(strategy, m)
    for seed in (0, 2):
        memory = strategy.finish(m, params[seed], experience(seed), memory, torch.Generator())
    assert all(torch.equal(with_gap[name], memory[name]) for name in memory)


def test_finish_leaves_the_former_memory_alone():
    m = model()
    strategy = EWC(mode="separate")
    memory = learn(strategy, m, anchors(m, 1), (20,))
    before = {name: t.clone() for name, t in memory.items()}
    strategy.finish(m, anchors(m)[1], experience(1), memory, torch.Generator())
    assert all(torch.equal(memory[name], before[name]) for name in before)


def test_max_fisher_samples():
    m = model()
    params = anchors(m, 1)
    memory = learn(EWC(max_fisher_samples=6), m, params, (20,))
    few = Samples(experience(0).store, torch.arange(6, dtype=torch.int32))
    torch.testing.assert_close(memory["fisher"], empirical_fisher(m, params[0], few))


@pytest.mark.parametrize("kind", ["empirical", "true", "exact"])
def test_the_estimator_of_the_fisher(kind):
    m, data = model(), experience(0)
    params = anchors(m, 1)[0]
    strategy = EWC(fisher=kind, max_fisher_samples=12)
    memory = strategy.finish(
        m, params, data, initial(strategy, m), torch.Generator().manual_seed(4)
    )
    expected = {
        "empirical": empirical_fisher(m, params, data, max_samples=12),
        "true": true_fisher(m, params, data, torch.Generator().manual_seed(4), max_samples=12),
        "exact": true_fisher(m, params, data, None, max_samples=12),
    }
    assert torch.equal(memory["fisher"], expected.pop(kind))
    assert not any(torch.allclose(memory["fisher"], other) for other in expected.values())


# -- how it is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("mode", ["online", "separate"])
def test_cheap_storage_pulls_nearly_as_much(mode, storage):
    m, lr = model(), 0.1
    params = anchors(m)
    full = learn(EWC(strength=5.0, mode=mode), m, params)
    strategy = EWC(strength=5.0, mode=mode, storage=storage)
    memory = learn(strategy, m, params)
    assert not memory["fisher"].any()  # it is decoded when a round begins
    given = m.initial()
    entered, memory = strategy.enter(m, given, memory)
    assert entered is given
    assert torch.allclose(memory["fisher"], full["fisher"], rtol=0.1, atol=1e-4)
    assert not torch.equal(memory["fisher"], full["fisher"])
    exact = EWC(strength=5.0, mode=mode).proximal(given, full, lr=lr) - given
    found = strategy.proximal(given, memory, lr=lr) - given
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_only_cheap_storage_computes_at_the_beginning_of_a_round():
    assert EWC().is_declared
    assert not EWC().overrides("enter")
    assert EWC(storage="int8").overrides("enter")
    assert EWC(storage="int8").overrides("finish")


# -- the step --------------------------------------------------------------------------------------


def test_the_penalty_is_a_gradient_or_a_proximal_step_and_not_both():
    m = model()
    explicit, proximal = EWC(strength=3.0, step="explicit"), EWC(strength=3.0)
    memory = learn(explicit, m, anchors(m))
    theta, gradients = m.initial(), torch.randn(m.layout.size)
    _, expected = value_and_gradient(lambda t: explicit.penalty(t, memory), theta)
    found = explicit.adjust(gradients, theta, memory) - gradients
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(explicit.proximal(theta, memory, lr=0.1), theta)
    assert torch.equal(proximal.adjust(gradients, theta, memory), gradients)
    assert not torch.equal(proximal.proximal(theta, memory, lr=0.1), theta)


@pytest.mark.parametrize("strength", [0.0, 0.1, 10.0, 1e4])
@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_proximal_step_is_the_argmin(strength, mode):
    m, lr = model(), 0.05
    strategy = EWC(strength=strength, mode=mode)
    memory = learn(strategy, m, anchors(m))
    theta = m.initial()
    doubles = Memory({name: t.double() for name, t in memory.items()})
    z = theta.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = strategy.penalty(z, doubles) * lr + (z - theta.double()).square().sum() / 2
        value.backward()
        return value

    for _ in range(20):
        optimizer.step(closure)
    step = strategy.proximal(theta, memory, lr=lr)
    torch.testing.assert_close(step, z.detach().float(), rtol=1e-4, atol=1e-5)
    if strength == 0:
        assert torch.equal(step, theta)
    assert theta.equal(m.initial())  # the step changes nothing that it was given


def train(strategy, m, memory, *, lr=0.1, steps=60):
    theta, batch = m.initial(), experience(5).batch()
    for _ in range(steps):
        theta = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(strategy.loss(m, theta, batch, memory), theta)
        with torch.no_grad():
            gradient = strategy.adjust(gradient, theta, memory)
            theta = strategy.proximal(theta - lr * gradient, memory, lr=lr)
    return theta.detach()


def test_a_large_lambda_diverges_as_a_gradient_but_not_as_a_proximal_step():
    m, lr = model(), 0.1
    memory = learn(EWC(), m, anchors(m))
    strength = 20 / (lr * float(memory["fisher"].max()))  # lr lambda F = 20 at its largest
    explicit = train(EWC(strength=strength, step="explicit"), m, memory, lr=lr)
    proximal = train(EWC(strength=strength, step="proximal"), m, memory, lr=lr)
    start = (m.initial() - memory["anchor"]).abs().max()
    assert not torch.isfinite(explicit).all() or explicit.abs().max() > 1e6
    stiff = memory["fisher"] > memory["fisher"].max() / 10
    assert (proximal - memory["anchor"])[stiff].abs().max() < start / 5
    assert torch.isfinite(train(EWC(strength=1e30), m, memory, lr=lr)).all()


def test_both_steps_agree_for_a_small_learning_rate():
    m = model()
    memory = learn(EWC(), m, anchors(m))
    both = [
        train(EWC(strength=5.0, step=step), m, memory, lr=0.002, steps=200)
        for step in ("explicit", "proximal")
    ]
    moved = (both[0] - m.initial()).norm()
    assert (both[0] - both[1]).norm() < 0.01 * moved


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"mode": "both"}, "mode is 'both'; allowed: online, separate"),
        ({"step": "big"}, "step is 'big'; allowed: proximal, explicit"),
        ({"strength": -1.0}, "strength is -1.0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"decay": 1.5}, "decay is 1.5; allowed: 0 to 1"),
        ({"max_fisher_samples": -1}, "max_fisher_samples is -1"),
        ({"fisher": "false"}, "fisher is 'false'; allowed: empirical, true, exact"),
        ({"storage": "int4"}, "storage is 'int4'; allowed: float32, float16, int8"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        EWC(**kwargs)
