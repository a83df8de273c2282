"""Integer quantization: codes, scales and zero points.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activation_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return step and zero point of unsigned 8-bit codes for a range; 0 is always exact.

    A range of zeros only (inputs behind dead units) has the step 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = _positive((high - low) / 255)
    return step, torch.round(-low / step).clamp(0, 255)


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
