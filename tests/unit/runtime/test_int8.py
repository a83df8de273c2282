"""The int8 runtime: integer arithmetic exactly, ranges, bytes, and what it costs in accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import edgelearn
from edgelearn.compress.quantize import activation_scale, fake_quantize_weight, quantize_weight
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Predictor, Int8Runtime
from edgelearn.runtime.int8_forms import Layers, form_of
from edgelearn.runtime.protocol import make_runtime
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.world import build

Array = NDArray[Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def made(build_module: Any, *, seed: int = 0) -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlatModel(build_module())
    model.module.eval()
    return model


def serve(model: FlatModel, calibration: Tensor, params: Tensor | None = None) -> Int8Predictor:
    params = model.initial() if params is None else params
    return Int8Runtime().prepare(model, params).calibrated(calibration)


# -- a second implementation, in integers ----------------------------------------------------------


def integer_layer(
    layer: nn.Linear | nn.Conv2d, x: Tensor, low: Tensor, high: Tensor, *, largest: int = 127
) -> Tensor:
    """Do what an integer kernel does, with NumPy's int64 and plain loops.

    `low` and `high` are scalars (calibrated) or [B] (the range of each input).
    """
    step, zero = activation_scale(low, high)
    shape = (-1, *[1] * (x.dim() - 1)) if step.dim() else ()
    step, zero = step.reshape(shape), zero.reshape(shape)
    codes = torch.clamp(torch.round(x / step) + zero, 0, 255)
    centred = codes.numpy().astype(np.int64) - zero.numpy().astype(np.int64)
    weight, scale = (t.numpy() for t in quantize_weight(layer.weight.detach(), largest=largest))
    if isinstance(layer, nn.Linear):
        total = centred @ weight.astype(np.int64).T
        per_channel = scale
    else:
        total = integer_conv(centred, weight.astype(np.int64), layer)
        per_channel = scale.reshape(1, -1, 1, 1)
    unit = step.numpy().astype(np.float64) * per_channel.astype(np.float64)
    if layer.bias is not None:
        bias = layer.bias.detach().numpy().astype(np.float64)
        rounded = np.round(bias.reshape(per_channel.shape) / unit)
        total = total + np.clip(rounded, -(2**31), 2**31 - 1).astype(np.int64)
    return torch.from_numpy((total * unit).astype(np.float32))


def integer_conv(x: Array, weight: Array, layer: nn.Conv2d) -> Array:
    """Convolution of int64 arrays [B, C, H, W], one place after another."""
    (stride_h, stride_w), (pad_h, pad_w) = layer.stride, layer.padding
    (dilate_h, dilate_w), groups = layer.dilation, layer.groups
    x = np.pad(x, ((0, 0), (0, 0), (int(pad_h), int(pad_h)), (int(pad_w), int(pad_w))))
    out_channels, depth, kernel_h, kernel_w = weight.shape
    height = (x.shape[2] - dilate_h * (kernel_h - 1) - 1) // stride_h + 1
    width = (x.shape[3] - dilate_w * (kernel_w - 1) - 1) // stride_w + 1
    out = np.zeros((len(x), out_channels, height, width), dtype=np.int64)
    for channel in range(out_channels):
        first = channel // (out_channels // groups) * depth
        for row in range(height):
            for column in range(width):
                top, left = row * stride_h, column * stride_w
                patch = x[
                    :,
                    first : first + depth,
                    top : top + dilate_h * kernel_h : dilate_h,
                    left : left + dilate_w * kernel_w : dilate_w,
                ]
                out[:, channel, row, column] = (patch * weight[channel]).sum((1, 2, 3))
    return out


LAYERS = {
    "linear": (lambda: nn.Linear(20, 7), (20,)),
    "linear without bias": (lambda: nn.Linear(20, 7, bias=False), (20,)),
    "wide linear": (lambda: nn.Linear(900, 5), (900,)),  # sums beyond float32's whole numbers
    "linear over places": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "conv, padding": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2)), (3, 5, 5)),
    "conv, stride": (lambda: nn.Conv2d(2, 4, 3, stride=(2, 3), padding=1), (2, 8, 9)),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
    "conv, dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 7, 7)),
    "deep conv": (lambda: nn.Conv2d(64, 2, 3, padding=1), (64, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_calibrated_arithmetic_is_that_of_an_integer_kernel(name: str) -> None:
    factory, shape = LAYERS[name]
    model = made(factory)
    calibration, x = randn(16, *shape, seed=1), 1.3 * randn(9, *shape, seed=2)
    found = serve(model, calibration)(x)
    expected = integer_layer(model.module, x, calibration.min(), calibration.max())  # type: ignore[arg-type]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("bits", "largest"), [(7, 64), (4, 7)])
@pytest.mark.parametrize("name", ["wide linear", "conv, groups"])
def test_weights_of_fewer_bits_have_smaller_codes(name: str, bits: int, largest: int) -> None:
    factory, shape = LAYERS[name]
    model = made(factory)
    calibration, x = randn(16, *shape, seed=1), randn(9, *shape, seed=2)
    prepared = Int8Runtime(weight_bits=bits).prepare(model, model.initial())
    low, high = calibration.min(), calibration.max()
    expected = integer_layer(model.module, x, low, high, largest=largest)  # type: ignore[arg-type]
    assert torch.equal(prepared.calibrated(calibration)(x), expected)
    assert not torch.equal(serve(model, calibration)(x), expected)


def test_weights_of_four_bits_are_two_to_a_byte() -> None:
    model = made(lambda: nn.Linear(5, 3))
    sizes = [
        Int8Runtime(weight_bits=bits)
        .prepare(model, model.initial())
        .calibrated(randn(0))
        .model_bytes
        for bits in (8, 7, 4)
    ]
    assert sizes == [15 + 12 + 12 + 5, 15 + 12 + 12 + 5, 8 + 12 + 12 + 5]
    assert make_runtime("int8", {"weight_bits": 4}).weight_bits == 4  # type: ignore[attr-defined]
    with pytest.raises(ScenarioError, match="weight_bits is 9; allowed: 2 to 8"):
        make_runtime("int8", {"weight_bits": 9})


@pytest.mark.parametrize("name", LAYERS)
def test_without_calibration_each_input_has_its_own_range(name: str) -> None:
    factory, shape = LAYERS[name]
    model = made(factory)
    x = randn(5, *shape, seed=2) * torch.tensor([0.01, 1.0, 30.0, 5.0, 1.0]).view(
        -1, *[1] * len(shape)
    )
    predict = serve(model, torch.empty(0, *shape))
    flat = x.flatten(1)
    expected = integer_layer(model.module, x, flat.amin(1), flat.amax(1))  # type: ignore[arg-type]
    assert torch.equal(predict(x), expected)
    alone = torch.cat([predict(one[None]) for one in x])
    assert torch.equal(predict(x), alone)  # an answer does not depend on its neighbours


@pytest.mark.parametrize("name", ["linear", "linear over places", "conv"])
def test_no_inputs_get_no_answers(name: str) -> None:
    factory, shape = LAYERS[name]
    model, none = made(factory), torch.empty(0, *shape)
    expected = model(model.initial(), none).shape
    for calibration in (none, randn(4, *shape)):
        assert serve(model, calibration)(none).shape == expected


def test_a_large_bias_is_not_rounded_to_float32() -> None:
    """A bias code may take all of 32 bits; the sum with it has to stay exact."""
    model = made(lambda: nn.Linear(8, 3))
    with torch.no_grad():
        model.module.weight.mul_(1e-2)
        model.module.bias.copy_(torch.tensor([700.0, -321.7, 0.123]))
    x = randn(6, 8)
    torch.testing.assert_close(
        serve(model, x)(x), model(model.initial(), x).detach(), rtol=1e-4, atol=1e-3
    )
    assert torch.equal(serve(model, x)(x), integer_layer(model.module, x, x.min(), x.max()))  # type: ignore[arg-type]


def test_a_bias_that_does_not_fit_32_bits_saturates_as_it_would_on_a_device() -> None:
    model = made(lambda: nn.Linear(8, 3))
    with torch.no_grad():
        model.module.weight.mul_(1e-6)
        model.module.bias.copy_(torch.tensor([1e6, -1e6, 0.0]))
    x = randn(6, 8)
    found = serve(model, x)(x)
    assert torch.equal(found, integer_layer(model.module, x, x.min(), x.max()))  # type: ignore[arg-type]
    assert float(found.abs().max()) < 1e3


@pytest.mark.parametrize("factor", [1e-9, 1e-4, 1.0])
def test_an_input_of_a_range_too_small_for_the_bias_has_a_larger_step(factor: float) -> None:
    """Without calibration: at the step of its own range, the bias would not fit 32 bits."""
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)))
    with torch.no_grad():
        model.module[0].bias.copy_(torch.tensor([1e3, -50.0, 0.0]))  # type: ignore[index,operator]
    x = factor * randn(5, 2, 4, 4)
    expected = model(model.initial(), x).detach()
    found = serve(model, torch.empty(0, 2, 4, 4))(x)
    assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())
    alone = torch.cat([serve(model, torch.empty(0, 2, 4, 4))(row) for row in x.split(1)])
    assert torch.equal(found, alone)


def test_a_channel_of_hardly_any_weight_does_not_coarsen_its_neighbours() -> None:
    model = made(lambda: nn.Linear(8, 3))
    with torch.no_grad():
        model.module.weight[1] *= 1e-12  # type: ignore[index,operator]
    x = randn(6, 8)
    error = serve(model, torch.empty(0, 8))(x) - model(model.initial(), x)
    assert float(error[:, [0, 2]].abs().max()) < 0.02


def test_sums_beyond_the_whole_numbers_of_float32_are_exact() -> None:
    model = made(lambda: nn.Linear(8192, 4, bias=False))
    with torch.no_grad():
        model.module.weight.copy_(0.7 + 0.3 * torch.rand(4, 8192, generator=seeded()))
    x = 0.7 + 0.3 * torch.rand(20, 8192, generator=seeded(1))
    expected = integer_layer(model.module, x, x.min(), x.max())  # type: ignore[arg-type]
    assert torch.equal(serve(model, x)(x), expected)


# -- ranges ----------------------------------------------------------------------------------------


def test_ranges_come_from_the_devices_own_inputs_layer_by_layer() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    calibration = randn(30, 6)
    predictor = serve(model, calibration)
    hidden = F.relu(F.linear(calibration, model.module[0].weight, model.module[0].bias))  # type: ignore[index]
    assert float(predictor.tensors["0.low"]) == float(calibration.min())
    assert float(predictor.tensors["0.high"]) == float(calibration.max())
    assert float(predictor.tensors["2.low"]) == 0.0
    assert float(predictor.tensors["2.high"]) == pytest.approx(hidden.max().item())


def test_devices_with_other_inputs_have_other_ranges_and_the_same_weights() -> None:
    model = made(lambda: nn.Linear(6, 5))
    prepared = Int8Runtime().prepare(model, model.initial())
    one, other = prepared.calibrated(randn(9, 6)), prepared.calibrated(10 * randn(9, 6, seed=1))
    assert float(other.tensors["high"]) > 3 * float(one.tensors["high"])
    assert other.tensors["codes"] is one.tensors["codes"]
    x = randn(4, 6, seed=2)
    before = one(x)
    assert not torch.equal(other(x), before)
    assert torch.equal(one(x), before)


def test_calibration_leaves_the_network_as_it_was() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.module.train()
    serve(model, randn(9, 6))
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.module.modules())


def test_inputs_beyond_the_calibrated_range_are_cut_off() -> None:
    model = made(lambda: nn.Linear(1, 1, bias=False))
    predict = serve(model, torch.tensor([[-1.0], [1.0]]))
    assert torch.equal(predict(torch.tensor([[50.0]])), predict(torch.tensor([[1.01]])))


@pytest.mark.parametrize("calibration", [torch.zeros(4, 6), torch.empty(0, 6)])
def test_inputs_of_zeros_give_the_bias(calibration: Tensor) -> None:
    """What lies behind dead units is all zeros: its range has no width, and no step."""
    model = made(lambda: nn.Linear(6, 3))
    found = serve(model, calibration)(torch.zeros(2, 6))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, model.module.bias.expand(2, 3), rtol=0, atol=2e-3)


def test_a_channel_of_zero_weights_gives_its_bias() -> None:
    model = made(lambda: nn.Linear(6, 3))
    with torch.no_grad():
        model.module.weight[1] = 0
    found = serve(model, randn(8, 6))(randn(5, 6, seed=1))
    expected = model.module.bias[1].detach().expand(5)
    torch.testing.assert_close(found[:, 1], expected, rtol=0, atol=1e-2)


def test_a_layer_that_is_used_twice_has_the_range_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(5 * self.layer(x))  # type: ignore[no-any-return]

    model = made(Twice)
    x = randn(8, 4)
    second = 5 * F.linear(x, model.module.layer.weight, model.module.layer.bias)
    predictor = serve(model, x)
    assert float(predictor.tensors["layer.high"]) == pytest.approx(
        max(x.max().item(), second.max().item())
    )
    torch.testing.assert_close(predictor(x), model(model.initial(), x), rtol=0, atol=0.2)


# -- networks --------------------------------------------------------------------------------------


def close(model: FlatModel, x: Tensor, atol: float, params: Tensor | None = None) -> None:
    params = model.initial() if params is None else params
    with torch.no_grad():
        exact = model(params, x)
        found = serve(model, x, params)(x)
    assert not torch.equal(found, exact)  # it is quantized at all
    torch.testing.assert_close(found, exact, rtol=0, atol=atol)


def test_a_network_that_is_one_layer() -> None:
    close(made(lambda: nn.Linear(12, 4)), randn(20, 12), atol=0.05)
    close(made(lambda: nn.Conv2d(2, 4, 3)), randn(20, 2, 5, 5), atol=0.05)


def test_a_cnn_with_pooling() -> None:
    model = made(lambda: cnn(input_shape=(1, 8, 8), num_classes=10))
    close(model, randn(20, 1, 8, 8), atol=0.03)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_borders_that_are_not_zeros(mode: str) -> None:
    model = made(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode))
    close(model, randn(10, 2, 6, 6), atol=0.05)


def test_padding_by_name() -> None:
    close(made(lambda: nn.Conv2d(2, 3, 3, padding="same")), randn(10, 2, 6, 6), atol=0.05)


def test_batch_norm_is_folded_into_the_layer_before_it() -> None:
    model = made(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
    )
    params = model.initial()
    views = model.layout.views(params)
    views["1.running_mean"].copy_(randn(4))
    views["1.running_var"].copy_(randn(4, seed=1).square() + 0.5)
    views["1.weight"].copy_(randn(4, seed=2))
    x = randn(20, 1, 6, 6)
    close(model, x, 0.1, params)
    served = serve(model, x, params)
    factor = views["1.weight"] / (views["1.running_var"] + 1e-5).sqrt()
    codes, scale = quantize_weight(views["0.weight"] * factor.view(-1, 1, 1, 1))
    assert torch.equal(served.tensors["layer:0.codes"], codes.float())
    torch.testing.assert_close(served.tensors["layer:0.scale"], scale)
    bias = (views["0.bias"] - views["1.running_mean"]) * factor + views["1.bias"]
    torch.testing.assert_close(served.tensors["layer:0.bias"], bias)
    assert not any(name.startswith("layer:1") for name in served.tensors)


def test_a_deep_network_is_read_as_any_other() -> None:
    """Whatever a reader tries it with must not grow beyond float32 from layer to layer."""
    block = lambda: (nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU())  # noqa: E731
    model = made(lambda: nn.Sequential(*(m for _ in range(60) for m in block())))
    assert type(form_of(model, (128,))) is not Layers


def test_a_network_without_finite_answers_is_served_layer_by_layer() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    next(model.module.parameters()).data.fill_(float("inf"))
    assert type(form_of(model, (4,))) is Layers


def test_layers_may_have_the_names_of_a_module_s_attributes() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._network, self._step = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self._step(x + self._network(x))  # type: ignore[no-any-return]

    close(made(Named), randn(20, 6), 0.1)


def test_batch_norm_that_can_not_be_folded_stays_float() -> None:
    model = made(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    )
    params = model.initial()
    views = model.layout.views(params)
    views["2.running_mean"].copy_(randn(4))
    x = randn(20, 6)
    close(model, x, 0.1, params)
    served = serve(model, x, params)
    assert torch.equal(served.tensors["2.running_mean"], views["2.running_mean"])
    assert isinstance(served.skeleton[2], nn.BatchNorm1d)  # type: ignore[index]


def test_a_norm_alone_stays_float() -> None:
    model, x = made(lambda: nn.BatchNorm1d(4)), randn(5, 4)
    with torch.no_grad():
        assert torch.equal(serve(model, x)(x), model(model.initial(), x))


class Halved(nn.Module):
    """x and, through a layer, a part of it, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x + self.part(x)).flatten(1))  # type: ignore[no-any-return]


