"""Ranges that outlive a model: kept while a few samples fit, observed anew when they don't."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.protocol import RangedPrepared, Runtime
from edgelearn.runtime.ranges import KeptRanges, Probe
from edgelearn.scenario.models import mlp


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5


def runtimes() -> list[Runtime]:
    found: list[Runtime] = [Int8Runtime()]
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return found
    from edgelearn.runtime.onnxruntime import OnnxRuntime

    return [*found, OnnxRuntime(weight_bits=7)]


@pytest.fixture
def model() -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = FlatModel(mlp(input_shape=(8,), num_classes=3, hidden=(6,)))
    found.module.eval()
    return found


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_calibrated_is_within_what_is_observed(runtime: Runtime, model: FlatModel) -> None:
    prepared = runtime.prepare(model, model.initial())
    assert isinstance(prepared, RangedPrepared)
    calibration, x = rand(40, 8), rand(20, 8, seed=1)
    found = prepared.within(prepared.observed(calibration))(x)
    assert torch.equal(found, prepared.calibrated(calibration)(x))
    assert not torch.equal(found, prepared.calibrated(2 * calibration)(x))


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_new_weights_are_served_within_old_ranges_until_these_drift(
    runtime: Runtime, model: FlatModel
) -> None:
    kept, calibration, x = KeptRanges(), rand(40, 8), rand(20, 8, seed=1)
    params = model.initial()
    first = runtime.prepare(model, params)
    assert torch.equal(kept.predictor(first, calibration)(x), first.calibrated(calibration)(x))
    near = runtime.prepare(model, 1.01 * params)
    assert isinstance(first, RangedPrepared)
    assert isinstance(near, RangedPrepared)
    expected = near.within(first.observed(calibration))(x)
    assert torch.equal(kept.predictor(near, calibration)(x), expected)
    assert not torch.equal(expected, near.calibrated(calibration)(x))
    assert kept.num_observed == 1
    for count, factor in enumerate((1.5, 0.4), start=2):  # activations grow; they shrink
        far = runtime.prepare(model, factor * params)
        found = kept.predictor(far, calibration)(x)
        assert torch.equal(found, far.calibrated(calibration)(x))
        assert kept.num_observed == count


@torch.no_grad()
def test_a_range_within_its_bounds_is_kept_and_one_beyond_is_not(model: FlatModel) -> None:
    """The input's own range: growth by 4 and 6 percent of it, shrinking by 40 and 60."""
    prepared = Int8Runtime().prepare(FlatModel(nn.Linear(8, 3)), torch.zeros(27))
    x = rand(8, 8)  # all of it is the probe
    x = (x - x.min()) / (x.max() - x.min())
    for factor, count in ((1.04, 1), (1.06, 2), (0.6, 1), (0.4, 2)):
        kept = KeptRanges()
        kept.predictor(prepared, x)
        kept.predictor(prepared, factor * x)
        assert kept.num_observed == count


@torch.no_grad()
def test_what_has_no_ranges_is_calibrated_each_time(model: FlatModel) -> None:
    kept, x = KeptRanges(), rand(4, 8)
    params = model.initial()
    assert torch.equal(
        kept.predictor(FloatRuntime().prepare(model, params), x)(x), model(params, x)
    )
    prepared = Int8Runtime().prepare(model, params)
    kept.predictor(prepared, x)
    uncalibrated = prepared.calibrated(x[:0])(x)
    assert torch.equal(kept.predictor(prepared, x[:0])(x), uncalibrated)
    kept.predictor(prepared, x)
    assert kept.num_observed == 1  # what came between changed nothing


@torch.no_grad()
def test_ranges_that_are_not_finite_are_not_kept(model: FlatModel) -> None:
    kept, x = KeptRanges(), rand(4, 8)
    prepared = Int8Runtime().prepare(model, model.initial())
    kept.predictor(prepared, x)
    kept.predictor(prepared, torch.full_like(x, float("nan")))
    kept.predictor(prepared, x)
    assert kept.num_observed == 3


def test_bad_arguments() -> None:
    for arguments in ({"num_samples": 0}, {"most_beyond": -0.1}, {"least_filled": 1.0}):
        with pytest.raises(ValueError, match="allowed"):
            Probe(**arguments)  # type: ignore[arg-type]
