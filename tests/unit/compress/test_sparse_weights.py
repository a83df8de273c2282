"""Integer weights with zeros, packed."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelearn.compress import sparse_weights as sparse
from edgelearn.compress.sparse_weights import pack, sizes, unpack
from edgelearn.errors import StateError


def codes_of(size: int, sparsity: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    codes = np.clip(np.round(generator.normal(0, 30, size)), -127, 127).astype(np.int8)
    codes[codes == 0] = 1
    codes[generator.random(size) < sparsity] = 0
    return codes


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 20_000])
def test_the_round_trip_is_exact(size: int, sparsity: float) -> None:
    codes = codes_of(size, sparsity)
    found = unpack(pack(codes))
    assert found.dtype == np.int8
    assert np.array_equal(found, codes)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    places=st.lists(st.tuples(st.integers(0, 2999), st.integers(-128, 127)), max_size=12),
)
def test_any_codes_come_back(size: int, places: list[tuple[int, int]]) -> None:
    codes = np.zeros(size, np.int8)
    for place, code in places:
        codes[place % size] = code
    assert np.array_equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("distance", [1, 2, 254, 255, 256, 510, 511, 1020])
def test_gaps_of_any_length(distance: int) -> None:
    found = np.arange(0, 5 * distance, distance)
    assert np.array_equal(sparse._places(sparse._gaps(found), 5 * distance, 5), found)


def test_shapes_and_strides_do_not_matter() -> None:
    codes = codes_of(600, 0.5).reshape(20, 30)
    assert np.array_equal(unpack(pack(codes.T)), codes.T.reshape(-1))


def test_the_way_of_places_is_the_smaller_one() -> None:
    ways = [pack(codes_of(50_000, sparsity))[1] for sparsity in (0.0, 0.6, 0.999)]
    assert ways == [sparse._ALL, sparse._BITMASK, sparse._GAPS]


def test_it_is_no_larger_than_what_it_replaces() -> None:
    header = 20
    for sparsity in (0.0, 0.2, 0.5, 0.8, 0.95):
        codes = codes_of(20_000, sparsity)
        found = sizes([codes])
        assert found.float32 == 80_000
        assert found.int8 == 20_000
        assert found.packed == len(pack(codes)) <= min(found.int8, found.int8_coded) + header
        # 1 bit for each place at most, and 1 byte for each code
        assert found.packed <= 20_000 / 8 + np.count_nonzero(codes) + header


def test_it_comes_near_to_the_entropy() -> None:
    codes = codes_of(100_000, 0.9)
    share = np.bincount(codes.astype(np.int64) + 128, minlength=256) / len(codes)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() / 8 * len(codes)
    assert entropy < len(pack(codes)) < 1.12 * entropy


def test_sizes_of_several_tensors_add_up() -> None:
    parts = [codes_of(1000, 0.5), codes_of(300, 0.0, 1).reshape(3, 100)]
    both, first, second = sizes(parts), sizes(parts[:1]), sizes(parts[1:])
    assert both.packed == first.packed + second.packed
    assert both.int8_coded == first.int8_coded + second.int8_coded
    assert both.int8 == 1300


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.999])
def test_damage_is_noticed(sparsity: float) -> None:
    data = pack(codes_of(4000, sparsity))
    for broken in (data[:-1], data[:9], data + b"\0", b""):
        with pytest.raises(StateError):
            unpack(broken)
    generator = np.random.default_rng(1)
    for _ in range(50):
        wrong = bytearray(data)
        wrong[generator.integers(20, len(data))] ^= 1 << int(generator.integers(8))
        with pytest.raises(StateError, match="checksum"):
            unpack(bytes(wrong))


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.999])
def test_made_up_bytes_are_refused_or_have_the_size_they_say(sparsity: float) -> None:
    """Never another exception, even where the checksum fits."""
    codes, generator = codes_of(4000, sparsity), np.random.default_rng(1)
    data = pack(codes)
    for _ in range(200):
        wrong = bytearray(data)
        wrong[generator.integers(20, len(data))] ^= 1 << int(generator.integers(8))
        struct.pack_into("<I", wrong, 16, zlib.crc32(wrong[20:]))
        try:
            assert unpack(bytes(wrong)).shape == codes.shape
        except StateError:
            continue


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 9, "of version 9"),
        (1, 7, "places of the unknown kind 7"),
        (3, 5, "by the unknown coder 5"),
        (4, 3, "codes for 3 places"),
    ],
)
def test_a_wrong_header_is_named(field: int, value: int, message: str) -> None:
    data = pack(codes_of(4000, 0.6))
    header = list(struct.unpack_from("<BBBBIIII", data))
    header[field] = value
    with pytest.raises(StateError, match=message):
        unpack(struct.pack("<BBBBIIII", *header) + data[20:])


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(10**7), 9, wbits=-15)
    data = struct.pack("<BBBBIIII", 1, 0, 0, 1, 100, 100, 0, zlib.crc32(bomb)) + bomb
    with pytest.raises(StateError, match="has 101 bytes, expected 100"):
        unpack(data)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="codes are float32; int8 is allowed"):
        pack(np.zeros(3, np.float32))
