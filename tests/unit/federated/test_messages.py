"""A codec's message as Flower's arrays: what comes back, and what is no such message."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelearn.compress.codec import Piece
from edgelearn.errors import StateError
from edgelearn.federated import messages as wire

from flwr.app import Array, ArrayRecord  # isort: skip

PIECES = {
    "codes": Piece((3,), torch.uint8),
    "signs": Piece((2, 2), torch.int8),
    "values": Piece((2,), torch.float16),
    "word": Piece((), torch.int64),
    "none": Piece((0,), torch.float32),
}


def record(**replaced: Array) -> ArrayRecord:
    values = {
        "codes": np.array([0, 7, 255], np.uint8),
        "signs": np.array([[1, -1], [-128, 0]], np.int8),
        "values": np.array([0.5, -2], np.float16),
        "word": np.array(2**61),
        "none": np.zeros(0, np.float32),
    }
    return ArrayRecord({**dict(wire.encode_message(values)), **replaced})


def test_it_comes_back_with_shapes_and_dtypes() -> None:
    found = wire.decode_message(record(), PIECES)
    assert {n: (tuple(v.shape), v.dtype) for n, v in found.items()} == {
        n: (p.shape, p.dtype) for n, p in PIECES.items()
    }
    assert found["codes"].tolist() == [0, 7, 255]
    assert found["signs"].tolist() == [[1, -1], [-128, 0]]
    assert found["values"].tolist() == [0.5, -2]
    assert int(found["word"]) == 2**61


def test_every_message_has_the_bytes_of_an_empty_one() -> None:
    assert wire.empty_message(PIECES).count_bytes() == record().count_bytes()


GOOD = Array(np.array([0, 7, 255], np.uint8))


@pytest.mark.parametrize(
    "codes",
    [
        Array(np.array([0, 7], np.uint8)),
        Array(np.array([0, 7, 255], np.int16)),
        Array("uint8", (3,), "numpy.ndarray", b"nothing"),
        Array(np.zeros(300, np.uint8)),
        Array("float64", (3,), "numpy.ndarray", GOOD.data),
        Array("no dtype", (3,), "numpy.ndarray", GOOD.data),
        Array("object", (3,), "numpy.ndarray", GOOD.data),
        Array("uint8", (-3,), "numpy.ndarray", GOOD.data),
        Array("uint8", (3,), "pickle", b"\x80\x04N."),
    ],
    ids=[
        "short",
        "int16",
        "no array",
        "too long",
        "float64",
        "no dtype",
        "object",
        "negative",
        "stype",
    ],
)
def test_what_is_no_such_array_is_refused(codes: Array) -> None:
    with pytest.raises(StateError, match="'codes' of the message"):
        wire.decode_message(record(codes=codes), PIECES)


def test_other_names_are_refused() -> None:
    with pytest.raises(StateError, match="are not those declared: codes, signs"):
        wire.decode_message(record(more=GOOD), PIECES)
