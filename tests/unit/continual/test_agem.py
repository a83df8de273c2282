from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.agem import AGEM, project
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Encoding, Samples, SharedSamples
from edgelearn.testing.toy import toy_devices, toy_learner

MODEL = FlatModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
PARAMS = torch.randn(MODEL.layout.size, generator=torch.Generator().manual_seed(0))
STORE = SharedSamples(torch.rand(30, 3), torch.arange(30) % 2, Encoding())


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, generator=generator), torch.randn(50, generator=generator)


def gradient_of(x, y, params=PARAMS):
    leaf = params.clone().requires_grad_()
    loss = F.cross_entropy(MODEL(leaf, x), y)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_the_projection_by_hand():
    gradient, reference = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0])
    torch.testing.assert_close(project(gradient, reference), torch.tensor([1.5, 0.5]))
    assert torch.equal(project(gradient, -reference), gradient)
    assert torch.equal(project(gradient, torch.zeros(2)), gradient)


def test_the_projection_is_the_closest_that_does_no_harm():
    count = 0
    for seed in range(20):
        gradient, reference = vectors(seed)
        found = project(gradient, reference)
        if float(gradient @ reference) >= 0:
            assert torch.equal(found, gradient)
            continue
        count += 1
        assert abs(float(found @ reference)) < 1e-4
        shift = gradient - found  # along the reference alone
        torch.testing.assert_close(
            shift, reference * (shift @ reference) / reference.square().sum()
        )
    assert count > 3


@pytest.mark.parametrize("is_opposed", [False, True])
def test_a_step_is_projected_only_against_what_is_stored(is_opposed):
    params = 0.1 * PARAMS  # answers are undecided, so opposite labels pull opposite ways
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 0])
    x, y = torch.cat([x, x + 0.01]), torch.cat([y, 1 - y if is_opposed else y])
    batch = Batch(x, y, None, None, torch.arange(3))
    loss, found = AGEM().gradient(MODEL, params, batch, Memory({}, STORE))
    present, gradient = gradient_of(x[:3], y[:3], params)
    _, reference = gradient_of(x[3:], y[3:], params)
    torch.testing.assert_close(loss, present)
    torch.testing.assert_close(found, project(gradient, reference))
    assert torch.equal(found, gradient) is not is_opposed


def test_without_a_past_the_gradient_is_that_of_the_loss():
    batch = Batch(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))
    loss, found = AGEM().gradient(MODEL, PARAMS, batch, Memory({}, STORE))
    expected = gradient_of(batch.x, batch.y)
    torch.testing.assert_close((loss, found), expected)
    assert not loss.requires_grad


def test_how_many_are_asked():
    data = Samples(STORE, torch.arange(30, dtype=torch.int32))
    for kwargs, expected in (({}, 20), ({"replay_batch": 7}, 7), ({"replay_batch": 0}, 2)):
        strategy = AGEM(capacity=20, **kwargs)
        memory = Memory.initial(strategy.declare(MODEL, Facts(2, 2, 4)), STORE)
        memory = strategy.finish(MODEL, PARAMS, data, memory, torch.Generator())
        batch = strategy.extend(data.batch(slice(0, 2)), memory, torch.Generator())
        assert batch.num_past == expected


def test_training_forgets_less_with_it():
    def loss_on_the_past(strategy):
        learner, device = toy_learner(strategy), toy_devices(1, num_per_class=20)[0]
        state, params = learner.initial_state(device.store), learner.model.initial()
        for position in (0, 1):
            for turn in range(4):
                fit = learner.fit(
                    state, params, device, position=position, server_round=4 * position + turn + 1
                )
                state = fit.state
                params = params + learner.model.layout.flatten(fit.update.arrays)
            state = learner.consolidate(state, params, device, upto=position + 1)
        batch = device.samples(0).batch()
        return float(F.cross_entropy(learner.model(params, batch.x), batch.y))

    from edgelearn.continual.naive import Naive

    assert loss_on_the_past(AGEM()) < 0.5 * loss_on_the_past(Naive())


@pytest.mark.slow
def test_the_projection_equals_avalanche():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        plugins = pytest.importorskip("avalanche.training.plugins")
    for seed in range(10):
        gradient, reference = vectors(seed)
        plugin = plugins.AGEMPlugin(patterns_per_experience=1, sample_size=1)
        plugin.buffers, plugin.reference_gradients = [None], reference
        module = nn.Linear(9, 5)
        module.weight.grad = gradient[:45].view(5, 9).clone()
        module.bias.grad = gradient[45:].clone()
        plugin.after_backward(SimpleNamespace(model=module, device="cpu"))
        theirs = torch.cat([module.weight.grad.flatten(), module.bias.grad])
        torch.testing.assert_close(project(gradient, reference), theirs)


def test_bad_arguments():
    with pytest.raises(ValueError, match="replay_batch is -1"):
        AGEM(replay_batch=-1)