def test_what_enters_a_sum_is_codes() -> None:
    model = made(Halved)
    params = torch.tensor([-0.5, 1, 1, 1, 1])  # the sum of x / 2
    calibration = torch.tensor([0.0, 255, 0, 0]).view(1, 1, 2, 2)  # x in steps of 1, the rest of .5
    x = torch.tensor([0.4, 1.4, 7.0, 100.2]).view(1, 1, 2, 2)
    assert float(model(params, x)) == pytest.approx(109 / 2)
    # In float, 1.4 would give 1.4 - 0.5, so 1.0 in steps of a half; and 0.4 would give 0.5.
    found = serve(model, calibration, params)(x)
    assert float(found) == pytest.approx(0 + 0.5 + 3.5 + 50)


def test_parameters_are_those_given_and_are_copied() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 3), nn.PReLU()))
    params, x = model.initial() + 0.5, randn(9, 6)
    predictor = serve(model, x, params)
    before = predictor(x)
    torch.testing.assert_close(before, model(params, x).detach(), rtol=0, atol=0.05)
    params.zero_()
    assert torch.equal(predictor(x), before)


def test_one_runtime_serves_several_networks_and_parameters() -> None:
    runtime, x = Int8Runtime(), randn(9, 6)
    models = [made(lambda: nn.Linear(6, 3), seed=s) for s in (0, 1)]
    predictors = [runtime.prepare(m, m.initial()).calibrated(x) for m in models]
    later = runtime.prepare(models[0], models[0].initial() * 2).calibrated(x)
    for model, predictor in zip(models, predictors, strict=True):
        exact = model(model.initial(), x).detach()
        torch.testing.assert_close(predictor(x), exact, rtol=0, atol=0.05)
    torch.testing.assert_close(later(x), 2 * predictors[0](x), rtol=0, atol=0.05)


