"""Quantization-aware training against quantization after training, in a continual fleet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness import results, world
from harness.results import Options

import edgelearn
from edgelearn.significance import estimate

PART = "quantization"
POST_TRAINING = f"{Path(__file__).with_name('post_training.py')}:PostTraining"
REPLAY = {"capacity": 50, "replay_batch": 10}
# Name: what it is compared with, client strategy, tables of arguments beside those of replay.
ROWS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "8 bits, trained in float": ("", "replay", {}),
    "8 bits, `qat`": ("8 bits, trained in float", "replay+qat", {"qat": {}}),
    "8 bits, `int8-train`": ("8 bits, trained in float", "replay+int8-train", {"int8-train": {}}),
    "4-bit weights, trained in float": ("", f"replay+{POST_TRAINING}", {}),
    "4-bit weights, `qat`": (
        "4-bit weights, trained in float",
        "replay+qat",
        {"qat": {"bits": 4}},
    ),
    '4-bit weights, `qat`, `activations = "float"`': (
        "4-bit weights, trained in float",
        "replay+qat",
        {"qat": {"bits": 4, "activations": "float"}},
    ),
}
QUICK = {"data.max_train": 300, "data.max_test": 100, "stream.rounds_per_experience": 1}


def measure(options: Options, *, num_seeds: int) -> dict[str, Any]:
    """Run every row with every seed; a turn is a seed."""

    def runs(seed: int) -> dict[str, results.Run]:
        return {name: partial(_run, name, seed, options) for name in ROWS}

    config = {
        "workload": world.scenario(PART).as_dict(),
        "rows": {name: [of, args] for name, (of, _, args) in ROWS.items()},
        "seeds": num_seeds,
        "command": "python benchmarks/quantization.py",
    }
    return results.repeat(PART, runs, options, config=config, repetitions=num_seeds)


def _run(name: str, seed: int, options: Options) -> dict[str, Any]:
    _, strategy, args = ROWS[name]
    given = REPLAY if strategy == "replay" else {"replay": REPLAY, **args}
    overrides = {"client.strategy": strategy, "client.args": given, "seed": seed}
    if options.quick:
        overrides |= QUICK
    record = edgelearn.simulate(world.scenario(PART, overrides))
    served, in_float = record.scores(), record.scores("float")
    return {
        "accuracy": served.average_accuracy,
        "forgetting": served.forgetting,
        "float_accuracy": in_float.average_accuracy,
        "float_forgetting": in_float.forgetting,
    }


def percent(values: list[float]) -> str:
    """Return mean and standard deviation over seeds, in percent."""
    found = estimate([100 * value for value in values])
    return f"{found.mean:.1f} ± {found.std:.1f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Return the mean of paired differences with its 95 % interval, in points."""
    found = estimate([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def each(values: list[float]) -> str:
    """Return the values of all seeds, in percent."""
    return ", ".join(f"{100 * value:.1f}" for value in values)


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        (
            f"{results.sentence(result['config']['workload']['title'])}. Average accuracy and "
            "forgetting of the served model at the end, in percent: mean ± standard deviation over "
            "seeds; the difference is to the same bits trained in float, seed by seed, with its "
            "95 % interval (Student's). Where that holds 0, these seeds decide nothing. Weights of "
            "4 bits are stored in 8 (their accuracy is that of 4, their size is not)."
        ),
        "",
        "| served, trained | accuracy | each seed | difference | forgetting |",
        "|---|---|---|---|---|",
    ]
    for name, (of, _, _) in ROWS.items():
        accuracy = results.values(result, name, "accuracy")
        against = results.values(result, of, "accuracy") if of else accuracy
        if len(accuracy) < 2 or len(against) != len(accuracy):
            continue
        beside = difference(accuracy, against) if of else ""
        forgetting = percent(results.values(result, name, "forgetting"))
        lines.append(
            f"| {name} | {percent(accuracy)} | {each(accuracy)} | {beside} | {forgetting} |"
        )
    plain = results.values(result, next(iter(ROWS)), "float_accuracy")
    if len(plain) >= 2:
        lines += [
            "",
            f"The float model of the first row reaches {percent(plain)} % ({each(plain)}).",
        ]
    return "\n".join(lines)
