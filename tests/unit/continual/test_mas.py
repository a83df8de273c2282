from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.mas import MAS, output_sensitivity
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.strategy import Facts, Pull
from edgelearn.params import FlatModel
from edgelearn.scenario.models import cnn
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples

FACTS = Facts(num_experiences=3, num_classes=4, sample_bytes=17)
MASKS = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()


def model(kind="linear"):
    torch.manual_seed(0)
    if kind == "cnn":
        return FlatModel(cnn(input_shape=(1, 4, 4), num_classes=4, channels=(2, 3), hidden=5))
    layers = [nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4)]
    if kind == "norm":
        layers.insert(2, nn.BatchNorm1d(6))
    return FlatModel(nn.Sequential(*layers).eval())


def samples(num=13, masks=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (num, 1, 4, 4), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 4, (num,), generator=generator)
    store = SharedSamples(x, y, Encoding(1 / 255, 0.5, 0.3, masks))
    return Samples(store, torch.arange(num, dtype=torch.int32))


def slow(m, params, data):
    batch, total = data.batch(), torch.zeros_like(params)
    for n in range(len(data)):
        leaf = params.clone().requires_grad_()
        logits = m(leaf, batch.x[n : n + 1])[0]
        if batch.mask is not None:
            logits = logits[batch.mask[n]]
        total += torch.autograd.grad((logits**2).sum(), leaf)[0].abs()
    return total / len(data)


@pytest.mark.parametrize("masks", [None, MASKS])
@pytest.mark.parametrize("kind", ["linear", "cnn", "norm"])
def test_it_is_the_mean_of_absolute_gradients_of_single_samples(kind, masks):
    m = model(kind)
    params = m.initial()[: m.layout.num_trained]
    for num in (1, 13, 300):
        data = samples(num, masks)
        found = output_sensitivity(m, params, data)
        torch.testing.assert_close(found, slow(m, params, data), rtol=1e-4, atol=1e-6)


def test_it_is_not_that_of_a_batchs_gradient():
    m, data = model(), samples()
    leaf = m.initial().requires_grad_()
    (batch,) = torch.autograd.grad(m(leaf, data.batch().x).square().sum(1).mean(), leaf)
    found = output_sensitivity(m, m.initial(), data)
    assert (found >= batch.abs() - 1e-6).all()
    assert found.sum() > 1.2 * batch.abs().sum()


def test_labels_are_not_needed():
    m, data = model(), samples()
    other = Samples(SharedSamples(data.store.x, 3 - data.store.y, data.store.encoding), data.ids)
    assert torch.equal(
        output_sensitivity(m, m.initial(), data), output_sensitivity(m, m.initial(), other)
    )


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_experiences_add_up(decay):
    m, strategy = model(), MAS(decay=decay, max_samples=10)
    memory = Memory.initial(strategy.declare(m, FACTS))
    anchors = [m.initial(), m.initial() + 0.2, m.initial() - 0.1]
    parts = []
    for seed, params in enumerate(anchors):
        data = samples(seed=seed)
        memory = strategy.finish(m, params, data, memory, torch.Generator())
        parts.append(slow(m, params, Samples(data.store, data.ids[:10])))
    check(memory, strategy.declare(m, FACTS))
    expected = decay**2 * parts[0] + decay * parts[1] + parts[2]
    torch.testing.assert_close(memory["importance"], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(memory["anchor"], anchors[-1])
    assert strategy.finish(m, anchors[0], samples(0), memory, torch.Generator()) is memory


def test_the_penalty_has_the_papers_strength():
    assert MAS(strength=0.7).pull() == Pull("importance", "anchor", 1.4)
    assert MAS(step="explicit").pull().is_explicit
    assert MAS().is_declared
    assert not MAS(storage="int8").is_declared  # a round begins with decoding


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"strength": -1.0}, "strength is -1.0; at least 0"),
        ({"decay": 1.1}, "decay is 1.1; allowed: 0 to 1"),
        ({"step": "big"}, "step is 'big'"),
        ({"max_samples": -1}, "max_samples is -1"),
        ({"storage": "int4"}, "storage is 'int4'"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        MAS(**kwargs)
