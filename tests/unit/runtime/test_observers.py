"""How ranges are taken: by hand, for one device and for a group, and by both runtimes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgelearn.compress.quantize import quantize_weight
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Predictor, Int8Runtime
from edgelearn.runtime.observers import MinMax, MovingAverage, Percentile, make_observer
from edgelearn.runtime.protocol import (
    GroupPrepared,
    RangedGroupPrepared,
    Rows,
    Runtime,
    make_runtime,
)
from edgelearn.runtime.weight_only import WeightOnlyPredictor
from edgelearn.scenario.models import cnn, mlp


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(module: nn.Module) -> FlatModel:
    model = FlatModel(module)
    with torch.no_grad():
        for number, parameter in enumerate(model.module.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=number))
    return model


def network() -> FlatModel:
    return made(cnn(input_shape=(1, 12, 12), num_classes=5, hidden=16))


# -- by hand ---------------------------------------------------------------------------------------

THOUSAND = torch.arange(1, 1001.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize(
    ("percent", "pair"),
    [(100, (1, 1000)), (99.9, (2, 999)), (99, (11, 990)), (50.1, (500, 501)), (99.99, (1, 1000))],
)
def test_a_percentile_is_by_nearest_rank_from_both_ends(
    percent: float, pair: tuple[float, float]
) -> None:
    low, high = Percentile(percent).range_of(THOUSAND.view(10, 100))
    assert (float(low), float(high)) == pair


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_a_percentile_next_to_50_has_its_ends_in_order(count: int) -> None:
    low, high = Percentile(50 + 1e-9).range_of(torch.arange(float(count)))
    assert (float(low), float(high)) == ((count - 1) // 2, count // 2)


def test_an_outlier_is_cut_off_by_a_percentile_only() -> None:
    values = torch.cat([THOUSAND, torch.tensor([1e6])])
    assert float(MinMax().range_of(values)[1]) == 1e6
    assert float(Percentile(99.9).range_of(values)[1]) == 1000


def test_the_moving_average_is_that_of_a_loop_over_samples() -> None:
    values = randn(7, 3, 4)
    low, high = values[0].min().double(), values[0].max().double()
    for sample in values[1:]:
        low = 0.8 * low + 0.2 * sample.min()
        high = 0.8 * high + 0.2 * sample.max()
    found = MovingAverage(0.2).range_of(values)
    torch.testing.assert_close(found, (low.float(), high.float()))


def test_one_sample_is_its_own_average() -> None:
    values = randn(1, 5)
    assert MovingAverage(0.3).range_of(values) == MinMax().range_of(values)


def test_with_a_rate_of_one_the_last_sample_counts() -> None:
    values = randn(6, 5)
    assert MovingAverage(1).range_of(values) == MinMax().range_of(values[-1:])


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": "percentil"}, "did you mean 'percentile'"),
        ({"calibration": "percentile", "percentile": 50}, "percentile is 50; allowed: above 50"),
        ({"calibration": "percentile", "percentile": 100.1}, "allowed: above 50"),
        ({"calibration": "percentile", "percentile": float("nan")}, "allowed: above 50"),
        ({"calibration": "moving-average", "averaging": 0}, "averaging is 0; allowed: above 0"),
        ({"calibration": "percentile", "percentile": "99"}, "percentile is '99'; allowed: above"),
        ({"calibration": "percentile", "percentile": True}, "percentile is True; allowed: above"),
        ({"calibration": "moving-average", "averaging": True}, "averaging is True; allowed: above"),
        ({"calibration": "moving-average", "averaging": "1"}, "averaging is '1'; allowed: above 0"),
        ({"percentile": 99}, "percentile is an argument of calibration 'percentile'"),
        (
            {"calibration": "percentile", "averaging": 0.1},
            "argument of calibration 'moving-average'; calibration is 'percentile'",
        ),
    ],
)
@pytest.mark.parametrize("runtime", ["int8", "onnxruntime"])
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str, runtime: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=message):
        make_observer(**arguments)
    with pytest.raises(Exception, match=message):
        make_runtime(runtime, arguments)


def test_what_is_not_calibrated_takes_no_calibration() -> None:
    with pytest.raises(ValueError, match="with activations 'dynamic' nothing is calibrated"):
        Int8Runtime(activations="dynamic", calibration="percentile")
    with pytest.raises(ValueError, match=r"activations is 'dinamic'.*did you mean 'dynamic'"):
        Int8Runtime(activations="dinamic")


# -- in service ------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    {},
    {"calibration": "percentile", "percentile": 98},
    {"calibration": "moving-average"},
]


def runtimes(**arguments: Any) -> list[Runtime]:
    found: list[Runtime] = [Int8Runtime(weight_bits=7, **arguments)]
    pytest.importorskip("onnxruntime")
    return [*found, make_runtime("onnxruntime", {"weight_bits": 7, **arguments})]


@torch.no_grad()
@pytest.mark.parametrize("arguments", METHODS)
def test_both_runtimes_take_the_same_ranges_and_give_the_same_answers(
    arguments: dict[str, Any],
) -> None:
    model = network()
    calibration, x = randn(30, 1, 12, 12), randn(100, 1, 12, 12, seed=1)
    found = [
        runtime.prepare(model, model.initial()).calibrated(calibration)(x)
        for runtime in runtimes(**arguments)
    ]
    scale = float(found[0].abs().max())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-3 * scale)
    if arguments:
        plain = Int8Runtime(weight_bits=7).prepare(model, model.initial()).calibrated(calibration)
        assert float((plain(x) - found[0]).abs().max()) > 1e-2 * scale


@torch.no_grad()
@pytest.mark.parametrize("arguments", METHODS)
def test_a_group_has_the_ranges_of_each_device_wherever_its_parts_end(
    arguments: dict[str, Any],
) -> None:
    model, sizes = network(), torch.tensor([4, 0, 9])
    device = torch.repeat_interleave(torch.arange(3), sizes)
    x = randn(13, 1, 12, 12) * torch.tensor([1.0, 1.0, 5.0])[device].view(-1, 1, 1, 1)
    parts = [Rows(x[:6], device[:6]), Rows(x[6:], device[6:])]
    for runtime in runtimes(**arguments):
        prepared = runtime.prepare(model, model.initial())
        assert isinstance(prepared, RangedGroupPrepared)
        group = prepared.observed_group(parts, num_devices=3).ranges
        for own in (0, 2):
            alone = prepared.observed(x[device == own]).ranges
            assert alone.keys() == group.keys()
            for place, pair in alone.items():
                torch.testing.assert_close(tuple(r[own] for r in group[place]), pair)
        assert all(bool(low[1] > high[1]) for low, high in group.values())


def test_a_layer_used_twice_has_the_range_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(10 * x)))  # type: ignore[no-any-return]

    model, x = made(Twice()), randn(50, 4)
    runtime = Int8Runtime(calibration="percentile", percentile=90)
    served = runtime.prepare(model, model.initial()).calibrated(x)
    assert isinstance(served, Int8Predictor)
    expected = Percentile(90).range_of(10 * x)
    assert (served.tensors["layer.low"], served.tensors["layer.high"]) == expected


@torch.no_grad()
def test_dynamic_activations_are_those_of_a_device_without_samples() -> None:
    model, x = network(), randn(20, 1, 12, 12)
    dynamic = Int8Runtime(activations="dynamic").prepare(model, model.initial())
    expected = Int8Runtime().prepare(model, model.initial()).calibrated(x[:0])(x)
    assert torch.equal(dynamic.calibrated(5 * x)(x), expected)
    assert isinstance(dynamic, GroupPrepared)
    rows = Rows(x, torch.arange(20) % 2)
    group = dynamic.calibrated_group([rows], num_devices=2)
    assert torch.equal(group(rows), expected)


@torch.no_grad()
def test_weights_that_layers_share_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]

    model, x = made(Tied()), randn(5, 6)
    served = Int8Runtime(activations="float").prepare(model, model.initial())
    assert served.calibrated(x).model_bytes == 36 + 4 * 6 + 2 * 4 * 6
    params = model.initial()
    weight = model.layout.views(params)["first.weight"]
    codes, scale = quantize_weight(weight)
    weight.copy_(codes * scale.view(-1, 1))
    assert torch.equal(served.calibrated(x)(x), model(params, x))


def test_weight_only_makes_no_copy_of_the_network() -> None:
    """It needs none, and some networks hold what can't be copied."""
    model = made(mlp(input_shape=(6,), num_classes=3))
    model.module.lock = threading.Lock()  # type: ignore[assignment]
    served = Int8Runtime(activations="float").prepare(model, model.initial())
    assert isinstance(served, WeightOnlyPredictor)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_multiplies_floats_by_what_codes_stand_for(bits: int) -> None:
    model, x = made(mlp(input_shape=(6,), num_classes=3, hidden=(5,))), randn(20, 6)
    params = model.initial()
    before = params.clone()
    served = Int8Runtime(weight_bits=bits, activations="float").prepare(model, params)
    views = model.layout.views(params.clone())
    weights = [name for name in views if name.endswith("weight")]
    for name in weights:
        codes, scale = quantize_weight(views[name], largest=2 ** (bits - 1) - 1)
        views[name].copy_(codes * scale.view(-1, 1))
    exact = torch.cat([view.flatten() for view in views.values()])
    assert torch.equal(served.calibrated(x)(x), model(exact, x))
    assert torch.equal(params, before)
    rows = Rows(x, torch.arange(20) % 2)
    assert isinstance(served, GroupPrepared)
    assert torch.equal(served.calibrated_group([], num_devices=2)(rows), model(exact, x))
    num_codes, num_scales = 6 * 5 + 5 * 3, 5 + 3
    expected = sum(-(-count * bits // 8) for count in (30, 15)) + 4 * num_scales + 4 * num_scales
    assert served.model_bytes == expected
    assert FloatRuntime().prepare(model, params).model_bytes == 4 * (num_codes + num_scales)
