"""An interrupted run, resumed, ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelearn.device.fleet_store import RecordFile
from edgelearn.errors import RunError, StateError
from edgelearn.federated import checkpoint as checkpoint_module
from edgelearn.federated import rundir
from edgelearn.federated.journal import FileJournal
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.load import to_toml
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]
TIMES = {"wall_s", "cpu_s", "updates_per_s"}


def result(directory: Path) -> tuple[bytes, list[dict[str, object]]]:
    """The final parameters, and the record without what may differ: times and engine."""
    lines = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in line.items() if k not in TIMES | {"engine"}} for line in lines]
    return (directory / "model.safetensors").read_bytes(), plain


class Crash(BaseException):
    """Stands for the death of the process: nothing that handles errors may see it."""


class CrashAt:
    """Lets the n-th dangerous operation crash, before or after it took place."""

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, 0

    def wrap(self, function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.seen += 1
            if self.seen == self.number:
                raise Crash
            out = function(*args, **kwargs)
            self.seen += 1
            if self.seen == self.number:
                raise Crash
            return out

        return wrapped

    def install(self, patch: pytest.MonkeyPatch) -> None:
        places = [
            (RecordFile, "write"),
            (RecordFile, "sync"),
            (FileJournal, "append"),
            (checkpoint_module, "write_atomic"),
            (rundir, "write_atomic"),
        ]
        for owner, name in places:
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))


@pytest.mark.parametrize("server", ["FedAvg", "FedAdam"])
def test_a_crash_at_any_operation_changes_nothing(small: Make, tmp_path: Path, server: str) -> None:
    scenario = small(server={"strategy": server})
    simulate(scenario, out=tmp_path / "whole", checkpoint_every_s=0)
    expected = result(tmp_path / "whole")
    crashes, number = 0, 1
    while True:
        directory = tmp_path / f"crash-{number}"
        with pytest.MonkeyPatch.context() as patch:
            crash = CrashAt(number)
            crash.install(patch)
            try:
                simulate(scenario, out=directory, checkpoint_every_s=0)
                break  # beyond the last operation: nothing crashed
            except Crash:
                crashes += 1
        if (directory / "scenario.toml").is_file():
            resume(directory, checkpoint_every_s=0)
            assert result(directory) == expected, f"operation {number}"
        number += 3 if server == "FedAvg" else 7  # every kind of operation, in every round
    assert crashes > 8


@pytest.mark.slow
def test_kill_9_of_a_real_process(small: Make, tmp_path: Path) -> None:
    scenario = small(stream={"num_experiences": 3, "rounds_per_experience": 4})
    simulate(scenario, out=tmp_path / "whole", engine="reference")
    file = tmp_path / "scenario.toml"
    file.write_text(to_toml(scenario))
    directory = tmp_path / "killed"
    command = [sys.executable, "-m", "edgelearn.cli", "run", str(file), "--out", str(directory)]
    killed = 0
    for num_lines in (2, 8):
        process = start([*command, "--checkpoint-every", "0", "--engine", "pool"])
        wait_for_lines(directory / "record.jsonl", num_lines, process)
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        command = [sys.executable, "-m", "edgelearn.cli", "run", "--resume", str(directory)]
    assert killed == 2
    final = subprocess.run(command, capture_output=True, text=True, check=False)
    assert final.returncode == 0, final.stderr
    assert result(directory) == result(tmp_path / "whole")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for_lines(path: Path, num_lines: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if path.is_file() and path.read_bytes().count(b"\n") >= num_lines:
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError(f"{path} never had {num_lines} lines")


@pytest.fixture
def interrupted(small: Make, tmp_path: Path) -> Path:
    """A run that stopped after its second round."""
    directory = tmp_path / "run"

    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 3:
            raise Crash

    with pytest.raises(Crash):
        simulate(small(), out=directory, on_round=stop, checkpoint_every_s=0)
    return directory


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("devices.bin", "truncate", "devices.bin: damaged or of another run"),
        ("devices.bin", "flip", "the state of device"),
        ("devices.bin", "delete", "devices.bin: the file with the devices' state is missing"),
        ("checkpoint/checkpoint.json", "truncate", "checkpoint.json: damaged or truncated"),
        ("record.jsonl", "truncate", "record.jsonl: truncated"),
        ("record.jsonl", "flip", "record.jsonl, line 1: damaged"),
        ("scenario.toml", "delete", "there is no run here"),
        ("scenario.toml", "edit", "was changed since the run began"),
    ],
)
def test_damage_is_named(interrupted: Path, name: str, damage: str, message: str) -> None:
    harm(interrupted / name, damage)
    with pytest.raises(StateError, match=message.replace(".", r"\.")) as caught:
        resume(interrupted)
    assert str(interrupted) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_named(interrupted: Path, damage: str) -> None:
    index = json.loads((interrupted / "checkpoint" / "checkpoint.json").read_text())
    harm(interrupted / "checkpoint" / index["file"], damage)
    with pytest.raises(StateError, match=index["file"].replace(".", r"\.")):
        resume(interrupted)


def harm(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "edit":
        path.write_text(path.read_text().replace("lr = 0.2", "lr = 0.3"))
    elif path.name == "devices.bin":  # one bit of each byte in use: some belong to spare slots
        path.write_bytes(bytes(byte ^ 1 if byte else 0 for byte in data))
    else:
        path.write_bytes(bytes([data[0] ^ 255]) + data[1:])


def test_a_complete_run_is_left_alone(small: Make, tmp_path: Path) -> None:
    simulate(small(), out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert resume(tmp_path / "run").is_complete
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_directory_in_use_is_left_alone(small: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        simulate(small(), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
