from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.combined import Combined
from edgelearn.continual.features import features, features_and_logits, last_linear
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.samples import Batch

SHAPE = (1, 8, 8)


def network(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        return mlp(input_shape=SHAPE, num_classes=5, hidden=(7, 6))
    if kind == "cnn":
        return cnn(input_shape=SHAPE, num_classes=5, channels=(2, 3), hidden=6)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    return Residual()


class Residual(nn.Module):
    """Its layers are called in another order than they are defined in, but for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(6, 6)
        self.first = nn.Linear(64, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.head(self.norm(x + self.second(x).relu()))


@pytest.mark.parametrize("kind", ["mlp", "cnn", "linear", "residual"])
def test_head_and_features_make_the_logits(kind):
    model = FlatModel(network(kind).eval())
    params, x = 1.1 * model.initial(), torch.randn(4, *SHAPE)
    head = last_linear(model)
    z, logits = features_and_logits(model, params, x)
    assert z.shape == (4, head.num_features)
    assert head.num_classes == 5
    torch.testing.assert_close(F.linear(z, head.weights(params), head.biases(params)), logits)
    torch.testing.assert_close(logits, model(params, x))
    assert torch.equal(features(model, params, x), z)
    assert (head.bias is None) == (kind == "residual")


def test_places_are_those_of_the_trained_vector():
    module = network("cnn")
    module[0].weight.requires_grad_(False)  # moves behind what is trained
    model = FlatModel(module)
    head, trained = last_linear(model), model.initial()[: model.layout.num_trained]
    views = model.layout.views(trained)
    assert torch.equal(head.weights(trained), views["9.weight"])
    assert torch.equal(trained[head.bias], views["9.bias"])
    head.weights(trained).zero_()  # a view
    assert not views["9.weight"].any()


def test_features_are_differentiable_and_can_be_stacked():
    model = FlatModel(network("mlp"))
    params = model.initial().requires_grad_()
    head = last_linear(model)
    (gradient,) = torch.autograd.grad(features(model, params, torch.ones(2, *SHAPE)).sum(), params)
    assert gradient[: head.weight.start].any()
    assert not gradient[head.weight].any()
    both, x = torch.stack([params.detach(), 2 * params.detach()]), torch.randn(3, *SHAPE)
    stacked = torch.func.vmap(lambda own: features(model, own, x))(both)
    torch.testing.assert_close(stacked[1], features(model, both[1], x))


class OfFeatures(ClientStrategy):
    """Adds the size of features to the loss."""

    def loss(self, model, params, batch, memory):
        penalty = features(model, params, batch.x).square().mean()
        return super().loss(model, params, batch, memory) + penalty


def test_a_part_of_combined_strategies_may_use_them():
    model = FlatModel(network("mlp"))
    batch = Batch(torch.randn(3, *SHAPE), torch.tensor([0, 1, 2]))
    strategy = Combined({"one": OfFeatures(), "other": OfFeatures()})
    params, memory = model.initial(), Memory({})
    twice = strategy.loss(model, params, batch, memory)
    plain = F.cross_entropy(model(params, batch.x), batch.y)
    penalty = features(model, params, batch.x).square().mean()
    torch.testing.assert_close(twice, plain + 2 * penalty)


def test_nothing_stays_behind_in_the_network():
    model = FlatModel(network("mlp"))
    with pytest.raises(RuntimeError):
        features(model, model.initial(), torch.ones(2, 3))
    features(model, model.initial(), torch.ones(2, *SHAPE))
    assert not any(layer._forward_hooks for layer in model.module.modules())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)], "'2', a BatchNorm1d; .* nn.Linear"),
        ([nn.Flatten()], "no layer with parameters"),
    ],
)
def test_a_network_that_can_not_end_in_a_linear_layer(layers, expected):
    with pytest.raises(StrategyError, match=expected):
        last_linear(FlatModel(nn.Sequential(*layers)))


def test_a_network_that_does_not_end_in_its_last_linear_layer():
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.LogSoftmax(1)))
    with pytest.raises(StrategyError, match=r"does not end in its layer '1'.*softmax"):
        features(model, model.initial(), torch.ones(2, *SHAPE))


def test_what_is_behind_it_and_does_nothing_is_no_matter():
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Identity()))
    assert features(model, model.initial(), torch.ones(2, *SHAPE)).shape == (2, 64)


def test_a_head_that_is_frozen_or_gets_more_than_rows():
    module = network("linear")
    module[1].weight.requires_grad_(False)
    with pytest.raises(StrategyError, match="no weight of its own that is trained"):
        last_linear(FlatModel(module))
    model = FlatModel(nn.Linear(8, 5))
    with pytest.raises(StrategyError, match=r"\(2, 1, 8, 8\), not one row"):
        features(model, model.initial(), torch.ones(2, *SHAPE))
