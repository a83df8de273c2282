"""What regularization adds to a step, method by method, with every penalty at work."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

from harness import results, world
from harness.paths import CHILDREN, WORKLOADS
from harness.processes import own_environment, run_child
from harness.results import Options

PART, WORKLOAD, NAIVE = "steps", "ewc", "naive"
METHODS: dict[str, dict[str, Any]] = {
    NAIVE: {},
    "ewc": {"strength": 10.0},
    "si": {},
}
EPOCHS = (1, 4)
# On networks that each engine is for: the 2NN, and one of which many fit into the cache.
NETWORKS: dict[str, dict[str, Any]] = {
    "2NN": {},
    "784-32-10": {"model.args": {"hidden": [32]}},
}
WAYS = (
    ("2NN", "reference"),
    ("2NN", "native"),
    ("784-32-10", "reference"),
    ("784-32-10", "batched"),
    ("784-32-10", "native"),
)


def measure(options: Options) -> dict[str, Any]:
    """Measure each engine in a process of its own, in which methods take turns."""
    turns = 3 if options.quick else 15
    runs = {_name(*way): partial(_ours, *way, turns) for way in WAYS}
    config = {
        "workload": world.scenario(WORKLOAD).as_dict(),
        "methods": METHODS,
        "epochs": list(EPOCHS),
        "command": "python benchmarks/engines.py --only steps",
    }
    count = 1 if options.quick else min(3, options.repetitions)
    return results.repeat(PART, runs, options, config=config, repetitions=count)


def _name(network: str, tier: str) -> str:
    return f"{network}, {tier}"


def _ours(network: str, tier: str, turns: int) -> dict[str, Any]:
    asked = {
        "scenario": str(WORKLOADS / f"{WORKLOAD}.toml"),
        "overrides": NETWORKS[network],
        "tier": tier,
        "methods": METHODS,
        "epochs": list(EPOCHS),
        "turns": turns,
    }
    command = [sys.executable, str(CHILDREN / "steps.py")]
    return run_child(command, asked, environment=own_environment()).as_dict()


def _turns(result: dict[str, Any], name: str) -> list[dict[str, float]]:
    return [turn for run in results.runs_of(result, name) for turn in run["turns"]]


def added(result: dict[str, Any], network: str, tier: str, method: str) -> float | None:
    """Return what a method adds to a step of naive, in percent: the median over turns."""
    turns = _turns(result, _name(network, tier))
    shares = [100 * (turn[method] / turn[NAIVE] - 1) for turn in turns if turn[NAIVE] > 0]
    return statistics.median(shares) if shares else None


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    others = [method for method in METHODS if method != NAIVE]
    lines = [
        (
            "Batch 10, plain SGD; every device has an importance above 0 for each parameter, so "
            "that no engine can leave a penalty out. CPU of a step from the difference between "
            f"{EPOCHS[1]} and {EPOCHS[0]} epochs; methods take turns in one process, and what one "
            "adds to naive is the median over turns."
        ),
        "",
        f"| network | engine | step, naive, us | {' | '.join(f'{m} adds' for m in others)} |",
        f"|---|---|---|{'---|' * len(others)}",
    ]
    for network, tier in WAYS:
        turns = _turns(result, _name(network, tier))
        if not turns:
            continue
        plain = statistics.median(turn[NAIVE] for turn in turns)
        more = [f"{added(result, network, tier, m) or 0.0:+.0f} %" for m in others]
        lines.append(f"| {network} | {tier} | {plain:,.0f} | {' | '.join(more)} |")
    return "\n".join(lines)
