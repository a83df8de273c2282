from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual import per_example
from edgelearn.continual.fisher import empirical_fisher, true_fisher
from edgelearn.params import FlatModel
from edgelearn.scenario.models import cnn
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
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    if kind == "cnn":
        return cnn(input_shape=(1, 4, 4), num_classes=4, channels=(2, 3), hidden=5)
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


@pytest.mark.parametrize("kind", ["linear", "mlp", "cnn", "conv"])
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


MASKS = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize("kind", ["linear", "mlp", "cnn", "conv"])
def test_with_task_masks(kind):
    module = network(kind)
    result = fisher(module, samples(masks=MASKS), chunk=8)
    assert_equal(result, slow(module, samples(masks=MASKS), masks=MASKS))
    assert all(torch.isfinite(t).all() for t in result.values())
    last = next(reversed(result))
    assert not torch.allclose(result[last], fisher(module, samples())[last])


def test_a_cnn_needs_no_vmap(monkeypatch):
    monkeypatch.setattr(per_example, "_by_vmap", None)
    module = network("cnn")
    assert_equal(fisher(module, samples(num=300)), slow(module, samples(num=300)))


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


# -- labels of the model's own ---------------------------------------------------------------------


def true(module, data, generator, **kwargs):
    model = FlatModel(module)
    params = model.initial()[: model.layout.num_trained]
    return model.layout.views(true_fisher(model, params, data, generator, **kwargs))


def slow_expectation(module, data, *, masks=None):
    """One backward pass for each example and class."""
    batch = data.batch()
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(batch.x, batch.y, strict=True):
        logits = module(x[None])[0]
        if masks is not None:
            logits = logits.masked_fill(~masks[y], float("-inf"))
        logs = F.log_softmax(logits, 0)
        for label in range(4):
            if torch.isfinite(logs[label]):
                gradients = torch.autograd.grad(logs[label], parameters, retain_graph=True)
                for t, g in zip(total, gradients, strict=True):
                    t += logs[label].exp().detach() * g**2
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    return dict(zip(names, (t / len(batch) for t in total), strict=True))


@pytest.mark.parametrize("masks", [None, MASKS])
@pytest.mark.parametrize("kind", ["linear", "cnn", "conv"])
def test_the_expectation_over_classes(kind, masks):
    module, data = network(kind), samples(masks=masks)
    assert_equal(true(module, data, None), slow_expectation(module, data, masks=masks))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_draws_come_near_to_the_expectation(kind):
    module, data = network(kind), samples(masks=MASKS)
    generator = torch.Generator().manual_seed(3)
    draws = [true(module, data, generator) for _ in range(400)]
    for name, expected in slow_expectation(module, data, masks=MASKS).items():
        mean = torch.stack([draw[name] for draw in draws]).mean(0)
        assert (mean - expected).norm() < 0.1 * expected.norm()
        assert not torch.allclose(draws[0][name], draws[1][name])


def test_draws_are_a_matter_of_the_generator_and_not_of_the_labels():
    module, data = network(), samples()
    other = Samples(SharedSamples(data.store.x, 3 - data.store.y, data.store.encoding), data.ids)
    results = [
        true(module, d, torch.Generator().manual_seed(seed))
        for d, seed in ((data, 0), (other, 0), (data, 1))
    ]
    assert_equal(results[0], results[1])
    assert not torch.allclose(results[0]["3.weight"], results[2]["3.weight"])


def test_without_samples_or_with_few():
    nothing = Samples(samples().store, torch.tensor([], dtype=torch.int32))
    assert all(not t.any() for t in true(network(), nothing, torch.Generator()).values())
    few = Samples(samples().store, torch.arange(10, dtype=torch.int32))
    module = network()
    assert_equal(true(module, samples(), None, max_samples=10), slow_expectation(module, few))
