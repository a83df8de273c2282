"""Small numbers in few bytes: two 4-bit codes in one, and eight yes-or-no answers in one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes [n] from -8 to 7 into bytes [ceil(n / 2)], the first in the low half.

    Example:
        >>> unpack_nibbles(pack_nibbles(torch.tensor([-7, 0, 7])), 3).tolist()
        [-7, 0, 7]
    """
    shifted = torch.zeros(2 * nibble_bytes(len(codes)), dtype=torch.uint8)
    shifted[: len(codes)] = (codes.to(torch.int16) + 8).to(torch.uint8)
    return shifted[0::2] | (shifted[1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Return the first codes [count], int8, of what `pack_nibbles` returned."""
    both = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    return both[:count].to(torch.int8) - 8


def nibble_bytes(count: int) -> int:
    """Return the bytes of so many 4-bit codes."""
    return -(-count // 2)


def pack_bits(is_set: Tensor) -> Tensor:
    """Pack booleans [n] into bytes [ceil(n / 8)], the first in the highest bit."""
    return torch.from_numpy(np.packbits(is_set.numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first booleans [count] of what `pack_bits` returned."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))


def bit_bytes(count: int) -> int:
    """Return the bytes of so many booleans."""
    return -(-count // 8)
