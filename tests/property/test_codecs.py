"""Laws of codecs, for any finite update: the stated error holds, and packing loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelearn.compress import packing
from edgelearn.compress.codec import Codec, decoded
from edgelearn.compress.half import Float16
from edgelearn.compress.quantized import Int4, Int8
from edgelearn.compress.sparse import RandomK, TopK
from edgelearn.params import Layout

MODERATE = st.floats(-1e4, 1e4, width=32)
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)
CODECS = [
    Float16(),
    Int8(block=4),
    Int4(block=5),
    TopK(0.3),
    TopK(0.3, values="int8"),
    RandomK(0.4, feedback=False),
    RandomK(0.4, values="int8", feedback=True),
    RandomK(0.2, values="int8", feedback=False),
    RandomK(0.3, values="int4", feedback=False, block=3),
    TopK(0.2, values="int4", feedback=False, rescale=True),
]
FED_BACK = [TopK(0.2), RandomK(0.2, feedback=True), TopK(0.2, values="int8")]


def layout_of(sizes: list[int]) -> Layout:
    names = tuple(f"t{index}" for index in range(len(sizes)))
    return Layout(names, tuple((size,) for size in sizes), len(sizes))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
@given(st.data(), SIZES, st.integers(0, 2**32))
def test_what_is_decoded_is_within_the_stated_error(
    codec: Codec, data: st.DataObject, sizes: list[int], seed: int
) -> None:
    layout = layout_of(sizes)
    update = torch.from_numpy(data.draw(arrays(np.float32, layout.size, elements=MODERATE)))
    message = codec.encode(layout, update, torch.Generator().manual_seed(seed))
    found = decoded(codec, layout, message)
    error = (found.double() - update.double()).abs()
    slack = 1e-6 * update.double().abs() + 1e-44  # rounding to float32, once
    assert bool((error <= codec.error(layout, update).double() + slack).all())


@given(arrays(np.int8, st.integers(0, 33), elements=st.integers(-8, 7)))
def test_nibbles_come_back(codes: np.ndarray) -> None:
    packed = packing.pack_nibbles(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8
    assert len(packed) == packing.nibble_bytes(len(codes)) == (len(codes) + 1) // 2
    assert packing.unpack_nibbles(packed, len(codes)).tolist() == codes.tolist()


@given(arrays(np.bool_, st.integers(0, 33)))
def test_bits_come_back(answers: np.ndarray) -> None:
    packed = packing.pack_bits(torch.from_numpy(answers))
    assert packed.dtype == torch.uint8
    assert len(packed) == packing.bit_bytes(len(answers)) == (len(answers) + 7) // 8
    assert packing.unpack_bits(packed, len(answers)).tolist() == answers.tolist()


@given(
    st.data(),
    SIZES,
    st.sampled_from([TopK(0.2), RandomK(0.2, feedback=True), TopK(0.2, values="int8")]),
)
def test_with_feedback_what_was_sent_and_what_is_left_is_all_there_was(
    data: st.DataObject, sizes: list[int], codec: Codec
) -> None:
    layout = layout_of(sizes)
    residual, total, sent = (torch.zeros(layout.size) for _ in range(3))
    element = st.integers(-8, 8).map(float)
    for server_round in range(4):
        update = torch.from_numpy(data.draw(arrays(np.float32, layout.size, elements=element)))
        total += update
        whole = residual + update
        generator = torch.Generator().manual_seed(server_round)
        found = decoded(codec, layout, codec.encode(layout, whole, generator))
        residual, sent = whole - found, sent + found
    torch.testing.assert_close(sent + residual, total, rtol=0, atol=1e-4)
