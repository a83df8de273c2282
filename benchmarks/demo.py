"""The demo's cost, and that of the same scenario through Flower's own Ray simulation.

Runs `edgelearn run split-digits` and Flower's simulation with edgelearn's ClientApp in turn, as
whole processes, and writes docs/benchmarks.md. Repeat: make bench, or
python benchmarks/demo.py --runs 5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

import edgelearn
from edgelearn.federated.record import RunRecord

ROOT = Path(__file__).parents[1]
PEER = Path(__file__).with_name("flower_ray.py")
SCENARIO = "split-digits"


@dataclass(frozen=True)
class Cost:
    """What one whole process tree cost.

    `first_round_s` and `wall_s` count from the start of the process; `peak_mib` is the largest sum
    of proportional set sizes (PSS) over the tree, sampled.
    """

    first_round_s: float
    wall_s: float
    cpu_s: float
    peak_mib: float
    correct: tuple[int, ...]


class Tree:
    """Samples memory and CPU of a process tree until it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.root = psutil.Process(process.pid)
        self.peak_mib = 0.0
        self.cpu: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            total = 0
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

    def end(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()


def run(command: list[str], out: Path) -> Cost:
    """Run a command that prints a line with "round <n>/" after each round."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_DEDUP_LOGS": "0"},
    )
    tree = Tree(process)
    first, tail = float("nan"), []
    assert process.stderr is not None
    for line in process.stderr:
        tail = [*tail[-30:], line]
        if re.search(r"round +1/", line) and first != first:
            first = time.perf_counter() - started
    code = process.wait()
    wall = time.perf_counter() - started
    tree.end()
    if code != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{''.join(tail)}")
    record = RunRecord.read(out)
    correct = tuple(record.rounds[-1]["accuracy"]["float"])
    return Cost(first, wall, sum(tree.cpu.values()), tree.peak_mib, correct)


def ours(folder: Path) -> Cost:
    out = folder / "ours"
    binary = str(Path(sys.executable).with_name("edgelearn"))
    return run([binary, "run", SCENARIO, "--out", str(out)], out)


def peer(folder: Path) -> Cost:
    out = folder / "peer"
    return run([sys.executable, str(PEER), SCENARIO, str(out), str(folder / "state")], out)


def median(costs: list[Cost], field: str) -> float:
    return statistics.median(getattr(cost, field) for cost in costs)


def spread(costs: list[Cost], field: str) -> str:
    values = [getattr(cost, field) for cost in costs]
    return f"{min(values):.1f} - {max(values):.1f}"


def measure(runs: int) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {"edgelearn": [], "flower-ray": []}
    for number in range(runs):
        for name, function in (("edgelearn", ours), ("flower-ray", peer)):
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(function(Path(folder)))
            print(name, number + 1, found[name][-1], flush=True)
    answers = {cost.correct for costs in found.values() for cost in costs}
    if len(answers) != 1:
        raise SystemExit(f"the two simulations disagree: {answers}")
    return found


TARGETS = {"first_round_s": 6.0, "peak_mib": 700.0}
ROWS = (
    ("first_round_s", "command to the end of the first round, s (wall)"),
    ("wall_s", "whole run, s (wall)"),
    ("cpu_s", "whole run, s (CPU, all processes)"),
    ("peak_mib", "peak memory of the process tree, MiB (PSS)"),
)


PAGE = """# Benchmarks

Every figure here was written by `make bench` (`benchmarks/demo.py`): whole processes, both in turn
in one run, medians (and ranges). Timings on shared machines are noisy: the ratio is the result.

## The demo, and the same scenario through Flower's Ray simulation

`{scenario}`: 30 devices, cohort 10, 30 rounds, all devices evaluated after each round (int8 and
float), consolidation of all devices after each experience. The peer is
`flwr.simulation.run_simulation` (Ray, one CPU per client, 2 actors) with edgelearn's own ClientApp
and round loop: the same messages, work and results, but a Ray call for each message, and each
device's state in a durable file of its own, as on a real device. Both end with the same accuracy
counts, which the script checks.

| | edgelearn | Flower/Ray | ratio | target |
|---|---|---|---|---|
{rows}

{runs} runs each; {machine}, {cores} cores, Python {python}, {versions},
edgelearn {edgelearn}, seed 0.

<details><summary>All runs</summary>

```json
{record}
```

</details>
"""


def page(found: dict[str, list[Cost]]) -> str:
    a, b = found["edgelearn"], found["flower-ray"]
    rows = []
    for field, name in ROWS:
        target = f"under {TARGETS[field]:g}" if field in TARGETS else ""
        rows.append(
            f"| {name} | {median(a, field):.1f} ({spread(a, field)}) "
            f"| {median(b, field):.1f} ({spread(b, field)}) "
            f"| {median(b, field) / median(a, field):.1f} x | {target} |"
        )
    return PAGE.format(
        scenario=SCENARIO,
        rows="\n".join(rows),
        runs=len(a),
        machine=platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        versions=versions(),
        edgelearn=edgelearn.__version__,
        record=json.dumps({k: [asdict(c) for c in v] for k, v in found.items()}),
    )


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "ray", "numpy"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    options.write.write_text(page(measure(options.runs)))
    print(options.write)
