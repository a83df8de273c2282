"""Entropy coding on top of a codec: nothing is lost, and nothing unexpected is let in."""

from __future__ import annotations

import lzma

import numpy as np
import pytest
import torch

from edgelearn.compress import entropy
from edgelearn.compress.codec import Codec, Piece, decoded, make_codec
from edgelearn.compress.entropy import EntropyCoded
from edgelearn.compress.half import Float16
from edgelearn.compress.quantized import Int4, Int8
from edgelearn.compress.sparse import RandomK, TopK
from edgelearn.errors import EgressError, PluginError, ScenarioError, StateError
from edgelearn.federated.egress import message_schema
from edgelearn.params import Layout

LAYOUT = Layout(("w", "b"), ((100, 300), (7,)), 2)
CODECS = [
    Float16(),
    Int8(),
    Int4(block=64),
    TopK(0.01),
    TopK(0.3),
    TopK(0.01, values="int8"),
    RandomK(0.05, values="int8"),
    RandomK(0.3, values="int4", block=64),
    TopK(0.3, values="int4", feedback=False, rescale=True),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update() -> torch.Tensor:
    """Most numbers small, as in an update."""
    return torch.randn(LAYOUT.size, generator=seeded()) ** 3


def compress(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=entropy._FILTERS)


def size_of(message: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in message.values())


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_it_says_what_the_codec_says_in_fewer_bytes(codec: Codec) -> None:
    wrapped = EntropyCoded(codec)
    plain = dict(codec.encode(LAYOUT, update(), seeded(1)))
    message = wrapped.encode(LAYOUT, update(), seeded(1))
    assert torch.equal(decoded(wrapped, LAYOUT, message), decoded(codec, LAYOUT, plain))
    assert size_of(message) < size_of(plain)
    assert wrapped.is_unbiased == codec.is_unbiased
    assert wrapped.keeps_residual == codec.keeps_residual
    assert torch.equal(wrapped.error(LAYOUT, update()), codec.error(LAYOUT, update()))
    message_schema(wrapped, LAYOUT).admit(message, {})


def test_a_hundredth_in_8_bits_with_its_places_takes_little_over_two_bytes_each() -> None:
    """The places are steps of about 100, less than a byte each: 5 bytes become 2."""
    codec = TopK(0.01, values="int8")
    message = EntropyCoded(codec).encode(LAYOUT, update(), seeded())
    assert size_of(message) < 2.3 * 301


def test_what_can_not_be_compressed_stays_within_the_bound() -> None:
    noise = torch.randint(-127, 128, (LAYOUT.size,), generator=seeded(), dtype=torch.int8)
    whole = EntropyCoded(Int8())
    bound = whole.pieces(LAYOUT)["compressed"]
    for size in (0, 1, 1000, 300_000):
        data = compress(np.random.default_rng(0).bytes(size))
        assert size < len(data) <= entropy._bound(size)
    message = whole.encode(LAYOUT, noise.float(), seeded())
    assert bound.is_bound
    assert message["compressed"].shape <= bound.shape


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float32])
def test_planes_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**62), 2**62, (60,), generator=seeded())
    values = bits.view(dtype)[:33].clone()
    piece = Piece((11, 3), dtype)
    back = entropy._gather(entropy._spread(values.numpy()), piece)
    assert back.shape == (11, 3)
    assert back.tobytes() == values.numpy().tobytes()
    assert back.flags.writeable


def test_damaged_bytes_and_too_many_are_refused() -> None:
    codec = EntropyCoded(Int4())
    good = codec.encode(LAYOUT, update(), seeded())["compressed"]
    size = sum(p.shape[0] * p.dtype.itemsize for p in Int4().pieces(LAYOUT).values())
    bomb = torch.frombuffer(bytearray(compress(bytes(10_000_000))), dtype=torch.uint8)
    short = torch.frombuffer(bytearray(compress(bytes(size - 1))), dtype=torch.uint8)
    for bad in (good[:-1], torch.cat([good, good[:3]]), bomb, short, good[:0]):
        with pytest.raises(StateError, match="can't decode"):
            decoded(codec, LAYOUT, {"compressed": bad.clone()})
    most = codec.pieces(LAYOUT)["compressed"].shape[0]
    long = torch.zeros(most + 1, dtype=torch.uint8)
    with pytest.raises(StateError, match=rf"is not at most \({most},\)"):
        decoded(codec, LAYOUT, {"compressed": long})
    with pytest.raises(EgressError, match="is not at most"):
        message_schema(codec, LAYOUT).admit({"compressed": long}, {})
    with pytest.raises(EgressError, match="is not at most"):
        message_schema(codec, LAYOUT).admit({"compressed": good.reshape(1, -1)}, {})


def test_it_stands_behind_the_name_of_a_codec() -> None:
    codec = make_codec("top-k+lzma", {"share": 0.5})
    assert isinstance(codec, EntropyCoded)
    assert codec.keeps_residual
    with pytest.raises(ScenarioError, match="nothing to compress"):
        make_codec("none+lzma", {})
    with pytest.raises(ScenarioError, match="share is 0"):
        make_codec("top-k+lzma", {"share": 0})


def test_messages_without_a_fixed_size_are_refused() -> None:
    with pytest.raises(PluginError, match=r"declares 'compressed' of no fixed size; \+lzma"):
        EntropyCoded(EntropyCoded(Int8())).pieces(LAYOUT)
