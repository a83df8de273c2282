"""Sparse updates: a part of the numbers is sent, and what is not is remembered.

Of each tensor with n numbers k = ceil(share n) are sent, so that no tensor (a bias, batch-norm
statistics, what a client strategy shares) is drowned by a larger one.

With error feedback a device adds what it has not sent so far to its next update, e being zero at
first (Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes", 2019, arXiv:1901.09847, algorithm 2, with local - global in place of a step):

    p = update + e,   sent = C(p),   e <- p - sent,   ||p - C(p)||^2 <= (1 - k/n) ||p||^2

(for random-k in the mean over the draw; for values in 8 bits, beside their rounding). A device that
is seldom chosen sends what it held back late: it is stale by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from edgelearn.compress.blocks import Blocks, dequantize, quantize, step
from edgelearn.compress.codec import Codec, Piece
from edgelearn.compress.packing import bit_bytes, pack_bits, unpack_bits
from edgelearn.compress.quantized import BLOCK
from edgelearn.params import Layout
from edgelearn.seeds import permutation, split

_LEVELS = 127
_VALUES = ("float32", "int8")


def kept_of(layout: Layout, share: float) -> tuple[int, ...]:
    """Return how many numbers of each tensor are sent.

    Example:
        >>> kept_of(Layout(("w", "b"), ((10, 10), (3,)), 2), 0.1)
        (10, 1)
    """
    return tuple(min(size, math.ceil(share * size - 1e-9)) for size in layout.sizes)


def _check(share: float, values: str, feedback: bool) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"share is {share!r}; a number above 0 and at most 1 is expected")
    if values not in _VALUES:
        raise ValueError(f"values is {values!r}; allowed: {', '.join(_VALUES)}")
    if type(feedback) is not bool:
        raise ValueError(f"feedback is {feedback!r}; true or false is expected")


def _value_pieces(layout: Layout, share: float, values: str) -> dict[str, Piece]:
    counts = kept_of(layout, share)
    if values == "float32":
        return {"values": Piece((sum(counts),), torch.float32)}
    blocks = Blocks.of(counts, BLOCK)
    return {
        "codes": Piece((sum(counts),), torch.int8),
        "scales": Piece((len(blocks),), torch.float32),
    }


def _pack_values(
    layout: Layout, share: float, chosen: Tensor, values: str, generator: torch.Generator
) -> dict[str, Tensor]:
    if values == "float32":
        return {"values": chosen}
    blocks = Blocks.of(kept_of(layout, share), BLOCK)
    codes, scales = quantize(chosen, blocks, levels=_LEVELS, generator=generator)
    return {"codes": codes, "scales": scales}


def _unpack_values(layout: Layout, share: float, message: Mapping[str, Tensor]) -> Tensor:
    if "values" in message:
        return message["values"]
    blocks = Blocks.of(kept_of(layout, share), BLOCK)
    return dequantize(message["codes"], message["scales"], blocks, levels=_LEVELS)


def _coarsest(layout: Layout, update: Tensor) -> Tensor:
    """Return the largest rounding error [P] of any number that is sent in 8 bits."""
    tensors = Blocks.of(layout.sizes, max(layout.sizes))
    return step(tensors.scales(update), tensors, levels=_LEVELS)


@final
class TopK(Codec):
    """Sends the numbers of each tensor that are largest in magnitude, with error feedback.

    What is sent is exact (float32), or stochastically rounded in blocks of 256 (int8). Where they
    are is said by a bit for each number of the update, or by a 32-bit place for each that is sent,
    whichever is less. |error| <= |x|, or the rounding of what is sent.
    """

    def __init__(self, share: float = 0.1, values: str = "float32", feedback: bool = True) -> None:
        """Choose how much is sent.

        Args:
            share: Part of each tensor, in (0, 1].
            values: How numbers are sent, "float32" or "int8".
            feedback: Whether what was not sent is added to the next update.

        Raises:
            ValueError: If one is out of range.
        """
        _check(share, values, feedback)
        self._share, self._values, self._feedback = share, values, feedback

    @property
    def keeps_residual(self) -> bool:
        """With error feedback."""
        return self._feedback

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """Where the numbers are, and the numbers."""
        count = sum(kept_of(layout, self._share))
        where = Piece((count,), torch.int32)
        if bit_bytes(layout.size) < 4 * count:
            where = Piece((bit_bytes(layout.size),), torch.uint8)
        return {"places": where, **_value_pieces(layout, self._share, self._values)}

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Choose the largest of each tensor; of equals, the first."""
        magnitude, chosen = update.abs(), torch.zeros(layout.size, dtype=torch.bool)
        parts = zip(layout.places.values(), kept_of(layout, self._share), strict=True)
        for place, count in parts:
            order = torch.argsort(magnitude[place], descending=True, stable=True)
            chosen[place.start + order[:count]] = True
        places = chosen.nonzero().flatten()
        is_bits = self.pieces(layout)["places"].dtype == torch.uint8
        where = pack_bits(chosen) if is_bits else places.to(torch.int32)
        sent = _pack_values(layout, self._share, update[places], self._values, generator)
        return {"places": where, **sent}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Put the numbers where they belong; the others are zeros."""
        values, where = _unpack_values(layout, self._share, message), message["places"]
        if where.dtype == torch.uint8:
            places = unpack_bits(where, layout.size).nonzero().flatten()
        else:
            places = where.long()
        rises = bool((places[1:] > places[:-1]).all())
        if len(places) != len(values) or not rises or not _within(places, layout.size):
            raise ValueError(f"its places are not {len(values)} different ones of {layout.size}")
        update = torch.zeros(layout.size)
        update[places] = values
        return update

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """All of a number that is not sent."""
        bound = update.abs()
        return bound if self._values == "float32" else bound.maximum(_coarsest(layout, update))


@final
class RandomK(Codec):
    """Sends numbers of each tensor that are drawn at random, unbiased or with error feedback.

    Where they are need not be sent: both sides draw the same places from one 8-byte word. Without
    error feedback what is sent is multiplied by n / k, which makes the mean exact and the error up
    to (n / k - 1) |x|; with it, what is sent is not scaled, and |error| <= |x|. Values in int8 add
    their rounding.
    """

    def __init__(self, share: float = 0.1, values: str = "float32", feedback: bool = False) -> None:
        """Choose how much is sent.

        Args:
            share: Part of each tensor, in (0, 1].
            values: How numbers are sent, "float32" or "int8".
            feedback: Whether what was not sent is added to the next update.

        Raises:
            ValueError: If one is out of range.
        """
        _check(share, values, feedback)
        self._share, self._values, self._feedback = share, values, feedback

    @property
    def is_unbiased(self) -> bool:
        """Without error feedback."""
        return not self._feedback

    @property
    def keeps_residual(self) -> bool:
        """With error feedback."""
        return self._feedback

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """The word that places are drawn from, and the numbers."""
        word = Piece((1,), torch.int64)
        return {"word": word, **_value_pieces(layout, self._share, self._values)}

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw places, and send what is there."""
        word = torch.randint(2**62, (1,), generator=generator)
        chosen = update[self._places(layout, int(word))]
        chosen = chosen * self._scales(layout, kept_of(layout, self._share))
        return {"word": word, **_pack_values(layout, self._share, chosen, self._values, generator)}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Draw the same places, and put the numbers there."""
        word = int(message["word"])
        if not 0 <= word < 2**62:
            raise ValueError("its word is not from 0 to 2**62")
        update = torch.zeros(layout.size)
        update[self._places(layout, word)] = _unpack_values(layout, self._share, message)
        return update

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """All of a number that is not sent; what the scaling adds to one that is."""
        each = self._scales(layout, layout.sizes)
        bound = update.abs() * (each - 1).clamp(min=1) * (1 + 2.0**-16)
        if self._values == "float32":
            return bound
        return bound.maximum((each - 1) * update.abs() + _coarsest(layout, update) * each)

    def _places(self, layout: Layout, word: int) -> Tensor:
        """Return the places that a word chooses, ascending."""
        found = [
            place.start + np.sort(permutation(split(word, index), place.stop - place.start)[:count])
            for index, (place, count) in enumerate(
                zip(layout.places.values(), kept_of(layout, self._share), strict=True)
            )
        ]
        return torch.from_numpy(np.concatenate(found))

    def _scales(self, layout: Layout, counts: Sequence[int]) -> Tensor:
        """Return what so many numbers of each tensor are multiplied by if they are sent."""
        factor = np.ones(len(counts))
        if not self._feedback:
            factor = np.array(layout.sizes) / np.maximum(kept_of(layout, self._share), 1)
        return torch.from_numpy(np.repeat(factor, counts)).to(torch.float32)


def _within(places: Tensor, size: int) -> bool:
    return not len(places) or (int(places[0]) >= 0 and int(places[-1]) < size)
