"""Our EWC against Avalanche's plug-in, where the two definitions agree.

Avalanche's Fisher is per example only with batches of one sample, and its penalty has no 1/2.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edgelearn.continual.ewc import EWC
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples

LAMBDA = 3.0


@pytest.fixture(scope="module")
def plugin_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        training = pytest.importorskip("avalanche.training.plugins")
    return training.EWCPlugin


def experience(seed, num=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (num, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 3, (num,), generator=generator)
    return Samples(SharedSamples(x, y, Encoding(1 / 255)), torch.arange(num, dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"mode": "separate"}, {"mode": "separate"}),
        ({"mode": "online", "decay": 0.7}, {"mode": "online", "decay_factor": 0.7}),
    ],
)
def test_penalty_and_gradient_equal_avalanche(plugin_class, ours, theirs):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    model = FlatModel(module)
    strategy = EWC(strength=2 * LAMBDA, **ours)
    memory = Memory.initial(strategy.declare(model, Facts(3, 3, 9)))
    plugin = plugin_class(LAMBDA, **theirs)
    around = SimpleNamespace(
        clock=SimpleNamespace(train_exp_counter=0),
        model=module,
        _criterion=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        device="cpu",
        train_mb_size=1,
    )
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        with torch.no_grad():  # as if it had learned
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        data = experience(seed)
        memory = strategy.finish(model, model.initial(), data, memory, generator)
        batch = data.batch()
        around.experience = SimpleNamespace(
            dataset=[(x, int(y), 0) for x, y in zip(batch.x, batch.y, strict=True)]
        )
        plugin.after_training_exp(around)
        around.clock.train_exp_counter += 1
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    module.zero_grad()
    around.loss = torch.zeros(())
    plugin.before_backward(around)
    around.loss.backward()
    theta = model.initial().requires_grad_()
    penalty = strategy.penalty(theta, memory)
    penalty.backward()
    torch.testing.assert_close(penalty.detach(), around.loss.detach(), rtol=1e-5, atol=1e-7)
    assert penalty > 0.01
    for name, piece in model.layout.views(theta.grad).items():
        torch.testing.assert_close(piece, module.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
