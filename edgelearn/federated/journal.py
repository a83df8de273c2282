"""What a run leaves behind, line by line and checkpoint by checkpoint: on disk or in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from edgelearn.errors import StateError
from edgelearn.federated.checkpoint import Checkpoint, CheckpointFolder
from edgelearn.federated.record import Line, RunRecord, encode_line, read_lines


class Journal(Protocol):
    """Where the round loop writes."""

    def append(self, line: Line) -> None:
        """Append a line to the record."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make everything up to here durable; the journal fills in the record's length."""

    def record(self) -> RunRecord:
        """Return the record so far."""


class MemoryJournal:
    """A journal for runs without a directory."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def append(self, line: Line) -> None:
        """Keep a line."""
        self._lines.append(line)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Nothing outlives the process."""

    def record(self) -> RunRecord:
        """Return the lines."""
        return RunRecord(tuple(self._lines))


class FileJournal:
    """The journal of a run directory: `record.jsonl` and `checkpoint/`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / "record.jsonl"
        self._folder = CheckpointFolder(directory / "checkpoint")

    def append(self, line: Line) -> None:
        """Append a line at once, so that a run that fails shows how far it came."""
        with self._path.open("ab") as file:
            file.write(encode_line(line))

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make the record durable, then replace the checkpoint."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
            length = file.tell()
        self._folder.save(
            Checkpoint(checkpoint.server_round, checkpoint.tensors, checkpoint.values, length)
        )

    def resume(self) -> Checkpoint | None:
        """Load the checkpoint and cut off what the record holds beyond it; None if none was made.

        Raises:
            StateError: If a file is damaged or missing.
        """
        if not self._folder.exists:
            self._path.unlink(missing_ok=True)
            return None
        checkpoint = self._folder.load()
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size < checkpoint.record_bytes:
            raise StateError(
                f"{self._path}: truncated: {size} bytes, the checkpoint was made at "
                f"{checkpoint.record_bytes}"
            )
        os.truncate(self._path, checkpoint.record_bytes)
        read_lines(self._path)  # damaged lines are named here, before any work is done
        return checkpoint

    def record(self) -> RunRecord:
        """Read the record back."""
        return RunRecord.read(self.directory)
