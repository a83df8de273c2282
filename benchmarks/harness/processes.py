"""Children: started, watched (memory and CPU of the whole process tree) and read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.paths import BENCH, PEERS, ROOT

_SHARE = 20  # the watcher sleeps this many times as long as a sample took: at most 5 % of a core


class Tree:
    """Samples memory (PSS) and CPU of a process tree until it ends."""

    def __init__(self, pid: int, *, interval_s: float = 0.1, gentle: bool = False) -> None:
        self.root = psutil.Process(pid)
        self.peak_mib = 0.0
        self.cpu: dict[int, float] = {}
        self._interval_s, self._gentle = interval_s, gentle
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        pause = self._interval_s
        while not self._stop.wait(pause):
            started, total = time.perf_counter(), 0
            try:
                processes = [self.root, *self.root.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                    used = process.cpu_times()
                    self.cpu[process.pid] = used.user + used.system
                except psutil.Error:
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
            if self._gentle:
                pause = max(self._interval_s, _SHARE * (time.perf_counter() - started))

    def end(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True)
class Ended:
    """What a child left behind.

    Attributes:
        result: What it wrote; None if it failed.
        error: The tail of its output if it failed.
        peak_mib: Largest sampled sum of PSS over its process tree.
        wall_s: From start to end.
    """

    result: dict[str, Any] | None
    error: str
    peak_mib: float
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the result with the parent's observations, or the error."""
        if self.result is None:
            return {"error": self.error}
        return {**self.result, "peak_mib": self.peak_mib, "process_s": self.wall_s}


def own_environment() -> dict[str, str]:
    """Return the environment of a child that runs edgelearn."""
    path = os.pathsep.join([str(BENCH), str(PEERS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def peer_environment() -> dict[str, str]:
    """Return the environment of a child that runs a peer: nothing of edgelearn is in reach."""
    return {
        **{k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONHOME")},
        "PYTHONPATH": str(PEERS),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }


def run_child(
    command: Sequence[str],
    argument: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    timeout_s: float = 900.0,
    interval_s: float = 0.3,
    gentle: bool = True,
) -> Ended:
    """Run a child: its argument and the place of its result go through the environment."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        asked = Path(folder) / "argument.json"
        asked.write_text(json.dumps(argument))
        started = time.perf_counter()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **environment,
                    "BENCH_ARGUMENT": str(asked),
                    "BENCH_RESULT": str(out),
                    "BENCH_STARTED": repr(time.time()),
                },
            )
            tree = Tree(process.pid, interval_s=interval_s, gentle=gentle)
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # what the child left running, too
                process.wait()
            tree.end()
        wall_s = time.perf_counter() - started
        if code != 0 or not out.is_file():
            text = log.read_text(errors="replace")[-2000:]
            what = "timed out" if code is None else f"ended with {code}"
            return Ended(None, f"{what}: {text}", tree.peak_mib, wall_s)
        return Ended(json.loads(out.read_text()), "", tree.peak_mib, wall_s)
