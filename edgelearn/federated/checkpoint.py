"""Checkpoints: global parameters, the server strategy's state, and how far the record went.

Two generations of files and one small index, which is replaced last and atomically: at any instant
the index names files that are whole. A damaged file is named, never half-read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edgelearn.errors import StateError
from edgelearn.files import digest_of, read_checked, read_json, write_atomic

_FORMAT = "edgelearn-checkpoint-1"
_FILES = ("state-a.safetensors", "state-b.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a run needs to go on, besides its scenario and the devices' own state.

    Attributes:
        server_round: The last round that is complete; 0 before the first.
        tensors: Global parameters, the strategy's arrays, tables of the fleet.
        values: Plain values: the strategy's, clock, counters.
        record_bytes: Length of the record that belongs to this checkpoint.
    """

    server_round: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    record_bytes: int


class CheckpointFolder:
    """The folder `checkpoint/` of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = folder / "checkpoint.json"

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint."""
        return self._index.is_file()

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; a crash leaves the former one whole."""
        current = read_json(self._index).get("file") if self.exists else None
        name = _FILES[1] if current == _FILES[0] else _FILES[0]  # never the one in use
        data = save({k: v.contiguous() for k, v in checkpoint.tensors.items()})
        write_atomic(self._folder / name, data)
        index = {
            "format": _FORMAT,
            "round": checkpoint.server_round,
            "file": name,
            "fingerprint": digest_of(data),
            "values": dict(checkpoint.values),
            "record_bytes": checkpoint.record_bytes,
        }
        write_atomic(self._index, json.dumps(index, indent=1).encode())

    def load(self) -> Checkpoint:
        """Load the checkpoint.

        Raises:
            StateError: If it is missing or damaged; the file is named.
        """
        index = read_json(self._index)
        try:
            if index["format"] != _FORMAT:
                raise StateError(f"{self._index}: format {index['format']!r}, not {_FORMAT!r}")
            path = self._folder / index["file"]
            data = read_checked(path, index["fingerprint"])
            return Checkpoint(index["round"], load(data), index["values"], index["record_bytes"])
        except (KeyError, TypeError) as error:
            raise StateError(f"{self._index}: damaged: {error!r} is missing") from error
        except SafetensorError as error:
            raise StateError(f"{path}: damaged: {error}") from error


def as_tensors(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return NumPy arrays as tensors with prefixed names."""
    return {f"{prefix}{name}": torch.as_tensor(array) for name, array in arrays.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors of one prefix as NumPy arrays, names without it."""
    return {
        name.removeprefix(prefix): tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
