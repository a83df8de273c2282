"""What pruning while learning saves in a stream of new classes, and when to do it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness import results
from harness.results import Options
from safetensors.torch import load_file

import edgelearn
from edgelearn.compress.quantize import quantize_weight
from edgelearn.compress.sparse_weights import sizes

PART = "pruning"
SCENARIO = "split-digits"
SPARSITIES = (0.0, 0.5, 0.8, 0.9)
WHEN: Mapping[str, dict[str, int]] = {
    "early": {"begin": 5, "num_prunings": 10},
    "late": {"begin": 25, "num_prunings": 3},
}


def measure(options: Options) -> dict[str, Any]:
    """Run the scenario with each sparsity; every turn is a seed."""

    def runs(seed: int) -> dict[str, results.Run]:
        return {
            _name(sparsity, when): partial(_run, sparsity, when, seed=seed)
            for sparsity in SPARSITIES
            for when in WHEN
        }

    config = {
        "workload": edgelearn.load(SCENARIO).as_dict(),
        "when": {name: dict(values) for name, values in WHEN.items()},
        "command": f"python benchmarks/engines.py --only {PART}",
    }
    count = 1 if options.quick else 3
    return results.repeat(PART, runs, options, config=config, repetitions=count)


def _name(sparsity: float, when: str) -> str:
    return f"{sparsity:g}, {when}"


def _run(sparsity: float, when: str, *, seed: int) -> dict[str, Any]:
    pruned = {"sparsity": sparsity, **WHEN[when]}
    client = {
        "strategy": "replay+pruned",
        "args": {"replay": {"capacity": 20}, "pruned": pruned},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        record = edgelearn.simulate(edgelearn.load(SCENARIO, client=client, seed=seed), out=run)
        weights = list(load_file(run / "model.safetensors").values())
    weights = [weight for weight in weights if weight.dim() > 1]
    found = sizes(quantize_weight(weight)[0].numpy() for weight in weights)
    return {
        "accuracy": record.scores().average_accuracy,
        "zeros": sum(int((weight == 0).sum()) for weight in weights)
        / sum(weight.numel() for weight in weights),
        "float32": found.float32,
        "int8": found.int8,
        "int8_coded": found.int8_coded,
        "packed": found.packed,
    }


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        (
            f"`{SCENARIO}` with `replay+pruned`, 20 samples remembered, 30 rounds, a new pair of "
            "digits every 6; pruned early (from round 5 on, 10 steps) or late (from round 25 on, "
            "3 steps). Served accuracy at the end over seeds 0 to "
            f"{len(result['turns']) - 1}, mean and sample standard deviation; bytes of the "
            "weights, without scales and biases, mean."
        ),
        "",
        "| sparsity | when | zeros | accuracy, % | float32 | int8 | int8, entropy-coded | packed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sparsity in SPARSITIES:
        for when in result["config"]["when"]:
            found = results.runs_of(result, _name(sparsity, when))
            if not found or (sparsity == 0 and when == "late"):
                continue
            accuracies = [100 * run["accuracy"] for run in found]
            spread = f" ± {statistics.stdev(accuracies):.1f}" if len(found) > 1 else ""
            sizes_of = " | ".join(
                f"{statistics.mean(run[name] for run in found):,.0f}"
                for name in ("float32", "int8", "int8_coded", "packed")
            )
            zeros = statistics.mean(run["zeros"] for run in found)
            lines.append(
                f"| {sparsity:g} | {when if sparsity else '-'} | {100 * zeros:.0f} % "
                f"| {statistics.mean(accuracies):.1f}{spread} | {sizes_of} |"
            )
    return "\n".join(lines)
