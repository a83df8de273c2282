"""Stochastic quantization in blocks: whole-number codes, and one scale for each block.

In a block with the largest magnitude m, a number x becomes the code

    c = sign(x) floor(L |x| / m + u),   u uniform in [0, 1)

and is read back as m c / L. Then E[m c / L] = x, and the error is below m / L. Blocks don't
reach across tensors, whose sizes can differ by orders of magnitude.

Reference: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding", 2017, arXiv:1610.02132, equations 3-4. There m is the Euclidean norm of
the bucket; we take the largest magnitude, as the authors do in their experiments (section 5), and
fixed-size codes in place of Elias's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where blocks lie in a vector [n].

    Attributes:
        starts: First place of each block [B].
        lengths: Numbers in each block [B].
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, sizes: Iterable[int], block: int) -> Blocks:
        """Cut each of the tensors that lie one behind the other into blocks of a length."""
        lengths: list[int] = []
        for size in sizes:
            full, rest = divmod(size, block)
            lengths += [block] * full + [rest] * bool(rest)
        counts = np.array(lengths, np.int64)
        return cls(np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.starts)

    def scales(self, values: Tensor) -> Tensor:
        """Return the largest magnitude in each block [B], float32."""
        if not len(self):
            return torch.zeros(0)
        return torch.from_numpy(np.maximum.reduceat(values.abs().numpy(), self.starts))

    def spread(self, scales: Tensor) -> Tensor:
        """Return each number's scale [n], float64."""
        return torch.from_numpy(np.repeat(scales.numpy().astype(np.float64), self.lengths))


def quantize(
    values: Tensor, blocks: Blocks, *, levels: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Quantize numbers [n].

    Returns:
        Codes [n], int8, from -levels to levels, and scales [B], float32.
    """
    scales = blocks.scales(values)
    each = blocks.spread(scales)
    # Doubles: the mean is x and the ends are exact, whatever the scale.
    ratio = values.abs().double() * levels / torch.where(each > 0, each, torch.ones_like(each))
    noise = torch.rand(len(values), generator=generator, dtype=torch.float64)
    codes = torch.floor(ratio + noise).clamp(max=levels) * values.sign()
    return codes.to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, blocks: Blocks, *, levels: int) -> Tensor:
    """Return the numbers [n], float32, that codes and scales stand for."""
    if bool((codes.to(torch.int16).abs() > levels).any()):
        raise ValueError(f"a code is beyond {levels}")
    return (blocks.spread(scales) * codes / levels).to(torch.float32)


def step(scales: Tensor, blocks: Blocks, *, levels: int) -> Tensor:
    """Return each number's largest error [n], float32; rounding to float32 is within it."""
    return (blocks.spread(scales) / levels * (1 + 2.0**-16)).to(torch.float32)
