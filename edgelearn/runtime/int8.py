r"""int8 reference runtime: integer arithmetic, exactly as an integer kernel would do it.

Linear and convolution layers are quantized; what is between them stays float.

- weights: symmetric per output channel, w_q = clip(round(w / s_w), -127, 127), s_w = max|w| / 127;
- activations: affine per tensor, x_q = clip(round(x / s_x) + z, 0, 255), range from calibration;
- bias: 32 bits at scale s_x s_w;
- result: y = s_x s_w (sum (x_q - z) w_q + b_q), the sum exact.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2. Torch has no fast
integer kernels on all processors, so the integers travel in floating-point registers wide enough
to hold every partial sum: the numbers are those of an integer kernel, the speed is not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from edgelearn.compress.quantize import activation_scale, quantize_weight
from edgelearn.params import FlatModel

Layer = nn.Linear | nn.Conv2d
_FLOAT32_EXACT = 2**24


class _QuantizedLayer(nn.Module):
    """A layer that reads its integers from buffers, which the predictor binds."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.is_conv = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding = layer.stride, layer.padding
            self.dilation, self.groups = layer.dilation, layer.groups
            self.border: tuple[list[int], str] | None = None
            if layer.padding_mode != "zeros":  # padded with inputs, as torch does it
                self.border = (layer._reversed_padding_repeated_twice, layer.padding_mode)
                self.padding = (0, 0)
            fan_in = layer.weight[0].numel()
        else:
            fan_in = layer.in_features
        # Largest partial sum of products |x_q - z| <= 255, |w_q| <= 127.
        wide = fan_in * 255 * 127 >= _FLOAT32_EXACT
        self.accumulator = torch.float64 if wide else torch.float32
        self.register_buffer("codes", torch.zeros(layer.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(len(layer.weight)))
        self.register_buffer("bias", torch.zeros(len(layer.weight)))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.full((), -1.0))

    codes: Tensor
    scale: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        channel = (1, -1, 1, 1) if self.is_conv else (-1,)
        if self.high < self.low:  # not calibrated: the range of each input
            rows = x.reshape(len(x), -1)
            low, high = rows.amin(1), rows.amax(1)
            step, zero = activation_scale(low, high)
            shape = (-1, *[1] * (x.dim() - 1))
            step, zero = step.view(shape), zero.view(shape)
        else:
            step, zero = activation_scale(self.low, self.high)
        centred = torch.clamp(torch.round(x / step) + zero, 0, 255) - zero
        codes = self.codes.to(self.accumulator)
        centred = centred.to(self.accumulator)
        if self.is_conv:
            if self.border is not None:
                centred = F.pad(centred, self.border[0], mode=self.border[1])
            total = F.conv2d(
                centred, codes, None, self.stride, self.padding, self.dilation, self.groups
            )
        else:
            total = F.linear(centred, codes)
        unit = step.double() * self.scale.double().view(channel)
        bias = torch.round(self.bias.double().view(channel) / unit).clamp(-(2**31), 2**31 - 1)
        return ((total.double() + bias) * unit).to(torch.float32)


@final
@dataclass(frozen=True, slots=True)
class Int8Predictor:
    """One device's quantized model."""

    skeleton: nn.Module
    tensors: Mapping[str, Tensor]
    model_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        out: Tensor = functional_call(self.skeleton, dict(self.tensors), (x,))
        return out


