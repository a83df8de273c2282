"""What evaluating the whole fleet after a round costs, which the comparisons leave out."""

from __future__ import annotations

from functools import partial
from typing import Any

from harness import results, world
from harness.results import Options

from edgelearn.scenario.spec import ENGINES
from parts import comparison

WORKLOAD = "w2"
OVERRIDES = {"server.args.fraction_evaluate": 1.0, "evaluate.every_rounds": 1}


def measure(options: Options) -> dict[str, Any]:
    """Measure rounds with and without an evaluation of all 1,000 devices."""
    way = comparison.federations()[-1]
    runs = {}
    for tier in comparison.TIERS:
        if tier in ENGINES:
            name = comparison.name_of(tier, way)
            for label, overrides in (("without", {}), ("with", OVERRIDES)):
                runs[f"{name}, {label}"] = partial(
                    comparison.ours,
                    WORKLOAD,
                    tier,
                    way,
                    budget_s=0.2 if options.quick else 1.0,
                    rounds=2 if options.quick else 3,
                    overrides=overrides,
                )
    config = {
        "workload": world.scenario(WORKLOAD, OVERRIDES).as_dict(),
        "engines": [n.removesuffix(", with") for n in runs if n.endswith(", with")],
        "command": "python benchmarks/engines.py --only evaluation",
    }
    count = 1 if options.quick else min(3, options.repetitions)
    return results.repeat("evaluation", runs, options, config=config, repetitions=count)


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    devices = result["config"]["workload"]["fleet"]["num_devices"]
    lines = [
        (
            f"W2 with an evaluation of all {devices:,} devices (int8 and float model, on their own "
            "test samples) before the first round and after each round. Runs take "
            f"{len(result['turns'])} turns."
        ),
        "",
        "| engine | round without, ms | round with, ms | ms per device evaluated |",
        "|---|---|---|---|",
    ]
    for name in result["config"]["engines"]:
        bare = results.median(results.values(result, f"{name}, without", "round_ms"))
        full = results.median(results.values(result, f"{name}, with", "round_ms"))
        if bare is not None and full is not None:
            each = (full - bare) / devices
            lines.append(f"| {name} | {bare:,.1f} | {full:,.1f} | {each:.3g} |")
    return "\n".join(lines)
