from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual import per_example
from edgelearn.continual.per_example import sum_over_examples
from edgelearn.params import FlatModel
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.samples import Batch

NUM = 11


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outside = nn.Conv2d(2, 4, 1, bias=False)
        self.inside = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.outside(x) + self.inside(x).relu()
        return self.head(x.mean((2, 3)))


class Sequences(nn.Module):
    """Linear layers that see several rows of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).mean((1, 2))  # x is [B, 2, 8, 8]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(128, 128), nn.Linear(128, 3)

    def forward(self, x):
        return self.head(self.inner(self.inner(x.flatten(1)).relu()))


class Beside(nn.Module):
    """Uses a layer's parameters beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(128, 128), nn.Linear(128, 3)

    def forward(self, x):
        x = self.inner(x.flatten(1)).relu()
        return self.head(F.linear(x, self.inner.weight))


class Mixing(nn.Module):
    """Examples change each other, which alone none does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x + x.mean(0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(128, 128), nn.Linear(128, 128)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(128, 3)

    def forward(self, x):
        return self.head(self.outer(self.inner(x.flatten(1)).relu()))


def convolution(**kwargs):
    return nn.Sequential(nn.Conv2d(2, 4, **kwargs), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


FAST = {
    "mlp": lambda: mlp(input_shape=(2, 8, 8), num_classes=3, hidden=(6,)),
    "cnn": lambda: cnn(input_shape=(2, 8, 8), num_classes=3, channels=(3, 4), hidden=6),
    "in place": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 3)
    ),
    "stride": lambda: convolution(kernel_size=3, stride=2),
    "stride that leaves a rest": lambda: convolution(kernel_size=3, stride=(4, 3)),
    "groups": lambda: convolution(kernel_size=3, groups=2, padding=1),
    "dilation": lambda: convolution(kernel_size=(3, 2), dilation=(2, 1), padding=(2, 0)),
    "no bias": lambda: convolution(kernel_size=3, bias=False),
    "residual": Residual,
    "sequences": Sequences,
    "average pool": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.GELU(), nn.Flatten(), nn.Linear(27, 3)
    ),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(128, 3)),
}
SLOW = {
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3)
    ),
    "same padding": lambda: convolution(kernel_size=3, padding="same"),
    "padding with itself": lambda: convolution(kernel_size=3, padding=1, padding_mode="circular"),
    "twice": Twice,
    "beside": Beside,
    "mixing": Mixing,
    "tied": Tied,
}


def network(make):
    torch.manual_seed(0)
    module = make()
    module.eval()
    with torch.no_grad():
        module(torch.zeros(1, 2, 8, 8))
    return module


def batch(num=NUM):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 2, 8, 8, generator=generator)
    y = torch.randint(0, 3, (num,), generator=generator)
    return Batch(x, y, weight=torch.rand(num, generator=generator))


def losses(logits, one):
    return F.cross_entropy(logits, one.y, reduction="none") * one.weight


def one_by_one(model, params, whole, of):
    total = torch.zeros_like(params)
    for n in range(len(whole)):
        one = Batch(whole.x[n : n + 1], whole.y[n : n + 1], whole.weight[n : n + 1])
        leaf = params.clone().requires_grad_()
        total += of(torch.autograd.grad(losses(model(leaf, one.x), one).sum(), leaf)[0])
    return total


def compare(make, *, of=torch.square, chunk=4, train=False):
    model = FlatModel(network(make))
    params = model.initial()[: model.layout.num_trained]
    expected = one_by_one(model, params, batch(), of)
    model.module.train(train)
    halves = [
        Batch(b.x, b.y, w) for b, w in zip(batch().split(6), batch().weight.split(6), strict=True)
    ]
    found = sum_over_examples(model, params, halves, losses, of=of, chunk=chunk)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    return model


@pytest.fixture
def no_vmap(monkeypatch):
    def refuse(*_args):
        raise AssertionError("by vmap")

    monkeypatch.setattr(per_example, "_by_vmap", refuse)


@pytest.mark.parametrize("of", [torch.square, torch.abs])
@pytest.mark.parametrize("kind", FAST)
def test_layers_that_are_known_equal_a_loop(kind, of, no_vmap):
    compare(FAST[kind], of=of)


@pytest.mark.parametrize("chunk", [1, 5, 6, 1000])
def test_chunks_change_nothing(chunk, no_vmap):
    compare(FAST["cnn"], chunk=chunk)


@pytest.mark.parametrize("kind", SLOW)
def test_other_networks_go_through_vmap(kind, monkeypatch):
    asked = []
    by_vmap = per_example._by_vmap
    monkeypatch.setattr(per_example, "_by_vmap", lambda *a: asked.append(len(a[2])) or by_vmap(*a))
    compare(SLOW[kind])
    assert asked == [6, 5]


def test_frozen_layers_have_no_part(no_vmap):
    def make():
        module = FAST["cnn"]()
        module[0].weight.requires_grad_(False)
        module[3].bias.requires_grad_(False)
        module[7].requires_grad_(False)
        return module

    model = compare(make)
    assert "0.weight" not in model.layout.names[: model.layout.num_trained_tensors]


def test_it_evaluates_and_leaves_the_mode_and_no_hooks(no_vmap):
    model = compare(FAST["dropout"], train=True)
    assert all(layer.training for layer in model.module.modules())
    assert not any(layer._forward_hooks for layer in model.module.modules())


def test_a_layer_that_is_not_called_has_none(no_vmap):
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.head = nn.Linear(4, 4), nn.Linear(128, 3)

        def forward(self, x):
            return self.head(x.flatten(1))

    compare(Idle)


def test_without_examples_it_is_zero():
    model = FlatModel(network(FAST["mlp"]))
    params = model.initial()
    assert not sum_over_examples(model, params, [], losses, of=torch.square).any()
