"""Int8 models of several devices in one batch: bit for bit what each device alone answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Predictor, Int8Prepared, Int8Runtime
from edgelearn.runtime.protocol import Rows
from edgelearn.scenario.models import cnn, mlp

NUM_CALIBRATION = [7, 0, 30, 1]  # of each device
NUM_INPUTS = [5, 6, 0, 9]


class Tokens(nn.Module):
    """A layer over tokens [n, t, d], and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        return self.last(self.again(3 * hidden).mean(1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Batch norm, a sum, an average."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.last(first + self.second(first))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one layer": (lambda: nn.Linear(6, 4), (6,)),
    "mlp": (lambda: mlp(input_shape=(1, 5, 5), num_classes=4, hidden=(9, 8)), (1, 5, 5)),
    "wide mlp": (lambda: mlp(input_shape=(1200,), num_classes=4), (1200,)),
    "cnn": (lambda: cnn(input_shape=(2, 8, 8), num_classes=4), (2, 8, 8)),
    "batch norm, a sum, an average": (Residual, (2, 6, 6)),
    "tokens, tied": (Tokens, (3, 6)),
    "batch norm, borders, groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", groups=2),
            nn.BatchNorm2d(4),
            nn.PReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * 6 * 6, 4),
        ),
        (2, 6, 6),
    ),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(factory: Callable[[], nn.Module]) -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModel(factory())


def of_devices(sizes: list[int], shape: tuple[int, ...], seed: int) -> Rows:
    """Inputs of another scale on each device."""
    device = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scale = torch.tensor([0.1, 5.0, 1.0, 30.0])[device].view(-1, *[1] * len(shape))
    return Rows(randn(len(device), *shape, seed=seed) * scale, device)


def parts_of(rows: Rows, size: int) -> list[Rows]:
    pairs = zip(rows.x.split(size), rows.device.split(size), strict=True)
    return [Rows(x, device) for x, device in pairs]


def prepare(model: FlatModel) -> Int8Prepared:
    params = model.initial()
    return Int8Runtime().prepare(model, params)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_each_row_is_answered_by_the_model_of_its_device(name: str) -> None:
    factory, shape = NETWORKS[name]
    model = made(factory)
    prepared = prepare(model)
    calibration = of_devices(NUM_CALIBRATION, shape, seed=1)
    rows = of_devices(NUM_INPUTS, shape, seed=2)
    # 11 rows at a time: devices begin and end within a part.
    group = prepared.calibrated_group(parts_of(calibration, 11), num_devices=4)
    logits = group(rows)
    for device in range(4):
        own = calibration.x[calibration.device == device]
        alone = prepared.calibrated(own)
        ranges = {}
        for key in [k for k in group.tensors if k.endswith(("low", "high"))]:
            if device != 1:  # float sums may end in another bit for another size of a batch
                torch.testing.assert_close(group.tensors[key][device], alone.tensors[key])
                ranges[key] = group.tensors[key][device]
        same = Int8Predictor(alone.skeleton, {**alone.tensors, **ranges}, alone.model_bytes)
        mine = rows.device == device
        if mine.any():
            assert torch.equal(logits[mine], same(rows.x[mine]))
        assert group.model_bytes == alone.model_bytes


@torch.no_grad()
def test_ranges_that_are_not_finite_stay_with_their_device() -> None:
    model = made(lambda: nn.Linear(6, 4))
    calibration = of_devices([3, 3, 3, 3], (6,), seed=1)
    calibration.x[4] = float("nan")
    group = prepare(model).calibrated_group([calibration], num_devices=4)
    logits = group(of_devices([2, 2, 2, 2], (6,), seed=2))
    assert torch.isnan(logits).any(1).tolist() == [False] * 2 + [True] * 2 + [False] * 4


@torch.no_grad()
def test_predictors_of_a_tied_layer_leave_nothing_to_each_other() -> None:
    prepared = prepare(made(Tokens))
    x, none = randn(5, 3, 6, seed=3), torch.empty(0, 3, 6)
    before = prepared.calibrated(none)(x)
    prepared.calibrated(100 * x)(x)
    prepared.calibrated_group([], num_devices=1)(Rows(x, torch.zeros(5, dtype=torch.int64)))
    assert torch.equal(prepared.calibrated(none)(x), before)


@torch.no_grad()
def test_a_layer_that_gets_other_rows_refuses() -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(-1, 4)).reshape(len(x), -1)  # type: ignore[no-any-return]

    prepared = prepare(made(Folds))
    group = prepared.calibrated_group([], num_devices=4)
    with pytest.raises(ValueError, match="a layer got 6 rows for 3 inputs"):
        group(Rows(torch.ones(3, 8), torch.arange(3)))


def test_observing_a_group_leaves_no_hooks_behind() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)))
    with pytest.raises(RuntimeError):
        prepare(model).calibrated_group(
            [Rows(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))], num_devices=1
        )
    assert not any(layer._forward_pre_hooks for layer in model.module.modules())


def test_the_float_runtime_answers_all_devices_alike() -> None:
    model = made(lambda: nn.Linear(6, 4))
    prepared = FloatRuntime().prepare(model, model.initial())
    rows = of_devices(NUM_INPUTS, (6,), seed=2)
    group = prepared.calibrated_group([], num_devices=4)
    assert torch.equal(group(rows), model(model.initial(), rows.x))
    assert (group.model_bytes, prepared.serves_float) == (prepared.model_bytes, True)
