"""A run small enough to check by hand: two devices, three experiences, two rounds each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from edgelearn.federated.record import RunRecord

RUN = {
    "kind": "run",
    "edgelearn": "0.1.0",
    "scenario": "tiny",
    "title": "two devices see two classes at a time",
    "digest": "00ff00ff",
    "seed": 7,
    "versions": {"python": "3.11.9", "torch": "2.6.0", "flwr": "1.41.0", "numpy": "2.0.0"},
    "num_devices": 2,
    "num_experiences": 3,
    "rounds_per_experience": 2,
    "classes": [[0, 1], [2, 3], [4, 5]],
    "orders": None,
    "num_parameters": 4810,
    "model_bytes": {"float": 19240, "served": 5400},
    "memory_bytes_per_device": 1400,
    "client": "replay",
    "server": "FedAvg",
    "runtime": "int8",
    "engine": {"tier": "reference", "workers": 1, "reason": "the fleet is tiny"},
}

# Correct answers of ten for each device and experience, after each experience.
COUNT = [[10, 10, 10], [10, 10, 10]]
SERVED = [
    [[8, 2, 0], [10, 0, 0]],  # pooled 0.9 0.1 0.0
    [[6, 8, 0], [8, 8, 2]],  # pooled 0.7 0.8 0.1
    [[5, 7, 9], [5, 5, 5]],  # pooled 0.5 0.6 0.7
]
FLOAT = [
    [[8, 2, 0], [10, 0, 0]],
    [[6, 8, 0], [8, 8, 2]],
    [[6, 8, 10], [6, 6, 6]],  # pooled 0.6 0.7 0.8
]


def _pooled(counts: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts, strict=True)]


def _accuracy(position: int) -> dict[str, list[int]]:
    return {
        "count": _pooled(COUNT),
        "served": _pooled(SERVED[position]),
        "float": _pooled(FLOAT[position]),
    }


def build(*, rounds: int = 6, orders: list[list[int]] | None = None, **changes: Any) -> RunRecord:
    """Build the record of a run that came `rounds` far; the sixth is the last."""
    lines: list[dict[str, Any]] = [{**copy.deepcopy(RUN), "orders": orders, **changes}]
    untrained = {"count": [20, 20, 20], "served": [4, 0, 2], "float": [4, 0, 2]}
    lines.append({"kind": "start", "accuracy": untrained})
    for number in range(1, rounds + 1):
        position, ends = (number - 1) // 2, number % 2 == 0
        failed = number in (2, 5)
        late = number == 5
        problems = [{"device": 1, "outcome": "failed", "reason": "out of <memory>"}] * failed
        problems += [{"device": 0, "outcome": "late", "reason": "no reply"}] * late
        outcomes = {"ok": 2 - failed - late, "late": int(late), "failed": int(failed)}
        lines.append(
            {
                "kind": "round",
                "round": number,
                "position": position,
                "cohort": [0, 1],
                "outcomes": {**outcomes, "rejected": 0, "offline": 0},
                "problems": problems,
                "loss": 1.5 / number if number != 3 else None,
                "accuracy": _accuracy(position) if ends else None,
                "bytes_down": 1000,
                "bytes_up": 200,
                "clock_s": 12.5 * number,
                "wall_s": 0.25,
            }
        )
        if ends:
            row = {"count": COUNT, "served": SERVED[position], "float": FLOAT[position]}
            place = {"round": number, "position": position, "devices": [0, 1]}
            lines.append({"kind": "devices", **place, **row})
    if rounds == 6:
        end = {"kind": "end", "rounds": 6, "wall_s": 1.5, "cpu_s": 1.25}
        lines.append({**end, "bytes_up": [700, 600], "bytes_down": [3100, 3100]})
    return RunRecord(tuple(lines))


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    return build


@pytest.fixture
def record() -> RunRecord:
    return build()
