"""The demo's cost, and that of the same scenario through Flower's own Ray simulation.

Runs `edgelearn run split-digits` and Flower's simulation with edgelearn's ClientApp in turn, as
whole processes, stores benchmarks/results/demo.json and rewrites docs/benchmarks.md. Repeat:
make bench, or python benchmarks/demo.py --runs 5.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import machine, results
from harness.paths import RESULTS
from harness.processes import Tree

from edgelearn.federated.record import RunRecord

PEER = Path(__file__).with_name("flower_ray.py")
SCENARIO = "split-digits"
OURS, PEER_NAME = "edgelearn", "flower-ray"


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
    tree = Tree(process.pid)
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


def measure(runs: int) -> dict[str, Any]:
    """Let both take turns; they must end with the same counts."""
    turns = []
    for number in range(runs):
        found = {}
        before = machine.load()
        for name, function in ((OURS, ours), (PEER_NAME, peer)):
            with tempfile.TemporaryDirectory() as folder:
                found[name] = asdict(function(Path(folder)))
            results.say(f"{name} {number + 1}: {found[name]}")
        turns.append({"load": [before, machine.load()], "runs": found})
    answers = {tuple(cost["correct"]) for turn in turns for cost in turn["runs"].values()}
    if len(answers) != 1:
        raise SystemExit(f"the two simulations disagree: {answers}")
    config = {
        "scenario": SCENARIO,
        "peers": {"flower": {name: version(name) for name in ("flwr", "ray", "torch")}},
        "command": "python benchmarks/demo.py",
    }
    return {"part": "demo", **machine.describe(), "config": config, "turns": turns, "skipped": {}}


TARGETS = {"first_round_s": 6.0, "peak_mib": 700.0}
ROWS = (
    ("first_round_s", "command to the end of the first round, s (wall)"),
    ("wall_s", "whole run, s (wall)"),
    ("cpu_s", "whole run, s (CPU, all processes)"),
    ("peak_mib", "peak memory of the process tree, MiB (PSS)"),
)


PAGE = """\
`{scenario}`: 30 devices, cohort 10, 30 rounds, all devices evaluated after each round (int8 and
float), consolidation of all devices after each experience. The peer is
`flwr.simulation.run_simulation` (Ray, one CPU per client, 2 actors) with edgelearn's own ClientApp
and round loop: the same messages, work and results, but a Ray call for each message, and each
device's state in a durable file of its own, as on a real device. Both end with the same accuracy
counts, which the script checks.

| | edgelearn | Flower/Ray | ratio | target | |
|---|---|---|---|---|---|
{rows}"""


def section(result: dict[str, Any]) -> str:
    """Return the demo's table."""
    rows = []
    for field, name in ROWS:
        cells = []
        for engine in (OURS, PEER_NAME):
            found = results.values(result, engine, field)
            cells.append(f"{results.median(found):.1f} ({min(found):.1f} - {max(found):.1f})")
        times = results.ratio(result, field, PEER_NAME, OURS)
        target, verdict = "", ""
        if field in TARGETS:
            target = f"under {TARGETS[field]:g}"
            middle = results.median(results.values(result, OURS, field)) or float("inf")
            verdict = "met" if middle < TARGETS[field] else "NOT met"
        ratio = f"{times[0]:.1f} x" if times else ""
        rows.append(f"| {name} | {cells[0]} | {cells[1]} | {ratio} | {target} | {verdict} |")
    return PAGE.format(scenario=result["config"]["scenario"], rows="\n".join(rows))


if __name__ == "__main__":
    from render import render

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    results.write("demo", measure(options.runs), RESULTS)
    print(render())
