r"""int8 reference runtime: integer arithmetic, exactly as an integer kernel would do it.

Linear and convolution layers are quantized; what is between them stays float.

- weights: symmetric per output channel, w_q = clip(round(w / s_w), -c, c), s_w = max|w| / c, with
  the largest code c = 2^(b - 1) - 1 for b bits, 127 for 8 (and 64 for 7, as `onnxruntime` has it);
- activations: affine per tensor, x_q = clip(round(x / s_x) + z, 0, 255), range from calibration;
  without it an input's own range, and s_x large enough for the bias, at least max|b| / (s_w 2^31);
- bias: 32 bits at scale s_x s_w;
- result: y = s_x s_w (sum (x_q - z) w_q + b_q), the sum exact.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2. Torch has no fast
integer kernels on all processors, so the integers travel in floating-point registers: float32
holds every partial sum of 518 products, so longer sums are added up slice by slice. The numbers
are those of an integer kernel, the speed is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from edgelearn.compress.quantize import (
    LARGEST_CODE,
    activation_scale,
    least_step,
    quantize_weight,
)
from edgelearn.params import SHARED, FlatModel
from edgelearn.runtime.protocol import Observed, RangedGroupPrepared, Rows

Layer = nn.Linear | nn.Conv2d
_STORED_BITS = {7: 8}  # of a code; others take as many as they have
# Products |x_q - z| |w_q| <= 255 * 127 whose sums float32 holds exactly, in any order.
_NUM_PRODUCTS = 2**24 // (255 * 127)


class _QuantizedLayer(nn.Module):
    """A layer that reads its integers from buffers, which the predictor binds.

    A range is one for all rows ([]) or one for each device of a group ([D]), where `owner` [n] says
    whose each row is. A range with high < low is unknown: such rows have their own.
    """

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
        self.terms = _terms(layer)
        self.register_buffer("codes", torch.zeros(layer.weight.shape, dtype=_accumulator(layer)))
        self.register_buffer("scale", torch.ones(len(layer.weight)))
        self.register_buffer("bias", torch.zeros(len(layer.weight)))
        self.register_buffer("least_step", torch.zeros(()))
        for leaf, value in _unknown_range().items():
            self.register_buffer(leaf, value)

    codes: Tensor
    scale: Tensor
    bias: Tensor
    least_step: Tensor
    low: Tensor
    high: Tensor
    owner: Tensor

    def forward(self, x: Tensor) -> Tensor:
        channel = (1, -1, 1, 1) if self.is_conv else (-1,)
        low, high, least, index = self._ranges(x)
        found = activation_scale(low, high, least_step=least)
        step, zero = (t.view(-1, *[1] * (x.dim() - 1)) for t in found)
        unit = step.double() * self.scale.double().view(channel)
        bias = torch.round(self.bias.double().view(channel) / unit).clamp(-(2**31), 2**31 - 1)
        if index is not None:
            step, zero, unit, bias = (t.index_select(0, index) for t in (step, zero, unit, bias))
        centred = torch.div(x, step).round_().add_(zero).clamp_(0, 255).sub_(zero)
        total = self._sum(centred.to(self.codes.dtype))
        return total.add_(bias).mul_(unit).to(torch.float32)

    def _ranges(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
        """Return R ranges, floors under their steps, and which of them each row has [n].

        None: the only one, or as many as there are rows.
        """
        low, high, owner = self.low, self.high, self.owner
        unknown = high < low
        if low.dim() == 0:
            if not unknown:
                return low, high, 0.0, None
            rows = x.reshape(len(x), -1)
            return rows.amin(1), rows.amax(1), self.least_step, None
        if len(owner) != len(x):
            raise ValueError(
                f"a layer got {len(x)} rows for {len(owner)} inputs: the network can't be "
                "asked for several devices at once"
            )
        if not unknown.any():
            return low, high, 0.0, owner
        places = unknown[owner].nonzero().flatten()
        rows = x[places].flatten(1)
        index = owner.clone()
        index[places] = len(low) + torch.arange(len(places))
        least = torch.cat([torch.zeros_like(low), self.least_step.expand(len(places))])
        low, high = torch.cat([low, rows.amin(1)]), torch.cat([high, rows.amax(1)])
        return low, high, least, index

    def _sum(self, x: Tensor) -> Tensor:
        """Return sum x_q w_q, float64: exact within each slice of terms, and exact between them."""
        if not self.is_conv:
            parts = (F.linear(x[..., t], self.codes[:, t]) for t in self.terms)
            return _added(parts)
        if self.border is not None:
            x = F.pad(x, self.border[0], mode=self.border[1])
        return _added(
            F.conv2d(
                _channels(x, t, self.groups),
                self.codes[:, t],
                None,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )
            for t in self.terms
        )


def _unknown_range() -> dict[str, Tensor]:
    """Return the buffers of a layer that is not calibrated."""
    nobody = torch.empty(0, dtype=torch.int64)
    return {"low": torch.zeros(()), "high": torch.full((), -1.0), "owner": nobody}


def _added(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts).to(torch.float64)
    for part in parts:
        total.add_(part)
    return total


def _channels(x: Tensor, which: slice, groups: int) -> Tensor:
    """Return some input channels of each group of a convolution."""
    if groups == 1:
        return x[..., which, :, :]
    apart = x.reshape(*x.shape[:-3], groups, -1, *x.shape[-2:])
    return apart[..., which, :, :].flatten(-4, -3)


def _accumulator(layer: Layer) -> torch.dtype:
    """Return the type that holds the sums; float64 only where a channel is too much for float32."""
    return torch.float64 if layer.weight[0, 0].numel() > _NUM_PRODUCTS else torch.float32


def _terms(layer: Layer) -> list[slice]:
    """Cut a layer's input features or channels into slices whose sums are exact."""
    count, area = layer.weight.shape[1], layer.weight[0, 0].numel()
    if area > _NUM_PRODUCTS:
        return [slice(None)]
    num_slices = -(-count // (_NUM_PRODUCTS // area))
    if num_slices == 1:
        return [slice(None)]
    width = -(-count // num_slices)
    return [slice(start, start + width) for start in range(0, count, width)]


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
@dataclass(frozen=True, slots=True)
class Int8GroupPredictor:
    """The quantized models of several devices: the same integers, each with its own ranges."""

    skeleton: nn.Module
    tensors: Mapping[str, Tensor]
    owners: tuple[str, ...]
    model_bytes: int

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C]; bit for bit those of each device's own predictor."""
        owner = {name: rows.device.view(-1) for name in self.owners}  # one each, see Int8Prepared
        tensors = {**self.tensors, **owner}
        out: Tensor = functional_call(self.skeleton, tensors, (rows.x,))
        return out


@final
class Int8Prepared(RangedGroupPrepared):
    """Integer weights; activation ranges come from each device."""

    def __init__(
        self,
        model: FlatModel,
        params: Tensor,
        skeleton: nn.Module,
        layers: Mapping[str, Layer],
        *,
        weight_bits: int,
    ) -> None:
        self._model, self._params = model, params.detach().clone()
        self._skeleton, self._layers = skeleton, layers
        found = model.layout.views(self._params)
        views = {name: view for name, view in found.items() if not name.startswith(SHARED)}
        stored = _stored_names(model.module)
        tensors: dict[str, Tensor] = {}
        num_bytes = 0
        for name, layer in layers.items():
            prefix = _prefix(name)
            weight_name, bias_name = stored[f"{prefix}weight"], stored.get(f"{prefix}bias")
            codes, scale = quantize_weight(views[weight_name], largest=LARGEST_CODE[weight_bits])
            bias = None if bias_name is None else views[bias_name]
            tensors[f"{prefix}codes"] = codes.to(_accumulator(layer))  # converted once
            tensors[f"{prefix}scale"] = scale
            tensors[f"{prefix}bias"] = torch.zeros_like(scale) if bias is None else bias
            fan_in = layer.weight[0].numel()
            tensors[f"{prefix}least_step"] = least_step(tensors[f"{prefix}bias"], scale, fan_in)
            # Torch leaves what it binds to a layer with two names there, and takes what is the same
            # tensor for tied: so everything is always bound, and each layer has tensors of its own.
            for leaf, value in _unknown_range().items():
                tensors[f"{prefix}{leaf}"] = value
            # codes, scales, 32-bit biases, and scale and zero point of the activations
            packed = -(-codes.numel() * _STORED_BITS.get(weight_bits, weight_bits) // 8)
            num_bytes += packed + 4 * len(scale) + (0 if bias is None else 4 * len(bias)) + 5
        # What a layer that stays float shares with a quantized one is kept for it.
        in_float = {stored[name] for name in stored if name not in _quantized_names(model.module)}
        kept = {n: view for n, view in views.items() if n in in_float or n not in stored.values()}
        tensors.update(kept)
        self._tensors = tensors
        self._model_bytes = num_bytes + sum(4 * view.numel() for view in kept.values())

    def calibrated(self, calibration: Tensor) -> Int8Predictor:
        """Observe the range of each layer's input (minimum and maximum) on own inputs."""
        if not len(calibration):
            return Int8Predictor(self._skeleton, self._tensors, self._model_bytes)
        return self.within(self.observed(calibration))

    def observed(self, x: Tensor) -> Observed:
        """Return the range of each layer's input (minimum and maximum) on inputs [n, ...]."""
        ranges: dict[str, tuple[Tensor, Tensor]] = {}

        def observe(prefix: str, x: Tensor) -> None:
            low, high = torch.aminmax(x)
            if prefix in ranges:  # a layer that is used twice
                low = torch.minimum(low, ranges[prefix][0])
                high = torch.maximum(high, ranges[prefix][1])
            ranges[prefix] = low, high

        with self._observed(observe):
            self._model(self._params, x)
        return Observed(tuple(x.shape[1:]), ranges)

    def within(self, observed: Observed) -> Int8Predictor:
        """Return the predictor with these ranges."""
        tensors = dict(self._tensors)
        for prefix, (low, high) in observed.ranges.items():
            tensors[f"{prefix}low"], tensors[f"{prefix}high"] = low, high
        return Int8Predictor(self._skeleton, tensors, self._model_bytes)

    def calibrated_group(
        self, calibration: Iterable[Rows], *, num_devices: int
    ) -> Int8GroupPredictor:
        """Observe the ranges of several devices in one pass; without rows a range is unknown."""
        return self.within_group(self.observed_group(calibration, num_devices=num_devices))

    def observed_group(self, calibration: Iterable[Rows], *, num_devices: int) -> Observed:
        """Return the range of each layer's input, for each device [D]."""
        prefixes = [_prefix(name) for name in self._layers]
        low = {p: torch.full((num_devices,), float("inf")) for p in prefixes}
        high = {p: torch.full((num_devices,), float("-inf")) for p in prefixes}
        device, shape = torch.empty(0, dtype=torch.int64), torch.Size()

        def observe(prefix: str, x: Tensor) -> None:
            rows = x.flatten(1)  # amin and amax apart are faster than aminmax over a dimension
            low[prefix].scatter_reduce_(0, device, rows.amin(1), "amin")
            high[prefix].scatter_reduce_(0, device, rows.amax(1), "amax")

        with self._observed(observe):
            for rows in calibration:
                device, shape = rows.device, rows.x.shape[1:]
                self._model(self._params, rows.x)
        return Observed(tuple(shape), {p: (low[p], high[p]) for p in prefixes})

    def within_group(self, observed: Observed) -> Int8GroupPredictor:
        """Return the predictor of a group with these ranges."""
        tensors = dict(self._tensors)
        for prefix, (low, high) in observed.ranges.items():
            tensors[f"{prefix}low"], tensors[f"{prefix}high"] = low, high
        owners = tuple(f"{prefix}owner" for prefix in observed.ranges)
        return Int8GroupPredictor(self._skeleton, tensors, owners, self._model_bytes)

    @contextmanager
    def _observed(self, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Show the input of each quantized layer to `observe(prefix, x)`."""

        def hook_of(prefix: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _layer, inputs: observe(prefix, inputs[0])

        hooks = [
            layer.register_forward_pre_hook(hook_of(_prefix(name)))
            for name, layer in self._layers.items()
        ]
        self._model.module.eval()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _prefix(name: str) -> str:
    """Return what stands before the names of a module's own tensors."""
    return f"{name}." if name else ""


@final
class Int8Runtime:
    """Serve int8 weights and activations; see the module for the arithmetic.

    Args:
        weight_bits: Of a weight's code, 2 to 8. Fewer make a model smaller (codes count as packed
            without gaps; 7 bits fill a byte) and coarser. 7 are the integers that `onnxruntime` has
            to take on an x86 processor without VNNI. Activations have 8 bits in any case.

    Raises:
        ValueError: If `weight_bits` is anything else.
    """

    def __init__(self, *, weight_bits: int = 8) -> None:
        if type(weight_bits) is not int or weight_bits not in LARGEST_CODE:
            raise ValueError(f"weight_bits is {weight_bits!r}; allowed: 2 to 8")
        self.weight_bits = weight_bits
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
        return Int8Prepared(model, params, skeleton, layers, weight_bits=self.weight_bits)


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
