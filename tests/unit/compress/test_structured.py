"""Channels that are taken out: which go, what is left of the function, and what is refused."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from edgelearn.compress import structured
from edgelearn.compress.cost import cost
from edgelearn.compress.structured import prune_channels, resized
from edgelearn.compress.tune import loaded
from edgelearn.errors import ExtraMissingError, RunError, StateError
from edgelearn.params import FlatModel, Layout

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="needs edgelearn[prune]"
)


class Residual(nn.Module):
    """A sum, a depthwise convolution and norms: all that ties channels to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16))
        self.last = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.last(self.deep(self.wide(x)).relu())
        return self.head(x.mean((2, 3)))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = Residual()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # as after training
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias, 0, 0.2)
            nn.init.normal_(part.running_mean, 0, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


def images() -> Tensor:
    return torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@needs_extra
def test_channels_that_do_nothing_go_and_the_function_stays() -> None:
    module = residual()
    dead = [0, 3, 4, 5, 8, 9, 10, 15]
    with torch.no_grad():  # channels between `wide` and `last` that are 0 whatever comes in
        for conv, norm in (module.wide[:2], module.deep):
            conv.weight[dead], conv.bias[dead] = 0, 0
            norm.weight[dead], norm.bias[dead] = 0, 0
        module.last.weight[:, dead] = 0
    x = images()
    smaller = prune_channels(module, x, ratio=0.5, keep=("first.0", "last"))
    assert smaller.wide[0].out_channels == 8
    assert smaller.deep[0].groups == 8
    alive = [c for c in range(16) if c not in dead]
    assert torch.equal(smaller.deep[0].weight, module.deep[0].weight[alive])
    assert torch.equal(smaller.last.weight, module.last.weight[:, alive])
    torch.testing.assert_close(smaller(x), module(x))


@needs_extra
def test_the_network_is_really_smaller_and_the_given_one_as_it_was() -> None:
    module, x = residual(), images()
    module.head.bias.requires_grad_(False)
    before, answers = copy.deepcopy(module.state_dict()), module(x)
    module.train()
    smaller = prune_channels(module, x, ratio=0.5)
    assert smaller.training
    assert [p.requires_grad for p in smaller.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]
    whole, less = cost(module, x), cost(smaller, x)
    assert less.parameters < 0.6 * whole.parameters
    assert less.macs < 0.6 * whole.macs
    assert smaller(x).shape == (5, 3)
    module.eval()
    assert torch.equal(module(x), answers)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@needs_extra
@pytest.mark.parametrize(
    ("ratio", "round_to", "widths"),
    [
        (0, 1, (8, 16)),
        (0.5, 1, (4, 8)),
        (0.3, 1, (5, 11)),
        (0.9, 1, (1, 1)),  # no layer is left without
        (0.99, 1, (1, 1)),
        (0.3, 4, (4, 8)),
        (0.9, 4, (4, 4)),
        (0.5, 16, (8, 16)),
    ],
)
def test_each_layer_loses_its_part_and_keeps_one(
    ratio: float, round_to: int, widths: tuple[int, int]
) -> None:
    module, x = residual(), images()
    smaller = prune_channels(module, x, ratio=ratio, round_to=round_to)
    assert (smaller.last.out_channels, smaller.wide[0].out_channels) == widths
    assert smaller.head.out_features == 3
    if widths == (8, 16):
        assert torch.equal(smaller(x), module(x))


@needs_extra
@pytest.mark.parametrize("count", [10, 20, 100])
def test_the_part_is_not_missed_by_rounding(count: int) -> None:
    module = nn.Sequential(nn.Linear(3, count), nn.Linear(count, 2))
    for ratio in (0.1, 0.3, 0.6, 0.7, 0.9):
        smaller = prune_channels(module, torch.zeros(2, 3), ratio=ratio)
        assert smaller[0].out_features == count - round(ratio * count)


@needs_extra
def test_what_is_left_fits_into_a_network_that_is_made_anew() -> None:
    x = images()
    smaller = prune_channels(residual(), x, ratio=0.4)
    model = FlatModel(smaller)
    tensors = model.layout.views(model.initial())
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    again = loaded(resized(residual(seed=1), shapes), tensors)
    assert torch.equal(again(x), smaller(x))
    assert str(again) == str(smaller)


def test_tensors_of_another_network_are_refused() -> None:
    layout = Layout.of(residual())
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    with pytest.raises(StateError, match=r"'head.bias' is in one of them only"):
        resized(residual(), {n: s for n, s in shapes.items() if n != "head.bias"})
    with pytest.raises(StateError, match=r"head.weight is \(3, 9\).* has \(3, 8\)"):
        resized(residual(), {**shapes, "head.weight": (3, 9)})
    with pytest.raises(StateError, match=r"head.weight is \(24,\)"):
        resized(residual(), {**shapes, "head.weight": (24,)})


class Flat(nn.Module):
    """Knows its number of channels by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(-1, 64))


@needs_extra
@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (Flat(), torch.zeros(2, 1, 6, 6), "channels of Flat can't be pruned"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), torch.zeros(2, 4), "1 is a PReLU with param"),
        (nn.ReLU(), torch.zeros(2, 4), "no linear or convolution layer"),
    ],
)
def test_a_network_that_cannot_be_followed_is_refused(
    module: nn.Module, x: Tensor, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        prune_channels(module, x, ratio=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, "ratio is 1.0; allowed: 0 to less than 1"),
        ({"ratio": 0.5, "round_to": 0}, "round_to is 0"),
        pytest.param({"ratio": 0.5, "keep": ["x"]}, "keep names 'x'", marks=needs_extra),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_channels(residual(), images(), **arguments)  # type: ignore[arg-type]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(structured, "import_module", missing)
    with pytest.raises(ExtraMissingError, match=r"torch-pruning.*edgelearn\[prune\]"):
        prune_channels(residual(), images(), ratio=0.5)


@needs_extra
def test_mobilenet_v2_loses_half_its_channels_and_is_read_back() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    module = models.mobilenet_v2(num_classes=10).eval()
    x = torch.rand(2, 3, 32, 32)
    smaller = prune_channels(module, x, ratio=0.5)
    whole, less = cost(module, x), cost(smaller, x)
    assert (whole.parameters, whole.macs) == (2_236_682, 6_124_928)
    assert less.parameters < 0.3 * whole.parameters
    assert less.macs < 0.3 * whole.macs
    tensors = FlatModel(smaller).layout.views(FlatModel(smaller).initial())
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert torch.equal(loaded(resized(module, shapes), tensors)(x), smaller(x))
