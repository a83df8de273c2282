"""Sub-models: what a device of width r computes is what the physically narrow network does."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.compress.submodel import Holdings, Part, channels, narrowed
from edgelearn.params import FlatModel
from edgelearn.scenario.models import cnn, mlp
from edgelearn.stack import NotAStackError

IMAGE = (3, 8, 8)


def whole_mlp() -> nn.Module:
    return mlp(input_shape=IMAGE, num_classes=5, hidden=(16, 10))


def whole_cnn() -> nn.Module:
    return cnn(input_shape=IMAGE, num_classes=5, channels=(6, 9), hidden=10)


def narrow_mlp() -> nn.Module:
    return mlp(input_shape=IMAGE, num_classes=5, hidden=(5, 3))


def narrow_cnn() -> nn.Module:
    return cnn(input_shape=IMAGE, num_classes=5, channels=(2, 3), hidden=3)


def leading(name: str, whole: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The numbers that a narrow tensor has, written by hand, channel by channel."""
    if name == "7.weight":  # behind the Flatten: 9 channels of 2 x 2 in, 3 of them held
        return whole.view(10, 9, 2, 2)[:3, :3].reshape(3, 12)
    return whole[tuple(slice(n) for n in shape)]


@pytest.mark.parametrize(("make", "narrow"), [(whole_mlp, narrow_mlp), (whole_cnn, narrow_cnn)])
def test_it_is_the_physically_narrow_network(make, narrow) -> None:
    model, built = FlatModel(make()), narrow()
    cut = narrowed(model, 0.3, IMAGE)
    params = torch.randn(model.layout.size)
    part = Part.of(model.layout, cut.layout)
    held, views = part.take(params), model.layout.views(params)
    assert cut.layout.shapes == tuple(tuple(p.shape) for p in built.parameters())
    for name, parameter in built.named_parameters():
        parameter.data.copy_(leading(name, views[name], parameter.shape))
        torch.testing.assert_close(cut.layout.views(held)[name], parameter.data, rtol=0, atol=0)

    x, y = torch.randn(7, *IMAGE), torch.randint(5, (7,))
    torch.testing.assert_close(cut(held, x), built(x), rtol=0, atol=1e-6)
    leaf = held.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(F.cross_entropy(cut(leaf, x), y), leaf)
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    F.cross_entropy(built(x), y).backward()
    optimizer.step()
    stepped = torch.cat([p.detach().flatten() for p in built.parameters()])
    torch.testing.assert_close(held - 0.1 * gradients, stepped, rtol=0, atol=1e-6)


def test_its_initial_values_are_those_of_the_whole() -> None:
    model = FlatModel(whole_cnn())
    cut = narrowed(model, 0.5, IMAGE)
    part = Part.of(model.layout, cut.layout)
    assert torch.equal(cut.initial(), part.take(model.initial()))


def test_a_narrower_one_lies_within_a_wider_one() -> None:
    model = FlatModel(whole_cnn())
    places = [
        set(Part.of(model.layout, narrowed(model, width, IMAGE).layout).places.tolist())
        for width in (0.1, 0.4, 0.7, 1.0)
    ]
    assert all(one < other for one, other in itertools.pairwise(places))
    assert places[-1] == set(range(model.layout.size))


def test_the_whole_network_is_left_alone() -> None:
    module = whole_mlp()
    model = FlatModel(module)
    before, layout = model.initial(), model.layout
    narrowed(model, 0.5, IMAGE)
    assert torch.equal(FlatModel(module).initial(), before)
    assert FlatModel(module).layout == layout


def test_a_network_without_hidden_layers_is_the_same_at_any_width() -> None:
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False)))
    assert narrowed(model, 0.1, IMAGE).layout == model.layout


@pytest.mark.parametrize(
    ("count", "width", "held"),
    [(10, 0.7, 7), (10, 0.3, 3), (10, 0.31, 4), (3, 1e-6, 1), (9, 1.0, 9), (49, 1 / 49, 1)],
)
def test_channels_are_rounded_up(count: int, width: float, held: int) -> None:
    assert channels(count, width) == held


def test_what_cannot_be_cut_is_named() -> None:
    normed = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)
    )
    with pytest.raises(NotAStackError, match=r"LayerNorm is neither .* \(layer '2'\)"):
        narrowed(FlatModel(normed), 0.5, IMAGE)


def test_who_holds_what() -> None:
    model = FlatModel(whole_mlp())
    part = Part.of(model.layout, narrowed(model, 0.5, IMAGE).layout)
    holdings = Holdings((1.0, 0.5), {0.5: part})
    assert holdings.of_device(0) is None
    assert holdings.of_device(1) is part
    assert Holdings().of_device(10**6) is None