class Shares(nn.Module):
    """The same layer under two names, and a weight that an embedding shares."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = self.first
        self.words = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.same(torch.relu(self.first(x))) + self.words(torch.tensor(2))
        return self.head(hidden)  # type: ignore[no-any-return]


def test_shared_layers_and_shared_weights() -> None:
    model = made(Shares)
    params = model.initial() + 0.3 * randn(model.layout.size)
    close(model, randn(20, 4), 0.3, params)


def test_hooks_do_to_a_quantized_layer_what_they_do_to_the_float_one() -> None:
    model, x = made(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))), randn(50, 6)
    model.module[0].register_forward_pre_hook(lambda _layer, inputs: (3 * inputs[0],))  # type: ignore[index]
    model.module[0].register_forward_hook(lambda _layer, _inputs, out: out + 5)  # type: ignore[index]
    close(model, x, 0.1)
    alone = made(lambda: nn.Linear(6, 4))
    alone.module.register_forward_hook(lambda _layer, _inputs, out: out + 5)
    close(alone, x, 0.05)


def test_torch_s_fast_path_of_attention_is_not_taken() -> None:
    """It reads float weights of layers that have none any more."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.encoder(x).mean(1))  # type: ignore[no-any-return]

    close(made(Attention), randn(30, 5, 8), 0.05)


