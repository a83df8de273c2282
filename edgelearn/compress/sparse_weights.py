"""Storage of integer weights of which many are zero: where the others are, and what they are.

A packed tensor holds the codes that are not 0, and where they lie, as a bitmask (a bit for each
place) or as the gaps between them (a byte or more for each code), whichever is smaller. Both go
through an entropy coder of the standard library, zlib or lzma, where that makes them smaller; a
tensor without zeros to speak of is stored as it is. The round trip is exact.

This is for storing and sending a model. **It makes no model quicker**: it is unpacked to a dense
tensor before it is used. Sparse kernels of a processor lose to dense ones except at very high
sparsity, and there is none for int8 and single zeros that would win.

Layout, little-endian: version (1 byte), places (1), coder of the places (1), coder of the codes
(1), number of elements (4), number of codes (4), bytes of the places (4), CRC-32 of what follows
(4), then places, then codes.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import StateError

Codes = NDArray[np.int8]
_HEADER = struct.Struct("<BBBBIIII")
_VERSION = 1
_ALL, _BITMASK, _GAPS = range(3)  # places: every one, a bit for each, distances
_PLAIN, _ZLIB, _LZMA = range(3)  # coders
# A dictionary of 1 MiB bounds the memory of a device that unpacks.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME, "dict_size": 2**20}]
_LONG = 255  # a byte of a gap that means: 255, and more to come


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the same weights, stored in several ways.

    Attributes:
        float32: Dense, four bytes each.
        int8: Dense codes.
        int8_coded: Dense codes through the entropy coder.
        packed: By `pack`.
    """

    float32: int
    int8: int
    int8_coded: int
    packed: int


def pack(codes: Codes) -> bytes:
    """Store integer weights.

    Args:
        codes: Of any shape, which is not stored; int8, fewer than 2^32.

    Returns:
        Bytes for `unpack`; the same for the same codes.

    Example:
        >>> codes = np.zeros(1000, np.int8)
        >>> codes[[3, 500]] = 7, -1
        >>> data = pack(codes)
        >>> len(data), bool((unpack(data) == codes).all())
        (25, True)
    """
    if codes.dtype != np.int8:
        raise ValueError(f"codes are {codes.dtype}; int8 is allowed")
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size >= 2**32:
        raise ValueError(f"there are {flat.size} codes; fewer than {2**32} are allowed")
    found = np.flatnonzero(flat)
    values = flat[found].tobytes()
    return min(
        _packed(_ALL, flat.size, flat.size, b"", flat.tobytes()),
        _packed(_BITMASK, flat.size, found.size, np.packbits(flat != 0).tobytes(), values),
        _packed(_GAPS, flat.size, found.size, _gaps(found), values),
        key=len,
    )


def unpack(data: bytes) -> Codes:
    """Return the codes [n] that were packed.

    Args:
        data: What `pack` returned.

    Raises:
        StateError: If the bytes are damaged.
    """
    if len(data) < _HEADER.size:
        raise StateError(f"packed weights have {len(data)} bytes; at least {_HEADER.size} expected")
    version, how, places_coder, codes_coder, size, count, length, crc = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise StateError(f"packed weights are of version {version}; {_VERSION} expected")
    if count > size or (how == _ALL and count != size):
        raise StateError(f"packed weights have {count} codes for {size} places")
    body = memoryview(data)[_HEADER.size :]
    if zlib.crc32(body) != crc:
        raise StateError("packed weights are damaged: their checksum differs")
    if how == _ALL:
        found: NDArray[np.bool_] | NDArray[np.int64] = np.ones(size, np.bool_)
    elif how == _BITMASK:
        bits = np.frombuffer(_decoded(body[:length], places_coder, -(-size // 8)), np.uint8)
        found = np.unpackbits(bits, count=size).view(np.bool_)
        if np.count_nonzero(found) != count:
            raise StateError("packed weights: the bitmask does not match the number of codes")
    elif how == _GAPS:
        most = count + size // _LONG
        found = _places(_decoded(body[:length], places_coder, most, exact=False), size, count)
    else:
        raise StateError(f"packed weights have places of the unknown kind {how}")
    codes = np.zeros(size, np.int8)
    codes[found] = np.frombuffer(_decoded(body[length:], codes_coder, count), np.int8)
    return codes


def sizes(tensors: Iterable[Codes]) -> Sizes:
    """Return what tensors of codes take, without the scales, which are the same either way."""
    number, coded, packed = 0, 0, 0
    for codes in tensors:
        number += codes.size
        coded += len(_coded(np.ascontiguousarray(codes).tobytes())[1])
        packed += len(pack(codes))
    return Sizes(4 * number, number, coded, packed)


def _packed(how: int, size: int, count: int, places: bytes, values: bytes) -> bytes:
    places_coder, coded_places = _coded(places)
    codes_coder, coded_values = _coded(values)
    body = coded_places + coded_values
    header = (_VERSION, how, places_coder, codes_coder, size, count, len(coded_places))
    return _HEADER.pack(*header, zlib.crc32(body)) + body


def _coded(data: bytes) -> tuple[int, bytes]:
    """Return the coder that makes data smallest, and what it makes of it."""
    tried = [
        (_PLAIN, data),
        (_ZLIB, zlib.compress(data, 9, wbits=-15)),
        (_LZMA, lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)),
    ]
    return min(tried, key=lambda found: len(found[1]))


def _decoded(data: memoryview, coder: int, size: int, *, exact: bool = True) -> bytes:
    """Return decoded data; no more is ever decoded than there should be.

    Args:
        data: Coded.
        coder: By which coder.
        size: Bytes that come out, or the most that may.
        exact: Whether fewer are wrong, too.
    """
    if coder == _PLAIN:
        out = bytes(data)
    elif coder == _ZLIB:
        out = _inflated(zlib.decompressobj(wbits=-15).decompress, data, size)
    elif coder == _LZMA:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        out = _inflated(decoder.decompress, data, size)
    else:
        raise StateError(f"packed weights are by the unknown coder {coder}")
    if len(out) > size or (exact and len(out) < size):
        raise StateError(f"packed weights: a part has {len(out)} bytes, expected {size}")
    return out


def _inflated(decompress: Callable[[memoryview, int], bytes], data: memoryview, size: int) -> bytes:
    try:
        return decompress(data, size + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise StateError(f"packed weights are damaged: {error}") from error


def _gaps(found: NDArray[np.int64]) -> bytes:
    """Return the distance of each place to the one before: bytes of 255, and one below it."""
    gaps = np.diff(found, prepend=-1) - 1
    whole, rest = np.divmod(gaps, _LONG)
    out = np.full(int(whole.sum()) + len(gaps), _LONG, np.uint8)
    out[np.cumsum(whole + 1) - 1] = rest
    return out.tobytes()


def _places(data: bytes, size: int, count: int) -> NDArray[np.int64]:
    """Return the places of gaps."""
    steps = np.frombuffer(data, np.uint8).astype(np.int64)
    ends = steps != _LONG
    if np.count_nonzero(ends) != count or (count and not ends[-1]) or (len(steps) and not count):
        raise StateError("packed weights: the gaps do not match the number of codes")
    found: NDArray[np.int64] = (np.cumsum(steps + ends) - 1)[ends]
    if count and found[-1] >= size:
        raise StateError(f"packed weights have a code at {found[-1]} of {size} places")
    return found
