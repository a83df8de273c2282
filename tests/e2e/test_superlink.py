"""A scenario on a real Flower SuperLink with two SuperNodes: separate processes, TLS, known keys.

The result must be that of the simulator. This takes minutes: Flower starts a process, with torch,
for every message to a device.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from edgelearn.deploy import commands
from edgelearn.deploy.deployment import CONNECTION, init_deployment
from edgelearn.device.profile import folder
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.load import load

BIN = Path(sys.executable).parent
CAPACITY = 8
BASE: dict[str, Any] = {
    "data.max_train": 200,
    "data.max_test": 60,
    "model.args": {"hidden": [16]},
    "fleet.num_devices": 2,
    "fleet.cohort": 2,
    "stream.num_experiences": 1,
    "stream.rounds_per_experience": 2,
    "client.strategy": "replay",
    "client.args": {"capacity": CAPACITY},
    "evaluate.every_rounds": 2,
}


class Fleet:
    """A SuperLink and its SuperNodes, and how to use them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port, *self.node_ports = free_ports(3)
        self.folder = init_deployment(
            root / "fleet", num_devices=2, hosts=["127.0.0.1"], port=self.port
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        (self.root / "server").mkdir()
        self.launch(
            "superlink",
            commands.superlink(
                secrets=self.folder / "superlink", state=self.root / "server", port=self.port
            ),
        )
        wait_until(self.answers, 120, "the SuperLink answers")
        for expected in ("device-0, device-1", "nothing new"):  # again is no error
            said = self.run(
                sys.executable, "-m", "edgelearn.deploy.register",
                "--keys", str(self.folder / "keys"),
                "--address", f"127.0.0.1:{self.port}",
                "--root-certificates", str(self.folder / "ca.crt"),
                "--home", str(self.root / "registrar"),
            )  # fmt: skip
            assert said.strip() == f"registered: {expected}"
        for device in range(2):
            self.start_node(device)

    def start_node(self, device: int) -> None:
        command = commands.supernode(
            device,
            secrets=self.folder / f"device-{device}",
            state=self.state(device),
            server=f"127.0.0.1:{self.port}",
            port=self.node_ports[device],
        )
        self.launch(f"device-{device}", command)

    def launch(self, name: str, command: list[str]) -> None:
        home = self.root / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=home,
                env=environment(home),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def answers(self) -> bool:
        assert self.processes["superlink"].poll() is None, "the SuperLink has ended"
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        with contextlib.suppress(OSError):
            url = f"https://127.0.0.1:{self.port}/health"
            with urllib.request.urlopen(url, timeout=5, context=context) as reply:
                return bool(reply.status == 200)
        return False

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=environment(self.folder / "flwr"), cwd=self.root,
            capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def flwr(self, *arguments: str) -> dict[str, Any]:
        out = self.run(str(BIN / "flwr"), *arguments, "--format", "json")
        found: dict[str, Any] = json.loads(out[out.index("{") :])
        return found

    def submit(self, overrides: dict[str, Any], out: Path) -> str:
        config = self.root / f"{out.name}.toml"
        config.write_text(
            f'scenario = "split-digits"\nout = "{out}"\nwait-s = 300.0\n'
            f"overrides = '{json.dumps(overrides)}'\n"
        )
        app = str(self.folder / "app")
        reply = self.flwr("run", app, CONNECTION, "--run-config", str(config))
        assert reply["success"], reply
        return str(reply["run-id"])

    def status(self, run: str) -> str:
        (row,) = self.flwr("ls", CONNECTION, "--run-id", run)["runs"]
        details = f" ({row['status-details']})" if "failed" in row["status"] else ""
        return f"{row['status']}{details}"

    def wait_for(self, run: str, wanted: str, out: Path, line: str) -> None:
        """Wait for a line in the record; or, where that does not come, for the end of the run."""
        asked = time.monotonic()

        def is_written() -> bool:
            nonlocal asked
            assert not self.ended(), f"{self.ended()} ended"
            if time.monotonic() - asked > 30:  # seldom: to ask costs seconds of processor time
                asked = time.monotonic()
                status = self.status(run)
                assert not status.startswith("finished") or status == wanted, status
            path = out / "record.jsonl"
            return path.is_file() and f'"kind":"{line}"'.encode() in path.read_bytes()

        wait_until(is_written, 900, f"the record of run {run} has a line {line!r}")

    def wait_for_status(self, run: str, wanted: str) -> None:
        wait_until(lambda: self.status(run).startswith("finished"), 120, f"run {run} has ended")
        assert self.status(run) == wanted

    def ended(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def state(self, device: int) -> Path:
        return self.root / "state" / f"device-{device}"

    def stored(self, device: int) -> dict[str, torch.Tensor]:
        return load_file(self.state(device) / "state.safetensors")

    def stop(self, name: str) -> None:
        """End a process as an operator would, and whatever it leaves behind."""
        process = self.processes.pop(name)
        family = descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(30)

    def stop_all(self) -> None:
        for name in reversed(list(self.processes)):
            self.stop(name)

    def logs(self) -> str:
        texts = []
        for path in sorted(self.root.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-60:]
            texts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(texts)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        **commands.ENVIRONMENT,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }


def descendants(pid: int) -> list[psutil.Process]:
    """Return a process and all below it; Flower puts its children into sessions of their own."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(
    condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.5
) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"waited {timeout_s:g} s in vain until {what}"
        time.sleep(every_s)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("superlink"))
    try:
        fleet.start()
        yield fleet
    except BaseException:
        print(fleet.logs())
        raise
    finally:
        fleet.stop_all()


@pytest.fixture
def fleet(started: Fleet) -> Iterator[Fleet]:
    """The fleet, with its logs shown where a test fails."""
    yield started
    print(started.logs())  # pytest shows what a failed test printed, and nothing of others


def check_same(overrides: dict[str, Any], out: Path, simulated: Path) -> None:
    """The network's run is the simulator's: final parameters to 1e-6, the record's counts exact."""
    expected = simulate(
        load("split-digits", overrides), out=simulated, engine="reference", federation="faithful"
    )
    record = RunRecord.read(out)
    ours, theirs = (load_file(run / "model.safetensors") for run in (out, simulated))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-6, name
    for kind, keys in {
        "start": ["accuracy"],
        "round": ["round", "position", "cohort", "outcomes", "problems", "accuracy"],
        "devices": ["position", "devices", "count", "served", "float"],
    }.items():
        for key in keys:
            found, wanted = (
                [line[key] for line in each.lines if line["kind"] == kind]
                for each in (record, expected)
            )
            assert found == wanted, (kind, key)
    assert repr(record.scores()) == repr(expected.scores())  # NaN, where one experience has none


@pytest.mark.slow
def test_a_network_of_processes_ends_where_the_simulator_does(fleet: Fleet, tmp_path: Path) -> None:
    out = fleet.root / "first"
    run = fleet.submit(BASE, out)
    fleet.wait_for(run, "finished:completed", out, "end")
    fleet.wait_for_status(run, "finished:completed")
    check_same(BASE, out, tmp_path / "simulated")
    for device in range(2):
        state = fleet.stored(device)
        used = state["samples.used"].bool()
        assert state["samples.x"].dtype == torch.uint8
        assert state["samples.x"][used].any()
        assert used.sum() == CAPACITY  # no more than declared ...
        assert not state["samples.x"][~used].any()  # ... the rest is erased
        assert not any(name.startswith("pending.") for name in state)


@pytest.mark.slow
def test_a_device_that_was_restarted_still_remembers(fleet: Fleet, tmp_path: Path) -> None:
    large, small = (tmp_path / f"{name}.toml" for name in ("large", "small"))
    for path in (large, small):
        path.write_text((folder() / "phone-mid.toml").read_text())
    overrides = BASE | {
        "fleet.profiles": {str(large): 1.0, str(small): 1.0},
        "fleet.width": {str(small): 0.5},
        "fleet.runtime_args": {str(small): {"weight_bits": 4}},
        "server.strategy": "HeteroFL",
        "stream.num_experiences": 2,
        "stream.rounds_per_experience": 1,
        "evaluate.every_rounds": 1,
        "seed": 1,
        "wire.codec": "top-k",
    }
    out = fleet.root / "second"
    run = fleet.submit(overrides, out)
    fleet.wait_for(run, "finished:completed", out, "devices")  # the first experience is over
    fleet.flwr("stop", run, CONNECTION)
    fleet.wait_for_status(run, "finished:stopped")
    fleet.stop("device-1")
    state = fleet.stored(1)
    assert state["progress"][1] == 1
    assert state["samples.used"].sum() >= CAPACITY
    assert state["memory.wire-residual"].any()
    held = [len(fleet.stored(device)["memory.wire-residual"]) for device in range(2)]
    assert sorted(held) == [610, 1210]  # 64 inputs, 16 hidden units or 8, 10 classes
    fleet.start_node(1)
    run = fleet.submit(overrides, out)  # the same run directory: the run goes on
    fleet.wait_for(run, "finished:completed", out, "end")
    fleet.wait_for_status(run, "finished:completed")
    check_same(overrides, out, tmp_path / "simulated")
