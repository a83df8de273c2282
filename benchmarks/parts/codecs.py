"""What updates cost on the wire by each codec, and what their error costs in accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

from harness import results
from harness.results import Options

import edgelearn
from edgelearn.scenario.spec import Scenario

PART = "codecs"
SCENARIO = "split-fashion-mnist"
PLAIN = "float32"
HUNDREDTH: Mapping[str, Any] = {"share": 0.01, "values": "int8"}
_TENTH = {"share": 0.1}
FEW_BITS: Mapping[str, Any] = {"values": "int4", "block": 1024}
CODECS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    PLAIN: ("none", {}),
    "float16": ("float16", {}),
    "int8": ("int8", {}),
    "int8, entropy-coded": ("int8+lzma", {}),
    "int4": ("int4", {}),
    "int4, entropy-coded": ("int4+lzma", {}),
    "int4, blocks of 1,024, entropy-coded": ("int4+lzma", {"block": 1024}),
    "top-k, 10 %": ("top-k", _TENTH),
    "top-k, 10 %, no feedback": ("top-k", {**_TENTH, "feedback": False}),
    "top-k, 1 %, int8, entropy-coded": ("top-k+lzma", HUNDREDTH),
    "top-k, 1 %, int8, entropy-coded, no feedback": (
        "top-k+lzma",
        {**HUNDREDTH, "feedback": False},
    ),
    "top-k, 1 %, int8, entropy-coded, rescaled": (
        "top-k+lzma",
        {**HUNDREDTH, "feedback": False, "rescale": True},
    ),
    "top-k, 2 %, int4, entropy-coded": ("top-k+lzma", {"share": 0.02, "values": "int4"}),
    "random-k, 10 %": ("random-k", _TENTH),
    "random-k, 2 %, int8": ("random-k", {"share": 0.02, "values": "int8"}),
    "random-k, 5 %, int4, blocks of 1,024, entropy-coded": (
        "random-k+lzma",
        {"share": 0.05, **FEW_BITS},
    ),
    "random-k, 2 %, int4, blocks of 1,024, entropy-coded": (
        "random-k+lzma",
        {"share": 0.02, **FEW_BITS},
    ),
}


def scenario(
    codec: str, args: Mapping[str, Any], *, seed: int, quick: bool, **tables: Mapping[str, Any]
) -> Scenario:
    """Return the scenario of a run, with other tables in place of its own."""
    few = {"data": {"max_train": 2000, "max_test": 500}} if quick else {}
    return edgelearn.load(
        SCENARIO, wire={"codec": codec, "args": dict(args)}, evaluate={"every_rounds": 8},
        seed=seed, **{**tables, **few},
    )  # fmt: skip


def measure(options: Options) -> dict[str, Any]:
    """Run the scenario with each codec; every turn is a seed."""

    def runs(seed: int) -> dict[str, results.Run]:
        return {
            name: partial(run, scenario(codec, args, seed=seed, quick=options.quick))
            for name, (codec, args) in CODECS.items()
        }

    count = 1 if options.quick else 3
    config = {
        "workload": scenario("none", {}, seed=0, quick=options.quick).as_dict(),
        "codecs": {name: [codec, dict(args)] for name, (codec, args) in CODECS.items()},
        "seeds": count,
        "command": f"python benchmarks/engines.py --only {PART}",
    }
    return results.repeat(PART, runs, options, config=config, repetitions=count)


def run(it: Scenario) -> dict[str, Any]:
    """Run a scenario; what is forgotten is None where there is one experience."""
    record = edgelearn.simulate(it)
    scores = record.scores()
    return {
        "accuracy": scores.average_accuracy,
        "forgetting": None if math.isnan(scores.forgetting) else scores.forgetting,
        "bytes_up": sum(line["bytes_up"] for line in record.rounds),
    }


def _pairs(
    result: dict[str, Any], name: str, plain: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return float32 and a codec, of each seed that has both."""
    seeds = [turn["runs"] for turn in result["turns"]]
    return [(runs[plain], runs[name]) for runs in seeds if plain in runs and name in runs]


def fewer(result: dict[str, Any], name: str, plain: str = PLAIN) -> float | None:
    """Return how many times fewer bytes go up than with float32; mean over seeds."""
    pairs = _pairs(result, name, plain)
    found = [before["bytes_up"] / run["bytes_up"] for before, run in pairs]
    return statistics.mean(found) if found else None


def losses(result: dict[str, Any], name: str, plain: str = PLAIN) -> list[float]:
    """Return the points of accuracy lost to float32, seed by seed."""
    pairs = _pairs(result, name, plain)
    return [100 * (before["accuracy"] - run["accuracy"]) for before, run in pairs]


def lost(result: dict[str, Any], name: str) -> float | None:
    """Return the points of accuracy lost to float32; mean over seeds."""
    found = losses(result, name)
    return statistics.mean(found) if found else None


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    config = result["config"]["workload"]
    rounds = config["stream"]["num_experiences"] * config["stream"]["rounds_per_experience"]
    lines = [
        (
            f"`{SCENARIO}` ({config['client']['strategy']}, {rounds} rounds, a cohort of "
            f"{config['fleet']['cohort']}), seeds 0 to {len(result['turns']) - 1}. Kilobytes that "
            "all devices send in a round, with headers, metrics and what they answer when they "
            "evaluate; accuracy and forgetting of the served int8 model at the end, mean and "
            "sample standard deviation over seeds, and the difference to float32 seed by seed. "
            "top-k has error feedback but where it says otherwise; rescaled, it has none."
        ),
        "",
        "| updates | kB up a round | fewer | accuracy, % | lost, points | forgetting, points |",
        "|---|---|---|---|---|---|",
    ]
    plain = results.runs_of(result, PLAIN)
    for name in result["config"]["codecs"]:
        found = results.runs_of(result, name)
        if not found or len(found) != len(plain):
            continue
        each = statistics.mean(run["bytes_up"] / rounds for run in found)
        lines.append(
            f"| {name} | {each / 1e3:,.1f} | {fewer(result, name) or 0:,.1f} x "
            f"| {results.spread([100 * run['accuracy'] for run in found])} "
            f"| {results.spread(losses(result, name))} "
            f"| {results.spread([100 * run['forgetting'] for run in found])} |"
        )
    return "\n".join(lines)
