"""State of a simulated fleet: one memory-mapped file of fixed records, two generations each.

A device's state has a fixed size (the client strategy declares it), so a record has a place. Work
of the current transaction goes to the slot that is not live; `commit` makes it live. A crash
before the commit leaves the live slots as they were. Pages that no device touched cost no disk.

Which slot is live, and each record's checksum, are two small tables that belong into the run's
checkpoint; the file alone can't be read without them.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgelearn.continual.memory import Declaration, Memory
from edgelearn.device.learner import DeviceState
from edgelearn.errors import StateError
from edgelearn.scenario.samples import SampleStore

_ALIGN = 64
_HEADER = 2  # begun, consolidated: int64 each
UNWRITTEN = 255


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Places of the tensors in a record."""

    declaration: Declaration
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, declaration: Declaration) -> RecordLayout:
        """Lay the tensors of a declaration out, each aligned to a cache line."""
        offset, offsets = _ALIGN, []
        for spec in declaration.values():
            offsets.append(offset)
            offset += math.ceil(spec.stored_bytes / _ALIGN) * _ALIGN
        return cls(declaration, tuple(offsets), offset)


class RecordFile:
    """Reads and writes slots; any process that has the path can. Knows no transactions."""

    def __init__(self, path: Path, layout: RecordLayout, num_devices: int) -> None:
        self._layout, self._path = layout, path
        size = 2 * num_devices * layout.size
        with path.open("r+b") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise StateError(
                    f"{path}: damaged or of another run: {found} bytes, expected {size}"
                )
            self._map = mmap.mmap(file.fileno(), size)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    @staticmethod
    def create(path: Path, layout: RecordLayout, num_devices: int) -> None:
        """Create the file, sparse."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(2 * num_devices * layout.size)

    def read(self, device: int, slot: int, store: SampleStore | None) -> DeviceState:
        """Copy a state out."""
        record = self._record(device, slot)
        begun, consolidated = record[: 8 * _HEADER].view(np.int64).tolist()
        tensors = {}
        for (name, spec), offset in zip(
            self._layout.declaration.items(), self._layout.offsets, strict=True
        ):
            value = torch.empty(spec.shape, dtype=spec.dtype)
            raw = value.view(-1).view(torch.uint8).numpy()
            raw[:] = record[offset : offset + spec.stored_bytes]
            tensors[name] = value
        return DeviceState(Memory(tensors, store), begun, consolidated)

    def write(self, device: int, slot: int, state: DeviceState) -> int:
        """Write a state; return the record's checksum."""
        record = self._record(device, slot)
        record[: 8 * _HEADER].view(np.int64)[:] = (state.begun, state.consolidated)
        for (name, spec), offset in zip(
            self._layout.declaration.items(), self._layout.offsets, strict=True
        ):
            raw = state.memory[name].detach().contiguous().view(-1).view(torch.uint8)
            record[offset : offset + spec.stored_bytes] = raw.numpy()
        return self.checksum(device, slot)

    def checksum(self, device: int, slot: int) -> int:
        """Return the checksum of a record as it is now."""
        return zlib.crc32(self._record(device, slot).data)

    def sync(self) -> None:
        """Make what was written durable."""
        self._map.flush()

    def _record(self, device: int, slot: int) -> NDArray[np.uint8]:
        start = (2 * device + slot) * self._layout.size
        return self._bytes[start : start + self._layout.size]


class FleetStore:
    """The transactions over a `RecordFile`; lives in one process."""

    def __init__(
        self,
        path: Path,
        declaration: Declaration,
        num_devices: int,
        tables: tuple[NDArray[np.uint8], NDArray[np.uint32]] | None = None,
    ) -> None:
        """Open the store, or create it where there are no tables of an earlier checkpoint.

        Raises:
            StateError: If the file is missing, truncated or damaged; the device is named.
        """
        self.path, self.layout = path, RecordLayout.of(declaration)
        self._touched: set[int] = set()
        if tables is None:
            RecordFile.create(path, self.layout, num_devices)
            self._live = np.full(num_devices, UNWRITTEN, dtype=np.uint8)
            self._checksums = np.zeros(num_devices, dtype=np.uint32)
        else:
            self._live, self._checksums = tables[0].copy(), tables[1].copy()
            if not len(self._live) == len(self._checksums) == num_devices:
                raise StateError(
                    f"{path}: the checkpoint has {len(self._live)} devices, the fleet {num_devices}"
                )
        if not path.is_file():
            raise StateError(f"{path}: the file with the devices' state is missing")
        self.file = RecordFile(path, self.layout, num_devices)
        self._pending = self._checksums.copy()
        for device in np.flatnonzero(self._live != UNWRITTEN).tolist():
            found = self.file.checksum(device, int(self._live[device]))
            if found != self._checksums[device]:
                raise StateError(
                    f"{path}: the state of device {device} is damaged (checksum {found:08x}, "
                    f"expected {int(self._checksums[device]):08x})"
                )

    def slots(self, device: int) -> tuple[int, int]:
        """Return the slot to read (UNWRITTEN if none) and the slot to write."""
        live = int(self._live[device])
        spare = 0 if live == UNWRITTEN else 1 - live
        return (spare, spare) if device in self._touched else (live, spare)

    def written(self, device: int, checksum: int) -> None:
        """Note that the spare slot of a device holds its new state."""
        self._touched.add(device)
        self._pending[device] = checksum

    def revert(self, device: int) -> None:
        """Go back to a device's live state: its spare slot may be torn."""
        self._touched.discard(device)
        self._pending[device] = self._checksums[device]

    def commit(self) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Make the new states live and durable; return the tables for the checkpoint."""
        if self._touched:
            self.file.sync()
        for device in self._touched:
            self._live[device] = self.slots(device)[1]
        self._touched.clear()
        self._checksums = self._pending.copy()
        return self._live.copy(), self._checksums.copy()
