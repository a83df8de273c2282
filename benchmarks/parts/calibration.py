"""What int8 loses by each way to take the ranges of activations, and without any."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from harness import results, subjects
from harness.results import Options
from harness.subjects import CNN, MOBILENET, Subject

from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.protocol import Prepared

PART = "calibration"
_NUM_CALIBRATION = 64
_NUM_TEST = {CNN: 10_000, MOBILENET: 4_000}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "min-max": {},
    "percentile, 99.99": {"calibration": "percentile"},
    "percentile, 99.9": {"calibration": "percentile", "percentile": 99.9},
    "percentile, 99": {"calibration": "percentile", "percentile": 99.0},
    "moving average": {"calibration": "moving-average"},
    "dynamic": {"activations": "dynamic"},
    "weights only": {"activations": "float"},
}


def measure(options: Options) -> dict[str, Any]:
    """Train each network once for each seed; a turn is a seed."""
    torch.set_num_threads(1)
    dataset, count = ("digits", 1) if options.quick else ("fashion-mnist", 3)
    config = {
        "ways": {name: dict(arguments) for name, arguments in WAYS.items()},
        "dataset": dataset,
        "num_calibration": _NUM_CALIBRATION,
        "num_test": _NUM_TEST,
        "workload": {"seed": 0},
        "seeds": count,
        "command": f"python benchmarks/engines.py --only {PART}",
    }

    def runs(seed: int) -> dict[str, results.Run]:
        return {
            name: partial(_run, name, dataset, seed, is_quick=options.quick)
            for name in (CNN, MOBILENET)
        }

    return results.repeat(PART, runs, options, config=config, repetitions=count)


def _run(name: str, dataset: str, seed: int, *, is_quick: bool) -> dict[str, Any]:
    world = subjects.world_of(dataset, seed=seed)
    size = {"num_calibration": _NUM_CALIBRATION, "num_test": 64 if is_quick else _NUM_TEST[name]}
    if name == CNN:
        one = subjects.small(world, epochs=1 if is_quick else 3, **size)
    else:
        one = subjects.mobilenet(world, None, steps=2 if is_quick else 600, **size)
    assert one.y is not None
    with torch.no_grad():
        exact = torch.cat([one.model(one.params, x).argmax(1) for x in one.x.split(32)])
        found: dict[str, Any] = {"float": {"accuracy": _share(exact == one.y)}}
        for way, arguments in WAYS.items():
            for bits in (8, 4):
                prepared = Int8Runtime(weight_bits=bits, **arguments).prepare(one.model, one.params)
                answers = _answers(prepared, one)
                found[f"{way}, {bits}"] = {
                    "accuracy": _share(answers == one.y),
                    "agreement": _share(answers == exact),
                }
    return found


def _answers(prepared: Prepared, one: Subject) -> torch.Tensor:
    predict = prepared.calibrated(one.calibration)
    return torch.cat([predict(x).argmax(1) for x in one.x.split(32)])


def _share(right: torch.Tensor) -> float:
    return float(right.double().mean())


def section(result: dict[str, Any]) -> str:
    """Return a table for each network."""
    lines = [
        (
            f"The runtime `int8`, {result['config']['num_calibration']} samples to calibrate on, "
            f"{result['config']['dataset']}: share of the test samples answered rightly, and as "
            "the float network answers them, in %; mean and sample standard deviation over seeds."
        ),
    ]
    for network in (CNN, MOBILENET):
        runs = results.runs_of(result, network)
        if not runs:
            continue
        exact = results.spread([100 * run["float"]["accuracy"] for run in runs])
        count = result["config"]["num_test"][network]
        lines += [
            "",
            f"**{network}** ({len(runs)} seed(s), {count:,} test images; float: {exact})",
            "",
            "| ranges | 8-bit weights | as float | 4-bit weights | as float |",
            "|---|---|---|---|---|",
        ]
        for way in WAYS:
            cells = [
                results.spread([100 * run[f"{way}, {bits}"][what] for run in runs])
                for bits in (8, 4)
                for what in ("accuracy", "agreement")
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)
