from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.fisher import empirical_fisher
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples

NUM = 37


def samples(*, masks=None, num=NUM):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (num, 1, 4, 4), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 4, (num,), generator=generator)
    store = SharedSamples(x, y, Encoding(1 / 255, 0.5, 0.3, masks))
    return Samples(store, torch.arange(num, dtype=torch.int32))


def network(kind="mlp"):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4))
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def slow(module, data, *, masks=None):
    """One backward pass per example, over named parameters."""
    batch = data.batch()
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(batch.x, batch.y, strict=True):
        logits = module(x[None])
        if masks is not None:
            logits = logits.masked_fill(~masks[y][None], float("-inf"))
        gradients = torch.autograd.grad(F.cross_entropy(logits, y[None]), parameters)
        for t, g in zip(total, gradients, strict=True):
            t += g**2
    return dict(zip(names, (t / len(batch) for t in total), strict=True))


def fisher(module, data, **kwargs):
    model = FlatModel(module)
    params = model.initial()[: model.layout.num_trained]
    return model.layout.views(empirical_fisher(model, params, data, **kwargs))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("chunk", [1, 5, NUM, 1000])
def test_it_is_the_mean_of_squared_gradients_of_single_examples(kind, chunk):
    module = network(kind)
    assert_equal(fisher(module, samples(), chunk=chunk), slow(module, samples()))


def test_frozen_parameters_have_none():
    module = network("conv")
    module[0].weight.requires_grad_(False)
    result = fisher(module, samples())
    assert "0.weight" not in result
    assert_equal(result, slow(module, samples()))


def test_with_task_masks():
    masks = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    module = network()
    result = fisher(module, samples(masks=masks), chunk=8)
    assert_equal(result, slow(module, samples(), masks=masks))
    assert all(torch.isfinite(t).all() for t in result.values())
    assert not torch.allclose(result["3.weight"], fisher(module, samples())["3.weight"])


def test_it_is_not_the_squared_gradient_of_a_batch():
    module, data = network(), samples()
    batch = data.batch()
    F.cross_entropy(module(batch.x), batch.y).backward()
    squared_mean = torch.cat([p.grad.flatten() ** 2 for p in module.parameters()])
    ours = torch.cat([t.flatten() for t in fisher(module, data).values()])
    assert (ours >= squared_mean - 1e-9).all()  # Jensen
    assert ours.sum() > 5 * squared_mean.sum()


def test_max_samples_uses_the_first():
    module = network()
    few = Samples(samples().store, torch.arange(10, dtype=torch.int32))
    assert_equal(fisher(module, samples(), max_samples=10, chunk=4), slow(module, few))
    assert_equal(fisher(module, samples(), max_samples=1000), slow(module, samples()))


def test_without_samples_it_is_zero():
    nothing = Samples(samples().store, torch.tensor([], dtype=torch.int32))
    result = fisher(network(), nothing)
    assert all(not t.any() for t in result.values())


def test_it_is_of_the_given_parameters_not_of_the_module():
    module = network()
    model = FlatModel(module)
    before = model.initial()
    other = before * 2
    result = model.layout.views(empirical_fisher(model, other, samples()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    assert_equal(result, slow(module, samples()))
