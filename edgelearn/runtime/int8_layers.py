"""The quantized parts of a network: layers whose sums are integers, and values that become codes.

Both read their numbers from buffers, which a predictor binds, and both know ranges in two forms:
one range for all rows ([]), or one for each device of a group ([D]) with `owner` [n] saying whose
each row is. A range with high < low is unknown: such rows have their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.compress.quantize import activation_scale

Layer = nn.Linear | nn.Conv2d
# Products |x_q - z| |w_q| <= 255 * 127 whose sums float32 holds exactly, in any order.
_NUM_PRODUCTS = 2**24 // (255 * 127)


class _Coding(nn.Module):
    """Activations as unsigned 8-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least_step", torch.zeros(()))
        for leaf, value in unknown_range().items():
            self.register_buffer(leaf, value)

    least_step: Tensor
    low: Tensor
    high: Tensor
    owner: Tensor

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return R steps and zero points [R, 1, ...], and which of them each row has [n].

        None: the only one, or as many as there are rows.
        """
        low, high, least, index = self._ranges(x)
        step, zero = activation_scale(low, high, least_step=least)
        of_rows = (-1, *[1] * (x.dim() - 1))
        return step.view(of_rows), zero.view(of_rows), index

    def _ranges(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
        """Return R ranges, floors under their steps, and which of them each row has [n]."""
        low, high, owner = self.low, self.high, self.owner
        unknown = high < low
        if low.dim() == 0:
            if not unknown:
                return low, high, 0.0, None
            rows = x.flatten(1)  # also of no rows
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


def _centred(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Return x_q - z as floats."""
    return torch.div(x, step).round_().add_(zero).clamp_(0, 255).sub_(zero)


@final
class Rounded(_Coding):
    """A value that is kept as codes: what enters a sum or an average, or leaves the network."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the codes of a value [n, ...] stand for."""
        step, zero, index = self._steps(x)
        if index is not None:
            step, zero = (t.index_select(0, index) for t in (step, zero))
        return _centred(x, step, zero).mul_(step)


@final
class QuantizedLayer(_Coding):
    """A linear or convolution layer: its inputs become codes, its sums are integers.

    Args:
        layer: Whose shape and stride it has; its numbers are not taken.
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
        self.register_buffer("codes", torch.zeros(layer.weight.shape, dtype=accumulator(layer)))
        self.register_buffer("scale", torch.ones(len(layer.weight)))
        self.register_buffer("bias", torch.zeros(len(layer.weight)))

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return s_x s_w (sum (x_q - z) w_q + b_q) of inputs [n, ...]."""
        channel = (1, -1, 1, 1) if self.is_conv else (-1,)
        step, zero, index = self._steps(x)
        unit = step.double() * self.scale.double().view(channel)
        bias = torch.round(self.bias.double().view(channel) / unit).clamp(-(2**31), 2**31 - 1)
        if index is not None:
            step, zero, unit, bias = (t.index_select(0, index) for t in (step, zero, unit, bias))
        total = self._sum(_centred(x, step, zero).to(self.codes.dtype))
        return total.add_(bias).mul_(unit).to(torch.float32)

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


def unknown_range() -> dict[str, Tensor]:
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


def accumulator(layer: Layer) -> torch.dtype:
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
