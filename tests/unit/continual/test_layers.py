"""What layers see, and gradients of single samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.layers import UsedAgainError, layers_of, observe, sample_gradients
from edgelearn.continual.strategy import supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch


class Twice(nn.Module):
    """Uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(torch.tanh(self.inner(x.flatten(1)))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x.flatten(1)))))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 6),
    "in place": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)),
        6,
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 3, 2, dilation=2, bias=False),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (2, 5, 5),
    ),
    "norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        6,
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 3)),
        (2, 5, 5),
    ),
    "twice": (Twice, 6),
    "tied": (Tied, 6),
}


def network(name):
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FlatModel(make().eval())
    generator = torch.Generator().manual_seed(1)
    shape = (shape,) if isinstance(shape, int) else shape
    x = torch.randn(7, *shape, generator=generator)
    y = torch.randint(0, 3, (7,), generator=generator)
    return model, model.initial()[: model.layout.num_trained], Batch(x, y)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("is_masked", [False, True])
def test_gradients_of_samples_are_those_of_each_by_itself(name, is_masked):
    model, params, batch = network(name)
    if is_masked:
        mask = torch.ones(7, 3, dtype=torch.bool)
        mask[torch.arange(7), (batch.y + 1) % 3] = False
        batch = Batch(batch.x, batch.y, None, mask)
    norms, total = sample_gradients(model, params, batch)
    expected = []
    for i in range(7):
        leaf = params.clone().requires_grad_()
        mask = None if batch.mask is None else batch.mask[i : i + 1]
        one = Batch(batch.x[i : i + 1], batch.y[i : i + 1], None, mask)
        expected.append(torch.autograd.grad(supervised_loss(model(leaf, one.x), one), leaf)[0])
    rows = torch.stack(expected)
    torch.testing.assert_close(norms, rows.square().sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, rows.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "in place", "cnn", "norm"])
def test_outputs_are_products_of_columns(name):
    model, params, batch = network(name)
    layers, outputs = layers_of(model), []
    handles = [
        layer.module.register_forward_hook(lambda _m, _x, out: outputs.append(out.clone()))
        for layer in layers
    ]
    _, inputs = observe(model, params, batch.x, layers)
    for handle in handles:
        handle.remove()
    for layer, seen, out in zip(layers, inputs, outputs, strict=True):
        columns = layer.columns(seen)
        assert columns.shape[2] == layer.width
        found = columns @ layer.read(params).t()
        torch.testing.assert_close(found, layer.by_place(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "in place", "cnn", "norm"])
def test_what_is_read_is_written_back_to_its_place(name):
    model, params, _ = network(name)
    layers, out = layers_of(model), torch.full_like(params, torch.nan)
    for layer in layers:
        layer.write(out, layer.read(params))
    written = ~out.isnan()
    assert int(written.sum()) == sum(layer.size for layer in layers)
    assert torch.equal(out[written], params[written])


def test_statistics_run_over_samples_and_pixels():
    model, params, batch = network("cnn")
    layers = layers_of(model)
    _, inputs = observe(model, params, batch.x, layers)
    first = layers[0].by_channel(inputs[0])
    torch.testing.assert_close(first.mean(0), batch.x.mean((0, 2, 3)))
    assert [layer.num_channels for layer in layers] == [2, 4, 3]


def test_layers_that_are_not_plain_are_left_out():
    assert [layer.name for layer in layers_of(network("groups")[0])] == ["2"]
    frozen = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    frozen[0].requires_grad_(False)
    assert [layer.name for layer in layers_of(FlatModel(frozen))] == ["1"]


def test_a_single_layer_has_no_name():
    (layer,) = layers_of(FlatModel(nn.Linear(4, 2)))
    assert (layer.name, layer.weight, layer.bias, layer.width) == ("", 0, 8, 5)


def test_nothing_is_left_on_the_network():
    model, params, batch = network("twice")
    with pytest.raises(UsedAgainError, match="'inner' is used 2 times"):
        observe(model, params, batch.x, layers_of(model))
    assert not any(module._forward_hooks for module in model.module.modules())