def test_a_subclass_that_may_do_anything_stays_float() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = made(lambda: nn.Sequential(Doubled(4, 4), nn.Linear(4, 2)))
    close(model, randn(20, 4), atol=0.1)
    assert serve(model, randn(2, 4)).model_bytes == 4 * 20 + (8 + 4 * 2 + 4 * 2 + 5)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "num_bytes"),
    [
        # codes + scale per channel + bias per channel + scale and zero point of the input
        (lambda: nn.Linear(10, 3), 30 + 4 * 3 + 4 * 3 + 5),
        (lambda: nn.Linear(10, 3, bias=False), 30 + 4 * 3 + 5),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), 6 * 2 * 9 + 4 * 6 + 4 * 6 + 5),
        (
            lambda: nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
            (30 + 24 + 5) + (6 + 16 + 5),  # folded
        ),
        (
            lambda: nn.Sequential(nn.Linear(10, 3), nn.PReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)),
            (30 + 24 + 5) + 4 + 4 * (3 + 3 + 3 + 3) + (6 + 16 + 5),
        ),
        (lambda: nn.Sequential(nn.Linear(10, 4), nn.PReLU()), 40 + 32 + 5 + 4),
    ],
)
def test_model_bytes_counted_by_hand(factory: Any, num_bytes: int) -> None:
    model = made(factory)
    shape = (4, 5, 5) if isinstance(model.module, nn.Conv2d) else (10,)
    assert serve(model, torch.empty(0, *shape)).model_bytes == num_bytes


