"""Sparse updates: a part of the numbers is sent, and what is not is remembered.

Of each tensor with n numbers k = ceil(share n) are sent, so that no tensor (a bias, batch-norm
statistics, what a client strategy shares) is drowned by a larger one.

With error feedback a device adds what it has not sent so far to its next update, e being zero at
first (Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes", 2019, arXiv:1901.09847, algorithm 2, with local - global in place of a step):

    p = update + e,   sent = C(p),   e <- p - sent,   ||p - C(p)||^2 <= (1 - k/n) ||p||^2

(for random-k in the mean over the draw; for values in 8 or 4 bits, beside their rounding). A device
that is seldom chosen sends what it held back late: it is stale by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from edgelearn.compress.codec import Codec, Piece
from edgelearn.compress.packing import bit_bytes, pack_bits, unpack_bits
from edgelearn.compress.quantized import BLOCK
from edgelearn.compress.values import Values
from edgelearn.params import Layout
from edgelearn.seeds import split, subset


def kept_of(layout: Layout, share: float) -> tuple[int, ...]:
    """Return how many numbers of each tensor are sent.

    All of statistics that training carries along, such as those of batch norm: they are no sum of
    steps, and a network whose variances are stale or drawn at random answers at random.

    Example:
        >>> kept_of(Layout(("w", "b"), ((10, 10), (3,)), 2), 0.1)
        (10, 1)
        >>> kept_of(Layout(("w", "b"), ((10, 10), (3,)), 2), 1e-12)
        (1, 1)
        >>> kept_of(Layout(("w", "running_var"), ((10, 10), (10,)), 1), 0.1)
        (10, 10)
    """
    counts = [min(size, max(math.ceil(share * size - 1e-9), 1)) for size in layout.sizes]
    for index in range(layout.num_trained_tensors, len(counts) - layout.num_shared_tensors):
        if len(layout.shapes[index]) <= 1:  # a frozen weight has more
            counts[index] = layout.sizes[index]
    return tuple(counts)


def _check(share: float, feedback: bool) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"share is {share!r}; a number above 0 and at most 1 is expected")
    if type(feedback) is not bool:
        raise ValueError(f"feedback is {feedback!r}; true or false is expected")


@final
class TopK(Codec):
    """Sends the numbers of each tensor that are largest in magnitude, with error feedback.

    What is sent is exact (float32), or stochastically rounded in blocks (int8, int4). Where they
    are is said by a bit for each number of the update, or by a 32-bit place for each that is sent,
    whichever is less. |error| <= |x|, or the rounding of what is sent.

    Without error feedback what is left out is lost, and each round the server goes a shorter way
    than the devices. With `rescale` what is sent of a tensor x is multiplied by
    f = ||x|| / ||C(x)||, 1 <= f <= sqrt(n / k), so that its norm is that of x. No residual is kept.
    The error of a number that is sent is (f - 1) |x| and f times its rounding. The factor is ours.
    """

    def __init__(
        self,
        share: float = 0.1,
        values: str = "float32",
        feedback: bool = True,
        block: int = BLOCK,
        rescale: bool = False,
    ) -> None:
        """Choose how much is sent.

        Args:
            share: Part of each tensor, in (0, 1].
            values: How numbers are sent, "float32", "int8" or "int4".
            feedback: Whether what was not sent is added to the next update.
            block: Numbers that share a scale, from 1, in int8 and int4.
            rescale: Whether what is sent of a tensor is given the norm of all of it; not together
                with feedback, which sends the rest later.

        Raises:
            ValueError: If one is out of range, or the last two meet.
        """
        _check(share, feedback)
        if type(rescale) is not bool:
            raise ValueError(f"rescale is {rescale!r}; true or false is expected")
        if rescale and feedback:
            raise ValueError("rescale and feedback are both true; allowed: one of them")
        self._rescale = rescale
        self._share, self._feedback, self._values = share, feedback, Values(values, block)

    @property
    def keeps_residual(self) -> bool:
        """With error feedback."""
        return self._feedback

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """Where the numbers are, and the numbers."""
        counts = kept_of(layout, self._share)
        count = sum(counts)
        where = Piece((count,), torch.int32)
        if bit_bytes(layout.size) < 4 * count:
            where = Piece((bit_bytes(layout.size),), torch.uint8)
        return {"places": where, **self._values.pieces(counts)}

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Choose the largest of each tensor; of equals, the first."""
        chosen, counts = self._chosen(layout, update), kept_of(layout, self._share)
        sent = (update * self._factors(layout, update, chosen))[chosen]
        is_bits = self.pieces(layout)["places"].dtype == torch.uint8
        where = pack_bits(chosen) if is_bits else chosen.nonzero().flatten().to(torch.int32)
        return {"places": where, **self._values.pack(counts, sent, generator)}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Put the numbers where they belong; the others are zeros."""
        values = self._values.unpack(kept_of(layout, self._share), message)
        where = message["places"]
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
        """All of a number that is not sent; what rescaling adds to one that is."""
        factors = self._factors(layout, update, self._chosen(layout, update))
        return _bound(update, factors, self._values.rounding(layout, update))

    def _chosen(self, layout: Layout, update: Tensor) -> Tensor:
        """Return which numbers are sent, [P]."""
        magnitude, chosen = update.abs(), torch.zeros(layout.size, dtype=torch.bool)
        counts = kept_of(layout, self._share)
        for place, count in zip(layout.places.values(), counts, strict=True):
            order = torch.argsort(magnitude[place], descending=True, stable=True)
            chosen[place.start + order[:count]] = True
        return chosen

    def _factors(self, layout: Layout, update: Tensor, chosen: Tensor) -> Tensor:
        """Return what each number [P] is multiplied by if it is sent: 1 to sqrt(n / k)."""
        factors = torch.ones(layout.size)
        if self._rescale:
            for place in layout.places.values():
                whole = update[place].double()  # no square of a float32 is too small or too large
                sent = whole[chosen[place]].norm()
                if sent > 0:
                    factors[place] = float(whole.norm() / sent)
        return factors


@final
class RandomK(Codec):
    """Sends numbers of each tensor that are drawn at random, unbiased or with error feedback.

    Where they are need not be sent: both sides draw the same places from one 8-byte word. Without
    error feedback what is sent is multiplied by n / k, which makes the mean exact and the error up
    to (n / k - 1) |x|; with it, what is sent is not scaled, and |error| <= |x|. Values in int8 or
    int4 add their rounding.
    """

    def __init__(
        self,
        share: float = 0.1,
        values: str = "float32",
        feedback: bool = False,
        block: int = BLOCK,
    ) -> None:
        """Choose how much is sent.

        Args:
            share: Part of each tensor, in (0, 1].
            values: How numbers are sent, "float32", "int8" or "int4".
            feedback: Whether what was not sent is added to the next update.
            block: Numbers that share a scale, from 1, in int8 and int4.

        Raises:
            ValueError: If one is out of range.
        """
        _check(share, feedback)
        self._share, self._feedback, self._values = share, feedback, Values(values, block)

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
        counts = kept_of(layout, self._share)
        return {"word": Piece((1,), torch.int64), **self._values.pieces(counts)}

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw places, and send what is there."""
        word = torch.randint(2**62, (1,), generator=generator)
        counts = kept_of(layout, self._share)
        chosen = update[self._places(layout, int(word))] * self._scales(layout, counts)
        return {"word": word, **self._values.pack(counts, chosen, generator)}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Draw the same places, and put the numbers there."""
        word = int(message["word"])
        if not 0 <= word < 2**62:
            raise ValueError("its word is not from 0 to 2**62")
        update = torch.zeros(layout.size)
        values = self._values.unpack(kept_of(layout, self._share), message)
        update[self._places(layout, word)] = values
        return update

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """All of a number that is not sent; what the scaling adds to one that is."""
        factors = self._scales(layout, layout.sizes)
        return _bound(update, factors, self._values.rounding(layout, update))

    def _places(self, layout: Layout, word: int) -> Tensor:
        """Return the places that a word chooses, ascending."""
        places, counts = layout.places.values(), kept_of(layout, self._share)
        found = [
            place.start + subset(split(word, index), place.stop - place.start, count)
            for index, (place, count) in enumerate(zip(places, counts, strict=True))
        ]
        return torch.from_numpy(np.concatenate(found))

    def _scales(self, layout: Layout, counts: Sequence[int]) -> Tensor:
        """Return what so many numbers of each tensor are multiplied by if they are sent."""
        factor = np.ones(len(counts))
        if not self._feedback:
            factor = np.array(layout.sizes) / np.maximum(kept_of(layout, self._share), 1)
        return torch.from_numpy(np.repeat(factor, counts)).to(torch.float32)


def _bound(update: Tensor, factors: Tensor, rounding: Tensor) -> Tensor:
    """Return the largest error of numbers [P] that are dropped, or multiplied and rounded."""
    added = update.abs() * (factors - 1) * (1 + 2.0**-16)  # float32 rounds the product, too
    return update.abs().maximum(added + rounding * factors)


def _within(places: Tensor, size: int) -> bool:
    return not len(places) or (int(places[0]) >= 0 and int(places[-1]) < size)
