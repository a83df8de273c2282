from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from edgelearn.errors import StateError
from edgelearn.files import digest_of, exclusive, read_checked, read_json, write_atomic


def test_write_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "state.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["state.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "state.bin"
    write_atomic(path, b"old")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.bin"]


def test_data_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda a, b: calls.append("replace") or replace(a, b)
    )
    write_atomic(tmp_path / "state.bin", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def test_read_checked(tmp_path):
    path = tmp_path / "state.bin"
    write_atomic(path, b"data")
    assert read_checked(path) == b"data"
    assert read_checked(path, digest_of(b"data")) == b"data"
    path.write_bytes(b"dat")
    with pytest.raises(StateError, match=r"damaged or truncated .3 bytes") as error:
        read_checked(path, digest_of(b"data"))
    assert str(path) in str(error.value)
    with pytest.raises(StateError, match=r"gone\.bin: the file is missing"):
        read_checked(tmp_path / "gone.bin")


def test_digests_differ_by_content():
    assert digest_of(b"") != digest_of(b"a")
    assert digest_of(b"a") != digest_of(b"b")
    assert len(digest_of(b"a")) == 32


def test_read_json(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, b'{"a": [1, 2.5]}')
    assert read_json(path) == {"a": [1, 2.5]}
    for damaged in (b'{"a": [1', b"", b"\xff\xfe"):
        write_atomic(path, damaged)
        with pytest.raises(StateError, match=r"x\.json: damaged or truncated, not JSON"):
            read_json(path)
    with pytest.raises(StateError, match="is missing"):
        read_json(tmp_path / "gone.json")


def test_a_folder_has_one_user_at_a_time(tmp_path):
    lock = tmp_path / "run" / "lock"
    with exclusive(lock, wait_s=0):
        refused = pytest.raises(StateError, match="run is in use by another process")
        with refused, exclusive(lock, wait_s=0):
            pass
        with exclusive(tmp_path / "other" / "lock", wait_s=0):
            pass
    with exclusive(lock, wait_s=0):
        pass


def test_a_lock_is_free_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock", wait_s=0):
        _ = 1 / 0
    with exclusive(tmp_path / "lock", wait_s=0):
        pass


HOLD = """
import sys, time
from pathlib import Path
from edgelearn.files import exclusive
with exclusive(Path(sys.argv[1]), wait_s=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_free_after_its_process_was_killed(tmp_path):
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(StateError, match="in use"), exclusive(lock, wait_s=0):
            pass
        process.kill()
    with exclusive(lock, wait_s=5):
        pass


def test_who_waits_gets_the_lock(tmp_path):
    lock = tmp_path / "lock"
    got = threading.Event()

    def wait():
        with exclusive(lock, wait_s=30):
            got.set()

    thread = threading.Thread(target=wait)
    with exclusive(lock, wait_s=0):
        thread.start()
        assert not got.wait(0.2)
    thread.join()
    assert got.is_set()