def test_a_served_model_takes_about_a_quarter() -> None:
    model = made(lambda: mlp(input_shape=(1, 28, 28), num_classes=10, hidden=(128,)))
    exact = FloatRuntime().prepare(model, model.initial()).model_bytes
    assert exact == 4 * model.layout.size
    assert 0.25 < serve(model, torch.empty(0, 1, 28, 28)).model_bytes / exact < 0.265


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [64, 0])
def test_a_trained_network_loses_next_to_no_accuracy(held: int) -> None:
    world = build(edgelearn.load("split-digits"))
    model = world.model()
    everything = world.train.batch(torch.arange(len(world.train.y)))
    test = world.test.batch(torch.arange(len(world.test.y)))
    params = model.initial().requires_grad_()
    optimizer = torch.optim.Adam([params], lr=0.01)
    for step in range(150):
        chosen = torch.randperm(len(everything.y), generator=seeded(step))[:128]
        loss = F.cross_entropy(model(params, everything.x[chosen]), everything.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.module.eval()
        exact = (model(params, test.x).argmax(1) == test.y).float().mean()
        predict = serve(model, everything.x[:held], params.detach())
        found = (predict(test.x).argmax(1) == test.y).float().mean()
    assert exact > 0.93
    assert abs(float(found - exact)) <= 0.015


# -- the float runtime, and names ------------------------------------------------------------------


def test_the_float_runtime_serves_the_parameters_as_they_are() -> None:
    model, x = made(lambda: nn.Linear(6, 3)), randn(4, 6)
    params = model.initial()
    predictor = FloatRuntime().prepare(model, params).calibrated(x)
    assert torch.equal(predictor(x), model(params, x))
    expected = predictor(x)
    params.zero_()
    assert torch.equal(predictor(x), expected)


def test_runtimes_are_found_by_name() -> None:
    assert isinstance(make_runtime("int8", {}), Int8Runtime)
    assert isinstance(make_runtime("float", {}), FloatRuntime)
    with pytest.raises(edgelearn.EdgelearnError, match="Int8Runtime does not take it"):
        make_runtime("int8", {"bits": 4})


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_fewer_bits_are_a_coarser_grid_and_fewer_bytes(bits: int) -> None:
    model = FlatModel(nn.Linear(6, 5))
    params, x = model.initial(), randn(9, 6)
    predictor = Int8Runtime(weight_bits=bits).prepare(model, params).calibrated(x)
    weight, bias = params[:30].view(5, 6), params[30:]
    rounded = torch.cat([fake_quantize_weight(weight, bits=bits).flatten(), bias])
    low, high = float(x.min()), float(x.max())
    step = (max(high, 0) - min(low, 0)) / 255
    difference = (predictor(x) - model(rounded, x)).abs().amax()
    assert difference <= 6 * float(weight.abs().amax()) * step  # the activations' rounding alone
    packed = {2: 8, 4: 15, 5: 19, 8: 30}[bits]  # 30 codes
    assert predictor.model_bytes == packed + 4 * 5 + 4 * 5 + 5


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_bits_that_are_none(bits: object) -> None:
    with pytest.raises(ValueError, match=r"weight_bits is .*; allowed: 2 to 8"):
        Int8Runtime(weight_bits=bits)  # type: ignore[arg-type]
