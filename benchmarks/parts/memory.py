"""Peak memory of a big fleet that remembers."""

from __future__ import annotations

from functools import partial
from typing import Any

from harness import results, world
from harness.results import Options

from edgelearn.scenario.spec import ENGINES
from parts import comparison

WORKLOAD = "memory"
_ROUNDS = 3


def measure(options: Options) -> dict[str, Any]:
    """Measure three rounds of 10,000 devices."""
    way = comparison.federations()[-1]
    runs = {
        comparison.name_of(tier, way): partial(
            comparison.ours,
            WORKLOAD,
            tier,
            way,
            budget_s=0.0,
            rounds=_ROUNDS - 1,
            interval_s=0.05,
        )
        for tier in comparison.TIERS
        if tier in ENGINES
    }
    spec = world.scenario(WORKLOAD)
    config = {
        "workload": spec.as_dict(),
        "digest": spec.digest,
        "rounds": _ROUNDS,
        "command": "python benchmarks/engines.py --only memory",
    }
    count = 1 if options.quick else min(3, options.repetitions)
    return results.repeat(WORKLOAD, runs, options, config=config, repetitions=count)


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        (
            f"{result['config']['workload']['title']}; {result['config']['rounds']} rounds, after "
            "the second of which all devices take the experience into their memory. A simulated "
            "device's memory is a list of sample numbers; the samples are there once."
        ),
        "",
        (
            "| engine | peak memory of the process tree, MiB (range) | state file, MiB | start to "
            "end of round 1, s |"
        ),
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(n for turn in result["turns"] for n in turn["runs"]):
        peaks = results.values(result, name, "peak_mib")
        state = results.median(results.values(result, name, "state_mib"))
        first = results.median(results.values(result, name, "first_round_s"))
        lines.append(
            f"| {name} | {results.median(peaks):,.0f} ({min(peaks):,.0f} - {max(peaks):,.0f}) "
            f"| {state:.1f} | {first:.1f} |"
        )
    return "\n".join(lines)
