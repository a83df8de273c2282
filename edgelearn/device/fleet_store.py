"""State of a simulated fleet: one memory-mapped file of fixed records, two generations each.

A device's state has a fixed size (the client strategy declares it), so a record has a place. Work
of the current transaction goes to the slot that is not live; `commit` makes it live. A crash
before the commit leaves the live slots as they were. Pages that no device touched cost no disk.

Which slot is live, each record's checksum and how far each device is in its stream are small
tables that belong into the run's checkpoint; the file alone can't be read without them. Training
that leaves a device's memory as it was only moves the device on: its record stays where it is.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec, kept
from edgelearn.errors import StateError
from edgelearn.scenario.samples import SampleStore

_ALIGN = 64
UNWRITTEN = 255


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Places of the tensors in a record.

    Attributes:
        declaration: What is kept.
        passing: What else belongs to a memory: zeros when it is read.
        offsets: Where each tensor that is kept begins, in bytes.
        size: Bytes of a record.
    """

    declaration: Declaration
    passing: Declaration
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, declaration: Declaration, *, record_bytes: int = 0) -> RecordLayout:
        """Lay out what a declaration says is kept, each tensor aligned to a cache line.

        Args:
            declaration: What a device remembers.
            record_bytes: Least size of a record, where others in the same file have larger ones.
        """
        stored = kept(declaration)
        offset, offsets = 0, []
        for spec in stored.values():
            offsets.append(offset)
            offset += math.ceil(spec.stored_bytes / _ALIGN) * _ALIGN
        rest = {name: spec for name, spec in declaration.items() if name not in stored}
        return cls(stored, rest, tuple(offsets), max(offset, record_bytes, _ALIGN))


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

    def read(self, device: int, slot: int, store: SampleStore | None) -> Memory:
        """Copy a memory out."""
        record = self._record(device, slot)
        tensors = {name: spec.initial() for name, spec in self._layout.passing.items()}
        for (name, spec), offset in zip(
            self._layout.declaration.items(), self._layout.offsets, strict=True
        ):
            value = torch.empty(spec.shape, dtype=spec.dtype)
            raw = value.view(-1).view(torch.uint8).numpy()
            raw[:] = record[offset : offset + spec.stored_bytes]
            tensors[name] = value
        return Memory(tensors, store)

    def write(self, device: int, slot: int, memory: Memory) -> int:
        """Write a memory; return the record's checksum."""
        record = self._record(device, slot)
        for (name, spec), offset in zip(
            self._layout.declaration.items(), self._layout.offsets, strict=True
        ):
            raw = memory[name].detach().contiguous().view(-1).view(torch.uint8)
            record[offset : offset + spec.stored_bytes] = raw.numpy()
        return self.checksum(device, slot)

    def rewrite(
        self, device: int, read_slot: int, write_slot: int, tensors: Mapping[str, Tensor]
    ) -> int:
        """Write a memory that differs in some tensors from the one in another slot.

        Args:
            device: Whose it is.
            read_slot: Where the rest is; UNWRITTEN for the initial memory.
            write_slot: Where it goes; may be the same.
            tensors: What is new, by name.

        Returns:
            The record's checksum.
        """
        record = self._record(device, write_slot)
        if read_slot == UNWRITTEN:
            initial = {name: s.initial() for name, s in self._layout.declaration.items()}
            return self.write(device, write_slot, Memory({**initial, **tensors}))
        if read_slot != write_slot:
            record[:] = self._record(device, read_slot)
        for name, value in tensors.items():
            spec, offset = self._place(name)
            raw = value.detach().contiguous().view(-1).view(torch.uint8)
            record[offset : offset + spec.stored_bytes] = raw.numpy()
        return self.checksum(device, write_slot)

    def get(self, device: int, slot: int) -> bytes:
        """Return a record as it lies in the file."""
        return self._record(device, slot).tobytes()

    def put(self, device: int, slot: int, record: bytes) -> int:
        """Write what `get` returned; return the record's checksum."""
        self._record(device, slot)[:] = np.frombuffer(record, np.uint8)
        return zlib.crc32(record)

    def gather(
        self, name: str, devices: NDArray[np.int64], slots: NDArray[np.int64], *, fill: int
    ) -> NDArray[Any]:
        """Copy one tensor of many memories out [K, ...]; `fill` where none was written."""
        spec, offset = self._place(name)
        is_written = slots != UNWRITTEN
        records = 2 * devices + np.where(is_written, slots, 0)
        table = self._bytes.reshape(-1, self._layout.size)
        raw = table[records, offset : offset + spec.stored_bytes]
        kind = torch.empty(0, dtype=spec.dtype).numpy().dtype
        values = raw.view(kind).reshape(len(devices), *spec.shape)
        values[~is_written] = fill
        return values

    def addresses(
        self, name: str, devices: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """Return where one tensor of many memories lies in this process; 0 where unwritten."""
        _, offset = self._place(name)
        records = 2 * devices + slots
        places = self._bytes.ctypes.data + records * self._layout.size + offset
        return np.where(slots == UNWRITTEN, 0, places).astype(np.uint64)

    def _place(self, name: str) -> tuple[TensorSpec | SampleSpec, int]:
        index = list(self._layout.declaration).index(name)
        return self._layout.declaration[name], self._layout.offsets[index]

    def checksum(self, device: int, slot: int) -> int:
        """Return the checksum of a record as it is now."""
        return zlib.crc32(self._record(device, slot).data)

    def sync(self) -> None:
        """Make what was written durable."""
        self._map.flush()

    def _record(self, device: int, slot: int) -> NDArray[np.uint8]:
        start = (2 * device + slot) * self._layout.size
        return self._bytes[start : start + self._layout.size]


class Tables(NamedTuple):
    """What a checkpoint has to hold.

    Attributes:
        live: Live slot of each device [N], or UNWRITTEN.
        checksums: Of the live records [N].
        progress: Experiences begun and consolidated [N, 2].
    """

    live: NDArray[np.uint8]
    checksums: NDArray[np.uint32]
    progress: NDArray[np.int32]

    def copy(self) -> Tables:
        """Return copies of all three."""
        return Tables(self.live.copy(), self.checksums.copy(), self.progress.copy())


class FleetStore:
    """The transactions over a `RecordFile`; lives in one process."""

    def __init__(
        self,
        path: Path,
        declaration: Declaration,
        num_devices: int,
        tables: Tables | None = None,
        *,
        record_bytes: int = 0,
    ) -> None:
        """Open the store, or create it where there are no tables of an earlier checkpoint.

        Args:
            path: The file.
            declaration: What a device remembers.
            num_devices: Devices in the fleet.
            tables: Of the checkpoint.
            record_bytes: Least size of a record, where some devices need more.

        Raises:
            StateError: If the file is missing, truncated or damaged; the device is named.
        """
        self.path = path
        self.layout = RecordLayout.of(declaration, record_bytes=record_bytes)
        self._touched: set[int] = set()
        if tables is None:
            RecordFile.create(path, self.layout, num_devices)
            self._tables = Tables(
                np.full(num_devices, UNWRITTEN, dtype=np.uint8),
                np.zeros(num_devices, dtype=np.uint32),
                np.zeros((num_devices, 2), dtype=np.int32),
            )
        else:
            self._tables = tables.copy()
            if not all(len(table) == num_devices for table in tables):
                raise StateError(
                    f"{path}: the checkpoint has {len(tables.live)} devices, the fleet "
                    f"{num_devices}"
                )
        if not path.is_file():
            raise StateError(f"{path}: the file with the devices' state is missing")
        self.file = RecordFile(path, self.layout, num_devices)
        live, checksums, _ = self._tables
        for device in np.flatnonzero(live != UNWRITTEN).tolist():
            found = self.file.checksum(device, int(live[device]))
            if found != checksums[device]:
                raise StateError(
                    f"{path}: the state of device {device} is damaged (checksum {found:08x}, "
                    f"expected {int(checksums[device]):08x})"
                )
        self._pending = self._tables.copy()

    @property
    def progress(self) -> NDArray[np.int32]:
        """Experiences that each device has begun and consolidated [N, 2], as of now."""
        return self._pending.progress

    def slots(self, device: int) -> tuple[int, int]:
        """Return the slot to read (UNWRITTEN if none) and the slot to write."""
        live = int(self._tables.live[device])
        spare = 0 if live == UNWRITTEN else 1 - live
        return (spare, spare) if device in self._touched else (live, spare)

    def slots_of(self, devices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return what `slots` returns for many devices."""
        live = self._tables.live[devices].astype(np.int64)
        spare = np.where(live == UNWRITTEN, 0, 1 - live)
        if self._touched:
            touched = np.array([int(device) in self._touched for device in devices], bool)
            live = np.where(touched, spare, live)
        return live, spare

    def written(self, device: int, checksum: int) -> None:
        """Note that the spare slot of a device holds its new memory."""
        self._touched.add(device)
        self._pending.checksums[device] = checksum

    def revert(self, device: int) -> None:
        """Go back to a device's live state: its spare slot may be torn."""
        self._touched.discard(device)
        self._pending.checksums[device] = self._tables.checksums[device]
        self._pending.progress[device] = self._tables.progress[device]

    def commit(self) -> Tables:
        """Make the new states live and durable; return the tables for the checkpoint."""
        if self._touched:
            self.file.sync()
        for device in self._touched:
            self._pending.live[device] = self.slots(device)[1]
        self._touched.clear()
        self._tables = self._pending.copy()
        return self._tables.copy()
