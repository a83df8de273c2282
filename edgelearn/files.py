"""Files that are either whole or absent: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgelearn.errors import StateError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; a crash leaves the old file or the new one, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold a lock file, which other processes of this machine respect; its content means nothing.

    Raises:
        StateError: If another process still holds it after `wait_s`.
    """
    import fcntl  # here, because there is none on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise StateError(f"{path.parent} is in use by another process") from None
                time.sleep(0.05)
        yield  # the system releases the lock when the file is closed, however the process ends


def digest_of(data: bytes) -> str:
    """Return the fingerprint that edgelearn stores beside a file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_checked(path: Path, digest: str | None = None) -> bytes:
    """Read a file, and check it against its fingerprint where one is known.

    Raises:
        StateError: If the file is missing, can't be read, or differs from what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"{path}: the file is missing") from None
    except OSError as error:  # a folder, no permission, ...
        raise StateError(f"{path}: cannot be read: {error.strerror}") from error
    if digest is not None and digest_of(data) != digest:
        raise StateError(
            f"{path}: damaged or truncated ({len(data)} bytes with fingerprint "
            f"{digest_of(data)}, expected {digest})"
        )
    return data


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StateError: If it is missing or is not JSON.
    """
    data = read_checked(path)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StateError(f"{path}: damaged or truncated, not JSON: {error}") from error
