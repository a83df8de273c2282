"""State of one real device: a directory with one file that is either whole or the former one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edgelearn.continual.memory import Declaration, Memory, check
from edgelearn.device.learner import DeviceState
from edgelearn.errors import StateError
from edgelearn.files import write_atomic
from edgelearn.scenario.samples import Encoding, OwnedSamples

_FORMAT = "edgelearn-device-1"


@dataclass(frozen=True, slots=True)
class Stored:
    """A device's state with the samples that it keeps, and where it is in its stream.

    Attributes:
        state: Memory and progress.
        samples: The device's own samples.
        current_ids: Ids of the samples of the current experience [n], int32.
    """

    state: DeviceState
    samples: OwnedSamples
    current_ids: torch.Tensor


class DeviceStore:
    """Durable state of one device, bound to the scenario that it belongs to."""

    def __init__(self, directory: Path, *, digest: str) -> None:
        self._path, self._digest = directory / "state.safetensors", digest

    def save(self, stored: Stored) -> None:
        """Replace the stored state; a crash leaves the former one."""
        tensors = {f"memory.{name}": value for name, value in stored.state.memory.items()}
        tensors["samples.x"] = stored.samples.x
        tensors["samples.y"] = stored.samples.y
        tensors["samples.used"] = stored.samples.used.to(torch.uint8)
        tensors["current"] = stored.current_ids
        progress = [stored.state.begun, stored.state.consolidated]
        tensors["progress"] = torch.tensor(progress, dtype=torch.int64)
        # Copies: safetensors refuses tensors that share memory, which a strategy's may.
        tensors = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        metadata = {"format": _FORMAT, "digest": self._digest, "checksum": _checksum(tensors)}
        write_atomic(self._path, save(tensors, metadata))

    def load(self, declaration: Declaration, encoding: Encoding) -> Stored | None:
        """Load the state, or None if this device has none yet.

        Raises:
            StateError: If it is damaged, or belongs to another scenario.
        """
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self._path}: damaged or truncated: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise StateError(f"{self._path}: not the state of a device ({_FORMAT} expected)")
        if metadata.get("digest") != self._digest:
            raise StateError(
                f"{self._path}: the state belongs to the scenario {metadata.get('digest')}, "
                f"this run's is {self._digest}"
            )
        if metadata.get("checksum") != _checksum(tensors):
            raise StateError(f"{self._path}: damaged: its checksum is not that of its content")
        samples = OwnedSamples.restore(
            tensors["samples.x"], tensors["samples.y"], tensors["samples.used"], encoding
        )
        memory = Memory(
            {k.removeprefix("memory."): v for k, v in tensors.items() if k.startswith("memory.")},
            samples,
        )
        check(memory, declaration)
        begun, consolidated = tensors["progress"].tolist()
        return Stored(DeviceState(memory, begun, consolidated), samples, tensors["current"])


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the checksum of all tensors; safetensors itself notices only a wrong length."""
    checksum = 0
    for name in sorted(tensors):
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(raw, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