@final
class Int8Prepared:
    """Integer weights; activation ranges come from each device."""

    def __init__(
        self,
        model: FlatModel,
        params: Tensor,
        skeleton: nn.Module,
        layers: Mapping[str, Layer],
    ) -> None:
        self._model, self._params = model, params.detach().clone()
        self._skeleton, self._layers = skeleton, layers
        views = model.layout.views(self._params)
        stored = _stored_names(model.module)
        tensors: dict[str, Tensor] = {}
        num_bytes = 0
        for name in layers:
            prefix = f"{name}." if name else ""
            weight_name, bias_name = stored[f"{prefix}weight"], stored.get(f"{prefix}bias")
            codes, scale = quantize_weight(views[weight_name])
            bias = None if bias_name is None else views[bias_name]
            tensors[f"{prefix}codes"], tensors[f"{prefix}scale"] = codes, scale
            tensors[f"{prefix}bias"] = torch.zeros_like(scale) if bias is None else bias
            # codes, scales, 32-bit biases, and scale and zero point of the activations
            num_bytes += codes.numel() + 4 * len(scale) + (0 if bias is None else 4 * len(bias)) + 5
        # What a layer that stays float shares with a quantized one is kept for it.
        in_float = {stored[name] for name in stored if name not in _quantized_names(model.module)}
        kept = {n: view for n, view in views.items() if n in in_float or n not in stored.values()}
        tensors.update(kept)
        self._tensors = tensors
        self._model_bytes = num_bytes + sum(4 * view.numel() for view in kept.values())

    def calibrated(self, calibration: Tensor) -> Int8Predictor:
        """Observe the range of each layer's input (minimum and maximum) on own inputs."""
        ranges: dict[str, Tensor] = {}
        if len(calibration):
            hooks = [
                layer.register_forward_pre_hook(_observer(name, ranges))
                for name, layer in self._layers.items()
            ]
            self._model.module.eval()
            try:
                self._model(self._params, calibration)
            finally:
                for hook in hooks:
                    hook.remove()
        return Int8Predictor(self._skeleton, {**self._tensors, **ranges}, self._model_bytes)


def _observer(name: str, ranges: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    prefix = f"{name}." if name else ""

    def observe(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = torch.aminmax(inputs[0])
        if f"{prefix}low" in ranges:  # a layer that is used twice
            low = torch.minimum(low, ranges[f"{prefix}low"])
            high = torch.maximum(high, ranges[f"{prefix}high"])
        ranges[f"{prefix}low"], ranges[f"{prefix}high"] = low, high

    return observe


@final
class Int8Runtime:
    """Serve int8 weights and activations; see the module for the arithmetic."""

    def __init__(self) -> None:
        self._skeletons: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def prepare(self, model: FlatModel, params: Tensor) -> Int8Prepared:
        """Quantize the weights of parameters [P]."""
        layers = {
            name: module
            for name, module in model.module.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and _is_quantized(module)
        }
        skeleton = self._skeletons.get(model.module)
        if skeleton is None:
            skeleton = _skeleton(model.module)
            self._skeletons[model.module] = skeleton
        return Int8Prepared(model, params, skeleton, layers)


def _is_quantized(module: nn.Module) -> bool:
    # A subclass may do something else with its weight: it stays float.
    return type(module) in (nn.Linear, nn.Conv2d)


def _stored_names(module: nn.Module) -> dict[str, str]:
    """Return for each parameter its name in the layout: the first of those that share it."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _quantized_names(module: nn.Module) -> set[str]:
    """Return the names of all parameters that quantized layers replace."""
    return {
        f"{name}.{leaf}".lstrip(".")
        for name, layer in module.named_modules(remove_duplicate=False)
        for leaf in ("weight", "bias")
        if _is_quantized(layer)
    }


def _skeleton(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear | nn.Conv2d) and _is_quantized(module):
        return _QuantizedLayer(module).eval()
    skeleton = copy.deepcopy(module).eval()
    made: dict[int, _QuantizedLayer] = {}
    for name, layer in list(skeleton.named_modules(remove_duplicate=False)):
        if isinstance(layer, nn.Linear | nn.Conv2d) and _is_quantized(layer):
            owner, _, leaf = name.rpartition(".")
            quantized = made.setdefault(id(layer), _QuantizedLayer(layer))
            setattr(skeleton.get_submodule(owner), leaf, quantized)
    return skeleton
