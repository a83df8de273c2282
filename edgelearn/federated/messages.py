"""The wire format: what server and device say to each other in Flower messages.

An instruction holds the global parameters as one ArrayRecord, and a ConfigRecord with the round,
the position in the stream and the scenario's digest. A reply holds one MetricRecord and, after
training, one ArrayRecord: local - global where the config asks for it (edgelearn's own loop does),
as it is or as the scenario's codec encodes it; the local parameters as any Flower strategy expects
them where the config does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import edgelearn.federated._flwr_compat  # noqa: F401 - before flwr
from edgelearn.compress.codec import Piece
from edgelearn.errors import RunError, StateError
from edgelearn.params import Layout
from edgelearn.plugins import NO_CODEC

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # isort: skip

_VECTOR, _NUMPY = "params", "numpy.ndarray"
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
RUN = "edgelearn-run"  # on a real network: which run of the scenario an instruction belongs to
FIT, EVALUATE, CONSOLIDATE, HELLO = "train", "evaluate", "query.consolidate", "query.hello"


def encode_params(layout: Layout, params: Tensor) -> ArrayRecord:
    """Return a vector [P] as named arrays."""
    views = layout.views(params.detach())
    return ArrayRecord({name: _encoded(view.numpy()) for name, view in views.items()})


def decode_params(layout: Layout, record: ArrayRecord) -> Tensor:
    """Return named arrays as a new vector [P], float32.

    Raises:
        StateError: If names or shapes are not the model's.
    """
    return layout.flatten({name: _decoded(array) for name, array in record.items()})


def encode_vector(params: Tensor) -> ArrayRecord:
    """Return a vector [P] as one array, for strategies that treat every number alike."""
    return ArrayRecord({_VECTOR: _encoded(params.detach().numpy())})


def decode_vector(record: ArrayRecord) -> Tensor:
    """Return the vector [P] of `encode_vector`."""
    return torch.from_numpy(_decoded(record[_VECTOR]).astype(np.float32, copy=False))


def encode_message(message: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return what a codec made of an update as named arrays."""
    return ArrayRecord({name: Array(np.asarray(v, order="C")) for name, v in message.items()})


def decode_message(record: ArrayRecord, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Return the tensors of a codec's message.

    Args:
        record: What came over the wire.
        pieces: What the codec declares; nothing else is read.

    Raises:
        StateError: If names, shapes or dtypes are others, or the bytes are not such an array.
    """
    if set(record) != set(pieces):
        raise StateError(f"the message's tensors are not those declared: {', '.join(pieces)}")
    return {name: _piece(name, record[name], piece) for name, piece in pieces.items()}


def _piece(name: str, array: Array, piece: Piece) -> Tensor:
    try:
        value = torch.from_numpy(_decoded(array))
    except (ValueError, TypeError, EOFError) as error:
        raise StateError(f"{name!r} of the message is no array {piece}: {error}") from error
    if not piece.admits(value):
        found = f"{tuple(value.shape)} {value.dtype}"
        raise StateError(f"{name!r} of the message is {found}; declared: {piece}")
    return value


def empty_message(pieces: Mapping[str, Piece]) -> ArrayRecord:
    """Return a message of zeros: as many bytes as any other of its codec, or the most of all."""
    zeros = {name: torch.zeros(p.shape, dtype=p.dtype).numpy() for name, p in pieces.items()}
    return encode_message(zeros)


def _encoded(values: NDArray[np.float32]) -> Array:
    """Return what `Array(values)` returns, without writing the same header anew, 40 us each."""
    data = _header(values.shape) + values.tobytes()
    return Array("float32", values.shape, _NUMPY, data)


@lru_cache(maxsize=1024)
def _header(shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of a float32 array in NumPy's file format."""
    data = Array(np.zeros(shape, np.float32)).data
    return data[: len(data) - 4 * math.prod(shape)]


def _decoded(array: Array) -> NDArray[Any]:
    """Return a copy of an array's values; `Array.numpy` parses the header anew, 50 us each."""
    size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    header = array.data[: len(array.data) - size]
    if array.stype != _NUMPY or b"'fortran_order': False" not in header:
        return array.numpy()
    flat = np.frombuffer(array.data, array.dtype, offset=len(header))
    return flat.reshape(array.shape).copy()


def instruction(
    *, digest: str, server_round: int, position: int, extra: Mapping[str, Any] | None = None
) -> ConfigRecord:
    """Return the config of an instruction."""
    return ConfigRecord(
        {
            "edgelearn-digest": digest,
            "edgelearn-wire": "delta",
            "server-round": server_round,
            "position": position,
            **(extra or {}),
        }
    )


def config_of(message: Message) -> ConfigRecord:
    """Return the config of an instruction; an empty one if it has none."""
    records = list(message.content.config_records.values())
    return records[0] if records else ConfigRecord()


def arrays_of(message: Message) -> ArrayRecord:
    """Return the only ArrayRecord of a message.

    Raises:
        StateError: If there is not exactly one.
    """
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise StateError(f"expected one ArrayRecord in the message, found {len(records)}")
    return records[0]


def number_in(config: ConfigRecord, key: str, default: float) -> float:
    """Return a number from an instruction's config.

    Raises:
        StateError: If there is something else under the key.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float):
        raise StateError(f"the instruction's {key!r} is {value!r}, not a number")
    return value


def check_digest(config: ConfigRecord, digest: str, device: int) -> None:
    """Refuse a server that runs another scenario.

    Raises:
        StateError: If the digests differ.
    """
    theirs = config.get("edgelearn-digest", digest)
    if theirs != digest:
        raise StateError(
            f"device {device} has the scenario {digest}, the server runs {theirs!r}; "
            "give both the same file"
        )


def check_decoder(config: ConfigRecord, codec: str) -> None:
    """Refuse a server that can't decode what devices send: one without edgelearn's loop.

    Raises:
        RunError: If it asks for parameters where the scenario has a codec.
    """
    if codec != NO_CODEC and config.get("edgelearn-wire") != "delta":
        raise RunError(
            f"the scenario's codec is {codec!r}, and this server does not decode updates: use "
            'edgelearn\'s own loop, or set wire.codec to "none"'
        )


def check_cutter(config: ConfigRecord, width: float) -> None:
    """Refuse a server that sends whole models to all devices: one without edgelearn's loop.

    Raises:
        RunError: If it does.
    """
    if config.get("edgelearn-wire") != "delta":
        raise RunError(
            f"this device holds a sub-model of width {width:g}, and this server sends whole models:"
            " use edgelearn's own loop, or set fleet.width to 1"
        )


def reply_content(metrics: Mapping[str, Any], arrays: ArrayRecord | None = None) -> RecordDict:
    """Return the content of a reply."""
    content = RecordDict({METRICS: MetricRecord(dict(metrics))})
    if arrays is not None:
        content[ARRAYS] = arrays
    return content


def metrics_of(message: Message) -> dict[str, Any]:
    """Return the metrics of a reply as plain values."""
    records = list(message.content.metric_records.values())
    return dict(records[0]) if records else {}


def num_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's content, as Flower counts them."""
    return sum(record.count_bytes() for record in content.values())


def as_local(layout: Layout, params: Tensor, delta: Tensor) -> ArrayRecord:
    """Return global + delta as the named arrays that Flower strategies aggregate."""
    return encode_params(layout, params + delta)
