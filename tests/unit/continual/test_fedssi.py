"""FedSSI: the surrogate's way, its charges, and the penalty that comes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.fedssi import FedSSI
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Facts, make_strategy, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.scenario.stream import Experience
from edgelearn.testing.contract import check_strategy

FACTS = Facts(num_experiences=3, num_classes=3, sample_bytes=9)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModel(nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).eval())


def data(num=20):
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(0, 256, (num, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 3, (num,), generator=generator)
    return Samples(SharedSamples(x, y, Encoding(1 / 255)), torch.arange(num, dtype=torch.int32))


def loss_and_gradient(params, samples):
    leaf, batch = params.clone().requires_grad_(), samples.batch()
    loss = supervised_loss(model()(leaf, batch.x), batch)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


def generator():
    return torch.Generator().manual_seed(1)


def started(strategy, params):
    memory = Memory.initial(strategy.declare(model(), FACTS))
    return strategy.start(model(), params, memory, Experience(0, 0, (0, 1)))


@pytest.mark.parametrize("locality", [0.2, 1.0])
def test_the_way_and_its_charges_by_hand(locality):
    strategy = FedSSI(locality=locality, epochs=3, batch_size=100, lr=0.3)  # one step an epoch
    w = model().initial()
    v, charges = w.clone(), torch.zeros_like(w)
    q = (1 - locality) / (2 * locality)
    for _ in range(3):
        _, g = loss_and_gradient(v, data())
        new = (v - 0.3 * g + 0.3 * q * w) / (1 + 0.3 * q)
        charges -= g * (new - v)
        v = new
    surrogate, charge = strategy.surrogate(model(), w, data(), generator())
    torch.testing.assert_close(surrogate, v, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(charge, charges, rtol=1e-4, atol=1e-6)


def test_charges_add_up_to_the_drop_of_the_loss():
    strategy = FedSSI(locality=1.0, epochs=200, batch_size=100, lr=0.02)
    w = model().initial()
    surrogate, charge = strategy.surrogate(model(), w, data(), generator())
    drop = loss_and_gradient(w, data())[0] - loss_and_gradient(surrogate, data())[0]
    assert drop > 0.05
    assert float(charge.sum()) == pytest.approx(drop, rel=0.02)


def test_a_global_surrogate_goes_nowhere():
    w = model().initial()
    near, _ = FedSSI(locality=1e-5, epochs=5).surrogate(model(), w, data(), generator())
    far, _ = FedSSI(locality=1.0, epochs=5).surrogate(model(), w, data(), generator())
    assert float((near - w).norm()) < 0.01 * float((far - w).norm())


def test_importance_adds_up_around_the_latest_global_parameters():
    strategy = FedSSI(damping=0.05)
    w = [model().initial() + 0.1 * i for i in range(3)]
    memory = started(strategy, w[0])
    assert torch.equal(memory["anchor"], w[0])
    expected = torch.zeros_like(w[0])
    for begun, ended in ((w[0], w[1]), (w[1], w[2])):
        v, s = strategy.surrogate(model(), begun, data(), generator())
        expected += s.clamp(min=0) / ((v - begun) ** 2 + 0.05)
        memory = strategy.finish(model(), ended, data(), memory, generator())
        # who joins an experience later still has the anchor from its beginning
        memory = strategy.start(model(), ended + 1, memory, Experience(1, 1, (2,)))
        assert torch.equal(memory["anchor"], ended)
    torch.testing.assert_close(memory["importance"], expected)
    assert float(memory["importance"].min()) >= 0
    assert float(memory["importance"].max()) > 0


def test_without_samples_only_the_anchor_moves():
    strategy, w = FedSSI(), model().initial()
    memory = strategy.finish(model(), w + 1, data(0), started(strategy, w), generator())
    assert torch.equal(memory["anchor"], w + 1)
    assert not memory["importance"].any()


def test_the_penalty_is_declared():
    strategy, w = FedSSI(strength=3.0), model().initial()
    memory = strategy.finish(model(), w, data(), started(strategy, w), generator())
    theta = (w + 0.5).requires_grad_()
    penalty = 3.0 * (memory["importance"] * (theta - memory["anchor"]) ** 2).sum()
    (expected,) = torch.autograd.grad(penalty, theta)
    torch.testing.assert_close(strategy.pull().gradient(theta.detach(), memory), expected)
    assert strategy.is_declared


def test_two_vectors_are_all_that_is_stored():
    declared = FedSSI().declare(model(), FACTS)
    assert sum(spec.device_bytes(9) for spec in declared.values()) == 8 * model().layout.num_trained


def test_it_goes_with_replay():
    findings = check_strategy(lambda: make_strategy("fedssi+replay", {"replay": {"capacity": 4}}))
    assert not [f for f in findings if f.passed is False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength is -1.0; at least 0"),
        ({"locality": 0.0}, "locality is 0.0; allowed: above 0, at most 1"),
        ({"locality": 2.0}, "locality is 2.0"),
        ({"damping": 0.0}, "damping is 0.0; allowed: above 0"),
        ({"epochs": 0}, "epochs is 0; at least 1"),
        ({"batch_size": 0}, "batch_size is 0; at least 1"),
        ({"lr": 0.0}, "lr is 0.0; allowed: above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FedSSI(**arguments)
