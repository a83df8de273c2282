"""What EWC adds to a step, and what the Fisher information of an experience costs."""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

from harness import results, world
from harness.paths import CHILDREN, WORKLOADS
from harness.processes import own_environment, run_child
from harness.results import Options

from edgelearn.scenario.spec import ENGINES
from parts import comparison

WORKLOAD = "ewc"
FISHER = "Fisher"
STRATEGIES = ("naive", "ewc")
EPOCHS = (1, 4)  # the difference is steps only: what a participation costs otherwise drops out


def measure(options: Options) -> dict[str, Any]:
    """Measure EWC against naive on each engine."""
    spec = world.scenario(WORKLOAD)
    per_experience = spec.stream.rounds_per_experience
    way = comparison.federations()[-1]
    runs = {FISHER: partial(_fisher, repeats=5 if options.quick else 25)}
    tiers = [tier for tier in comparison.TIERS if tier in ENGINES]
    for tier in tiers:
        for epochs in EPOCHS:
            for strategy in STRATEGIES:
                runs[_name(tier, strategy, epochs)] = partial(
                    comparison.ours,
                    WORKLOAD,
                    tier,
                    way,
                    budget_s=0.0,
                    rounds=3 if options.quick else per_experience - 2,
                    overrides={"client.strategy": strategy, "client.epochs": epochs},
                    skip=per_experience + 1,
                    position=1,
                )
    facts = world.facts(WORKLOAD, None, 1)
    steps = [math.ceil(n / spec.client.batch_size) for n in facts.sizes]
    config = {
        "workload": spec.as_dict(),
        "tiers": tiers,
        "federation": way,
        "epochs": list(EPOCHS),
        "steps_per_epoch": sum(steps) / len(steps),
        "command": "python benchmarks/engines.py --only ewc",
    }
    count = 1 if options.quick else min(3, options.repetitions)
    return results.repeat(WORKLOAD, runs, options, config=config, repetitions=count)


def _name(tier: str, strategy: str, epochs: int) -> str:
    return f"{tier}, {strategy}, {epochs} epochs"


def _fisher(*, repeats: int) -> dict[str, Any]:
    asked = {"scenario": str(WORKLOADS / "w2.toml"), "samples": 60, "repeats": repeats}
    command = [sys.executable, str(CHILDREN / "fisher.py")]
    return run_child(command, asked, environment=own_environment()).as_dict()


def cost(result: dict[str, Any], tier: str, strategy: str, field: str) -> dict[str, float] | None:
    """Return microseconds of a step and milliseconds of a participation beside its steps.

    Taken from the difference of two numbers of epochs, by CPU or by wall time of a round.
    """
    low, high = EPOCHS
    found = [
        results.median(results.values(result, _name(tier, strategy, epochs), field))
        for epochs in EPOCHS
    ]
    if found[0] is None or found[1] is None:
        return None
    step = (found[1] - found[0]) / (high - low) / result["config"]["steps_per_epoch"]
    fixed = found[0] - low * result["config"]["steps_per_epoch"] * step
    return {"step_us": 1e3 * step, "fixed_ms": fixed}


def overhead(result: dict[str, Any], tier: str) -> float | None:
    """Return what EWC adds to a step, in percent of CPU time."""
    found = [cost(result, tier, strategy, "cpu_ms_per_update") for strategy in STRATEGIES]
    if found[0] is None or found[1] is None:
        return None
    return 100 * (found[1]["step_us"] / found[0]["step_us"] - 1)


def section(result: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [
        (
            f"{results.sentence(result['config']['workload']['title'])}. CPU time; steps from the "
            f"difference between {EPOCHS[1]} and {EPOCHS[0]} epochs, the rest of a participation "
            "(messages, reading and writing the device's Fisher and anchor) beside it."
        ),
        "",
        "| engine | step, naive, us | step, EWC, us | EWC adds | rest, naive, ms | rest, EWC, ms |",
        "|---|---|---|---|---|---|",
    ]
    for tier in result["config"]["tiers"]:
        naive, ewc = (cost(result, tier, s, "cpu_ms_per_update") for s in STRATEGIES)
        added = overhead(result, tier)
        if naive is not None and ewc is not None and added is not None:
            lines.append(
                f"| {comparison.name_of(tier, result['config']['federation'])} "
                f"| {naive['step_us']:,.0f} | {ewc['step_us']:,.0f} | {added:+.0f} % "
                f"| {naive['fixed_ms']:.2f} | {ewc['fixed_ms']:.2f} |"
            )
    names = {"ours": "edgelearn", "mapped": "vmap of grad", "looped": "loop of gradients"}
    cells = []
    for key, name in names.items():
        value = results.median(results.values(result, FISHER, f"{key}_ms"))
        if value is not None:
            cells.append(f"{name} {value:.1f} ms")
    if cells:
        lines += ["", f"Empirical Fisher of 60 samples on the 2NN, CPU: {', '.join(cells)}."]
    return "\n".join(lines)
