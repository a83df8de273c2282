"""Weights that are 8-bit codes on a fixed grid: put on it once, and moved along it.

A weight of output channel k is s_k c with a code c from -127 to 127, as the int8 runtime has it.
Here the scale s_k stays, whatever becomes of the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
ROUNDINGS = ("stochastic", "nearest")


def grid(weight: Tensor, *, headroom: float = 1.0) -> Tensor:
    """Return the scale of each output channel: headroom * max|w| / 127.

    With a headroom of 1 that is the scale of the int8 runtime. A channel of zeros could not leave
    them on a grid of its own: it gets the range of its layer's largest channel, and in a layer of
    zeros 1 / sqrt(inputs), that of torch's initial values.

    Args:
        weight: [out, ...].
        headroom: What the largest weight can grow by before its code is clipped, at least 1.

    Returns:
        Scales [out], float32, above 0.
    """
    rows = weight.detach().reshape(len(weight), -1)
    largest = rows.abs().amax(1)
    tiny = LARGEST * torch.finfo(torch.float32).tiny
    most = largest.amax()
    spare = torch.where(most >= tiny, most, torch.full_like(most, rows.shape[1] ** -0.5))
    return headroom * torch.where(largest >= tiny, largest, spare) / LARGEST


def nearest_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest codes of a weight [out, ...] on a grid [out], int8."""
    return _clipped(torch.round(weight / _beside(scale, weight)))


def moved_codes(codes: Tensor, move: Tensor, *, rounding: str) -> Tensor:
    """Return codes moved by whole numbers, int8, clipped to -127 and 127.

    Args:
        codes: int8, any shape.
        move: By how much, in steps of the grid; of the same shape.
        rounding: Of the move. "stochastic" draws from torch's generator and rounds up with the
            probability of the fraction: the mean is exact where nothing is clipped, and what is
            not to move does not. "nearest" draws nothing, and loses moves below half a step.
    """
    if rounding == "nearest":
        whole = torch.round(move)
    else:  # doubles, as moves are far below a step
        whole = torch.floor(move.double() + torch.rand(move.shape, dtype=torch.float64))
    return _clipped(codes + whole)


def weights(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the weights that codes [out, ...] on a grid [out] stand for, float32."""
    return codes * _beside(scale, codes)


def _beside(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))


def _clipped(codes: Tensor) -> Tensor:
    return codes.clamp(-LARGEST, LARGEST).to(torch.int8)
