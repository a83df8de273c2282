"""How the numbers that a sparse update consists of are sent: exactly, or as codes of 8 or 4 bits.

Codes are those of `blocks`: stochastically rounded, so that their mean is exact, and with a scale
for each block. Blocks do not reach across tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgelearn.compress.blocks import Blocks, dequantize, quantize, step
from edgelearn.compress.codec import Piece
from edgelearn.compress.packing import nibble_bytes, pack_nibbles, unpack_nibbles
from edgelearn.compress.quantized import BLOCK, check_block
from edgelearn.errors import nearest
from edgelearn.params import Layout

_EXACT = "float32"
_LEVELS = {"int8": 127, "int4": 7}  # the largest code


@dataclass(frozen=True, slots=True)
class Values:
    """A way of sending numbers.

    Attributes:
        kind: "float32", "int8" or "int4" (two in a byte).
        block: Numbers that share a scale, from 1; not of float32.

    Raises:
        ValueError: If one is out of range.
    """

    kind: str = _EXACT
    block: int = BLOCK

    def __post_init__(self) -> None:
        allowed = (_EXACT, *_LEVELS)
        if self.kind not in allowed:
            hint = nearest(self.kind, allowed)
            raise ValueError(f"values is {self.kind!r}{hint}; allowed: {', '.join(allowed)}")
        check_block(self.block)
        if self.kind == _EXACT and self.block != BLOCK:
            raise ValueError(f"block is {self.block}, and values of float32 have no scales")

    def pieces(self, counts: Sequence[int]) -> dict[str, Piece]:
        """Return what so many numbers of each tensor are sent as."""
        count = sum(counts)
        if self.kind == _EXACT:
            return {"values": Piece((count,), torch.float32)}
        codes = Piece((count,), torch.int8)
        if self.kind == "int4":
            codes = Piece((nibble_bytes(count),), torch.uint8)
        return {"codes": codes, "scales": Piece((len(self._blocks(counts)),), torch.float32)}

    def pack(
        self, counts: Sequence[int], numbers: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the numbers [sum of counts] as such pieces."""
        if self.kind == _EXACT:
            return {"values": numbers}
        levels = _LEVELS[self.kind]
        codes, scales = quantize(numbers, self._blocks(counts), levels=levels, generator=generator)
        return {"codes": pack_nibbles(codes) if self.kind == "int4" else codes, "scales": scales}

    def unpack(self, counts: Sequence[int], message: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers that `pack` was given, to their rounding.

        Raises:
            ValueError: If a code is none that `pack` makes.
        """
        if self.kind == _EXACT:
            return message["values"]
        codes = message["codes"]
        if self.kind == "int4":
            codes = unpack_nibbles(codes, sum(counts))
        levels = _LEVELS[self.kind]
        return dequantize(codes, message["scales"], self._blocks(counts), levels=levels)

    def rounding(self, layout: Layout, update: Tensor) -> Tensor:
        """Return the largest error [P] that each number can have if it is sent.

        Which numbers share a scale depends on which are sent; no scale is above the largest of its
        tensor.
        """
        if self.kind == _EXACT:
            return torch.zeros(layout.size)
        tensors = Blocks.of(layout.sizes, max(layout.sizes))
        return step(tensors.scales(update), tensors, levels=_LEVELS[self.kind])

    def _blocks(self, counts: Sequence[int]) -> Blocks:
        return Blocks.of(counts, self.block)
