"""Integer quantization: codes, scales and zero points.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# By bits of a weight: its largest code. 7 bits are what kernels without VNNI multiply exactly, two
# unsigned 8-bit codes times two of these staying below 2^15, and that allows 64.
LARGEST_CODE: Mapping[int, int] = {8: 127, 7: 64, 6: 31, 5: 15, 4: 7, 3: 3, 2: 1}
_STORED_BITS = {7: 8}  # of a code; others take as many as they have
_ALIVE = 2.0**-12  # of the largest scale in a layer


def activation_scale(
    low: Tensor, high: Tensor, *, least_step: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return step and zero point of unsigned 8-bit codes for a range; 0 is always exact.

    A range of zeros only (inputs behind dead units) has the step 1.

    Args:
        low: Lowest value.
        high: Highest value.
        least_step: Floor under the step, see `least_step`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    step = _positive(torch.maximum(step, torch.as_tensor(least_step, dtype=step.dtype)))
    return step, torch.round(-low / step).clamp(0, 255)


def most_bias(fan_in: int) -> int:
    """Return the largest code of a bias with which no 32-bit sum of a layer overflows."""
    return 2**31 - 1 - 255 * 127 * fan_in


def least_step(bias: Tensor, scale: Tensor, fan_in: int) -> Tensor:
    """Return the smallest step of a layer's inputs at which its biases fit their 32 bits.

    A bias has the code b / (s_x s_w), so an almost empty range (s_x near 0) would leave no room for
    it: s_x >= max |b| / (s_w m), m the largest code. Inputs that such a step rounds away are less
    than the bias's own rounding in float32. A channel whose weights are 2^12 times smaller than the
    layer's largest doesn't count, or it would coarsen the inputs of all others: its bias is clipped
    where it doesn't fit.

    Args:
        bias: [out].
        scale: Of the weights [out], s_w.
        fan_in: Products that are summed for an output.

    Returns:
        [], float32.
    """
    floors = bias.abs().double() / (scale.double() * max(most_bias(fan_in), 2**24))
    alive = scale >= _ALIVE * scale.max()
    return torch.where(alive, floors, torch.zeros_like(floors)).max().float()


def _positive(scale: Tensor) -> Tensor:
    """Return scales with 1 in place of what is too small to divide by."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def quantize_weight(weight: Tensor, *, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Quantize a weight [out, ...] symmetrically per output channel.

    Args:
        weight: [out, ...].
        largest: Largest code, at most 127.

    Returns:
        Codes [out, ...], int8, and scales [out], float32; |w - codes * scale| <= scale / 2.
    """
    scale = _positive(weight.reshape(len(weight), -1).abs().amax(1) / largest)
    ratio = weight / scale.view(-1, *[1] * (weight.dim() - 1))
    return torch.round(ratio).clamp(-largest, largest).to(torch.int8), scale


def stored_bytes(count: int, weight_bits: int) -> int:
    """Return the bytes of so many weights' codes, packed without gaps; 7 bits fill a byte."""
    return -(-count * _STORED_BITS.get(weight_bits, weight_bits) // 8)


def fake_quantize_weight(weight: Tensor, *, bits: int = 8) -> Tensor:
    """Return a weight [out, ...] as its codes stand for it, with the gradient of the weight.

    The straight-through estimator: rounding counts as the identity. As a channel's largest weight
    has the largest code, none is clipped.

    Args:
        weight: [out, ...].
        bits: Of a code, 2 to 8; the largest is 2^(bits - 1) - 1.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; allowed: 2 to 8")
    codes, scale = quantize_weight(weight.detach(), largest=2 ** (bits - 1) - 1)
    rounded = codes.to(weight.dtype) * scale.view(-1, *[1] * (weight.dim() - 1))
    return rounded + (weight - weight.detach())  # the bracket is 0, and exactly so


def fake_quantize_activation(x: Tensor) -> Tensor:
    """Return activations as unsigned 8-bit codes over their own range stand for them.

    One range for all of `x`, 0 included; the gradient is that of `x`, straight through.
    """
    own = x.detach()
    step, zero = activation_scale(own.amin(), own.amax())
    rounded = (torch.round(own / step).add(zero).clamp(0, 255) - zero) * step
    return rounded + (x - own)
