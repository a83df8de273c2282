"""Laws of integer quantization, for any finite float32."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

from edgelearn.compress.quantize import activation_scale, quantize_weight
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.int8_layers import QuantizedLayer

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MODERATE = st.floats(-1e4, 1e4, width=32)
# The bound is stated for real numbers: float32 rounds the quotient and the product once each.
SLACK = 1e-5


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=FINITE))
def test_a_weight_comes_back_within_half_a_step(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    codes, scale = quantize_weight(weight)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= 127
    assert bool((scale > 0).all())
    per_channel = scale.double().view(-1, *[1] * (weight.dim() - 1))
    error = (weight.double() - codes.double() * per_channel).abs()
    assert bool((error <= per_channel * (0.5 + SLACK)).all())


@given(arrays(np.float32, (3, 5), elements=FINITE), st.sampled_from([0.5, 2.0, 1024.0]))
def test_codes_do_not_depend_on_the_unit(values: np.ndarray, factor: float) -> None:
    weight = torch.from_numpy(values)
    largest = weight.abs().amax(1)
    assume(bool(((largest > 1e-30) & (largest < 1e30)).all()))
    codes, scale = quantize_weight(weight)
    scaled_codes, scaled = quantize_weight(weight * factor)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scale * factor, scaled)


@given(FINITE, FINITE)
def test_zero_is_exact_and_codes_fit_eight_bits(one: float, other: float) -> None:
    low, high = (torch.tensor(v, dtype=torch.float32) for v in sorted((one, other)))
    assume(bool(torch.isfinite(high - low)))
    step, zero = activation_scale(low, high)
    assert float(step) > 0
    assert 0 <= float(zero) <= 255
    assert float(zero) == round(float(zero))


@given(MODERATE, MODERATE, arrays(np.float32, 8, elements=st.floats(0, 1, width=32)))
def test_an_activation_within_its_range_comes_back_within_a_step(
    one: float, other: float, shares: np.ndarray
) -> None:
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    x = torch.from_numpy(low + shares.astype(np.float64) * (high - low)).float()
    step, zero = activation_scale(torch.tensor(low).float(), torch.tensor(high).float())
    codes = torch.clamp(torch.round(x / step) + zero, 0, 255)
    error = (x.double() - (codes.double() - zero.double()) * step.double()).abs()
    # Half a step by rounding, half a step at the ends by the rounded zero point.
    assert bool((error <= float(step) * (1 + SLACK) + 1e-30).all())


@given(
    arrays(np.float32, (4, 6), elements=MODERATE),
    arrays(np.float32, 4, elements=MODERATE),
    arrays(np.float32, (5, 6), elements=MODERATE),
    st.booleans(),
)
def test_answers_are_finite_and_near_the_float_ones(
    weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray, calibrated: bool
) -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    model, x = FlatModel(layer), torch.from_numpy(inputs)
    predict = Int8Runtime().prepare(model, model.initial()).calibrated(x[: 5 if calibrated else 0])
    with torch.no_grad():
        found = predict(x).double()
    assert bool(torch.isfinite(found).all())
    w, b, x = layer.weight.detach().double(), layer.bias.detach().double(), x.double()
    w_step = w.abs().amax(1) / 127
    # A channel whose weights are next to nothing beside the others' may lose its bias.
    assume(float(w_step.min()) > max(2**-12 * float(w_step.max()), 1e-30))
    # Without calibration each input has a range of its own, and at least the step that biases need.
    rows = x.flatten()[None] if calibrated else x
    x_step = (rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0))[:, None] / 255
    if calibrated:
        assume(float(x_step) > 1e-3 and float(w_step.min()) > 1e-3)  # else a bias may not fit
    else:
        x_step = x_step.clamp(min=float((b.abs() / w_step).max()) / (2**31 - 1 - 255 * 127 * 6))
    # |sum x w - sum x' w'| <= sum |x - x'| |w| + sum |x'| |w - w'|; the bias is off by half a unit.
    bound = x_step * w.abs().sum(1) + (x.abs().sum(1, keepdim=True) + 6 * x_step) * w_step / 2
    bound = bound + x_step * w_step / 2
    error = (found - (x @ w.T + b)).abs()
    assert bool((error <= bound * (1 + SLACK) + 1e-6 * (1 + found.abs())).all())


# -- sums ------------------------------------------------------------------------------------------


def code_products(shape: tuple[int, ...], seed: int, share: float) -> np.ndarray:
    """Whole numbers in [-1, 1] of the extremes, a share of them 1: sums as large as they get."""
    generator = np.random.default_rng(seed)
    return np.where(generator.random(shape) < share, 1, generator.choice([-1, 0, 1], shape))


SHARES = st.sampled_from([0.0, 0.9, 1.0])


def integers_of(layer: nn.Linear | nn.Conv2d, x: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    quantized = QuantizedLayer(layer)
    quantized.codes.copy_(torch.from_numpy(codes))
    return quantized._sum(torch.from_numpy(x).to(quantized.codes.dtype))


@given(
    st.sampled_from([1, 17, 518, 519, 784, 1036, 1037, 5000]),
    st.sampled_from([1, 3, 33]),
    st.integers(0, 2**32 - 1),
    SHARES,
)
def test_sums_of_a_linear_layer_are_those_of_int64(
    fan_in: int, num_rows: int, seed: int, share: float
) -> None:
    x = 255 * code_products((num_rows, fan_in), seed, share)
    codes = 127 * code_products((5, fan_in), seed + 1, share)
    found = integers_of(nn.Linear(fan_in, 5), x, codes)
    assert np.array_equal(found.numpy().astype(np.int64), x @ codes.T)
    rest = np.random.default_rng(seed)
    x, codes = rest.integers(-255, 256, x.shape), rest.integers(-127, 128, codes.shape)
    found = integers_of(nn.Linear(fan_in, 5), x, codes)
    assert np.array_equal(found.numpy().astype(np.int64), x @ codes.T)


@settings(max_examples=30)
@given(
    st.sampled_from([(1, 3, 1), (57, 3, 1), (58, 3, 1), (120, 5, 1), (128, 3, 2), (64, 3, 64)]),
    st.sampled_from([1, 20]),
    st.integers(0, 2**32 - 1),
    SHARES,
)
def test_sums_of_a_convolution_are_those_of_int64(
    kind: tuple[int, int, int], num_rows: int, seed: int, share: float
) -> None:
    channels, kernel, groups = kind
    layer = nn.Conv2d(channels, 2 * groups, kernel, padding=1, stride=2, groups=groups)
    x = 255 * code_products((num_rows, channels, 6, 6), seed, share)
    codes = 127 * code_products(tuple(layer.weight.shape), seed + 1, share)
    found = integers_of(layer, x, codes)
    exact = torch.nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(codes), None, 2, 1, 1, groups
    )
    assert exact.dtype == torch.int64
    assert torch.equal(found.to(torch.int64), exact)


def test_a_kernel_too_large_for_float32_is_summed_in_float64() -> None:
    layer = nn.Conv2d(2, 1, 23)
    x, codes = np.full((2, 2, 23, 23), 255), np.full((1, 2, 23, 23), 127)
    found = integers_of(layer, x, codes)
    assert found.flatten().tolist() == [2 * 23 * 23 * 255 * 127] * 2
