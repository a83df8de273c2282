"""Entropy coding on top of a codec: what it makes, in as few bytes as its values allow.

Codes of an update are far from equally likely (most are small), and fixed-size codes pay for all
alike. LZMA's range coder (the standard library's `lzma`) spends fewer bits on the frequent ones. It
loses nothing. Its dictionary is kept at 64 KiB, so that a small device can pay for it.

A message then has a size that depends on the update. So bytes are known only as they are sent, and
the size says a little about the update to whoever sees the traffic: `docs/privacy.md`.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.compress.codec import Codec, Piece
from edgelearn.errors import PluginError
from edgelearn.params import Layout
from edgelearn.plugins import ENTROPY

_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**16}]
_PIECE = "compressed"


@final
class EntropyCoded(Codec):
    """Another codec's messages, compressed: `int4+lzma` in a scenario.

    Error, mean and error feedback are those of the other codec.
    """

    def __init__(self, codec: Codec) -> None:
        """Wrap a codec."""
        self._codec = codec

    @property
    def is_unbiased(self) -> bool:
        """If the other one is."""
        return self._codec.is_unbiased

    @property
    def keeps_residual(self) -> bool:
        """If the other one does."""
        return self._codec.keeps_residual

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """Bytes, at most as many as come of what can't be compressed.

        Raises:
            PluginError: If the size of a message of the other codec depends on the update.
        """
        pieces = self._codec.pieces(layout)
        if bound := [name for name, piece in pieces.items() if piece.is_bound]:
            raise PluginError(
                f"{type(self._codec).__name__} declares {bound[0]!r} of no fixed size; {ENTROPY} "
                "compresses messages whose pieces all have one"
            )
        size = sum(_num_bytes(piece) for piece in pieces.values())
        return {_PIECE: Piece((_bound(size),), torch.uint8, is_bound=True)}

    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compress what the other codec makes."""
        message = self._codec.encode(layout, update, generator)
        planes = [_spread(message[name].numpy()) for name in self._codec.pieces(layout)]
        data = lzma.compress(b"".join(planes), lzma.FORMAT_RAW, filters=_FILTERS)
        return {_PIECE: torch.frombuffer(bytearray(data), dtype=torch.uint8)}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Restore the other codec's message, and decode that."""
        pieces = self._codec.pieces(layout)
        size = sum(_num_bytes(piece) for piece in pieces.values())
        # Never more than is declared, whatever the bytes would grow to.
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        data = decompressor.decompress(message[_PIECE].numpy().tobytes(), size + 1)
        if len(data) != size or not decompressor.eof or decompressor.unused_data:
            raise ValueError(f"it does not hold the {size} bytes that were compressed")
        restored, start = {}, 0
        for name, piece in pieces.items():
            stop = start + _num_bytes(piece)
            restored[name] = torch.from_numpy(_gather(data[start:stop], piece))
            start = stop
        return self._codec.decode(layout, restored)

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """That of the other one."""
        return self._codec.error(layout, update)


def _num_bytes(piece: Piece) -> int:
    return math.prod(piece.shape) * piece.dtype.itemsize


def _bound(size: int) -> int:
    """Return more bytes than LZMA2 makes of so many; what gets no smaller it stores in chunks."""
    return size + (size >> 10) + 64


def _spread(values: NDArray[Any]) -> bytes:
    """Return an array byte plane by byte plane; of places that rise, the steps.

    The high bytes of numbers that are near each other are alike, and so are small steps.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype == np.int32:
        flat = np.diff(flat, prepend=np.int32(0))  # wraps around, as the sum that undoes it does
    planes = flat.view(np.uint8).reshape(-1, flat.dtype.itemsize).T
    return planes.tobytes()


def _gather(data: bytes, piece: Piece) -> NDArray[Any]:
    """Return what `_spread` was given."""
    dtype = np.dtype(str(piece.dtype).removeprefix("torch."))
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    flat = np.ascontiguousarray(planes.T).reshape(-1).view(dtype)
    if dtype == np.int32:
        flat = np.cumsum(flat, dtype=np.int32)
    return flat.reshape(piece.shape).copy()
