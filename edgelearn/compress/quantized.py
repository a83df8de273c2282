"""Updates as whole numbers of 8 or 4 bits, rounded at random so that their mean is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from edgelearn.compress.blocks import Blocks, dequantize, quantize, step
from edgelearn.compress.codec import Codec, Piece
from edgelearn.compress.packing import nibble_bytes, pack_nibbles, unpack_nibbles
from edgelearn.params import Layout

BLOCK = 256
_INT8, _INT4 = 127, 7  # largest codes


def check_block(block: int) -> None:
    """Refuse a length of blocks that is none.

    Raises:
        ValueError: If it is not a whole number above 0.
    """
    if type(block) is not int or block < 1:
        raise ValueError(f"block is {block!r}; a whole number from 1 is expected")


@final
class Int8(Codec):
    """8-bit codes, stochastically rounded, with a float32 scale for each block; see `blocks`.

    Unbiased; |error| <= m / 127 where m is the largest magnitude in the block. One byte a number
    and 4 a block.
    """

    def __init__(self, block: int = BLOCK) -> None:
        """Choose the length of blocks.

        Args:
            block: Numbers that share a scale, from 1.

        Raises:
            ValueError: If it is out of range.
        """
        check_block(block)
        self._block = block

    @property
    def is_unbiased(self) -> bool:
        """It is."""
        return True

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """Codes, one byte each, and scales."""
        blocks = Blocks.of(layout.sizes, self._block)
        return {
            "codes": Piece((layout.size,), torch.int8),
            "scales": Piece((len(blocks),), torch.float32),
        }

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Round at random to a code."""
        blocks = Blocks.of(layout.sizes, self._block)
        codes, scales = quantize(update, blocks, levels=_INT8, generator=generator)
        return {"codes": codes, "scales": scales}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Return codes times scales."""
        blocks = Blocks.of(layout.sizes, self._block)
        return dequantize(message["codes"], message["scales"], blocks, levels=_INT8)

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """One step of the block's codes."""
        blocks = Blocks.of(layout.sizes, self._block)
        return step(blocks.scales(update), blocks, levels=_INT8)


@final
class Int4(Codec):
    """4-bit codes, two in a byte, stochastically rounded, with a scale for each block.

    Unbiased; |error| <= m / 7 where m is the largest magnitude in the block. Half a byte a number
    and 4 bytes a block.
    """

    def __init__(self, block: int = BLOCK) -> None:
        """Choose the length of blocks.

        Args:
            block: Numbers that share a scale, from 1.

        Raises:
            ValueError: If it is out of range.
        """
        check_block(block)
        self._block = block

    @property
    def is_unbiased(self) -> bool:
        """It is."""
        return True

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """Codes, two in a byte, and scales."""
        blocks = Blocks.of(layout.sizes, self._block)
        return {
            "codes": Piece((nibble_bytes(layout.size),), torch.uint8),
            "scales": Piece((len(blocks),), torch.float32),
        }

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Round at random to a code."""
        blocks = Blocks.of(layout.sizes, self._block)
        codes, scales = quantize(update, blocks, levels=_INT4, generator=generator)
        return {"codes": pack_nibbles(codes), "scales": scales}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Return codes times scales."""
        blocks = Blocks.of(layout.sizes, self._block)
        codes = unpack_nibbles(message["codes"], layout.size)
        return dequantize(codes, message["scales"], blocks, levels=_INT4)

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """One step of the block's codes."""
        blocks = Blocks.of(layout.sizes, self._block)
        return step(blocks.scales(update), blocks, levels=_INT4)
