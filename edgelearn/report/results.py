"""Numbers that a report needs and that a record does not hold ready."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgelearn.continual import metrics
from edgelearn.continual.metrics import Matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelearn.federated.record import Model, RunRecord

Direction = Literal["up", "down"]
MODELS: tuple[Model, Model] = ("served", "float")
DIRECTIONS: tuple[Direction, Direction] = ("up", "down")


@dataclass(frozen=True, slots=True)
class Span:
    """The rounds [first, last] of the experience at a position of the stream."""

    position: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with one device over the run.

    Attributes:
        device: The device.
        counts: How often, by outcome.
        reason: The first reason it gave.
        first_round: The round of that reason.
    """

    device: int
    counts: dict[str, int]
    reason: str
    first_round: int


def spans(record: RunRecord) -> tuple[Span, ...]:
    """Return the rounds of each position that was reached."""
    found: dict[int, list[int]] = {}
    for line in record.rounds:
        found.setdefault(line["position"], []).append(line["round"])
    return tuple(Span(position, min(r), max(r)) for position, r in sorted(found.items()))


def curves(record: RunRecord, model: Model = "served") -> tuple[NDArray[np.int64], Matrix]:
    """Return the rounds [N] with a measurement, 0 being the untrained model, and accuracies [N, T].

    T is the number of experiences, by id.
    """
    lines = [line for line in record.lines if line["kind"] in ("start", "round")]
    lines = [line for line in lines if line.get("accuracy") is not None]
    rounds = np.array([line.get("round", 0) for line in lines], dtype=np.int64)
    rows = [record.accuracy(line, model) for line in lines]
    return rounds, np.array(rows).reshape(len(lines), record.num_experiences)


def seen_average(
    record: RunRecord, model: Model = "served"
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return rounds [N] and the mean accuracy [N] over the experiences met so far.

    Where devices have different orders, an experience counts once any device has met it.
    """
    lines = [line for line in record.rounds if line.get("accuracy") is not None]
    means = [record.seen_accuracy(line, model) for line in lines]
    return np.array([line["round"] for line in lines], dtype=np.int64), np.array(means)


def when_learned(record: RunRecord, model: Model = "served") -> NDArray[np.float64]:
    """Return the accuracy on each experience [T] right after it was learned.

    With one common order this is the diagonal of the accuracy matrix; otherwise each device is
    taken at its own moment, and the samples are pooled.
    """
    orders = record.run["orders"]
    if orders is None:
        return np.diagonal(record.matrix(model)).copy()
    correct, total = np.zeros(record.num_experiences), np.zeros(record.num_experiences)
    for line in record.device_rows:
        for k, device in enumerate(line["devices"]):
            experience = orders[device][line["position"]]
            correct[experience] += line[model][k][experience]
            total[experience] += line["count"][k][experience]
    out = np.full(record.num_experiences, np.nan)
    np.divide(correct, total, out=out, where=total > 0)
    return out


def forgotten(record: RunRecord, model: Model = "served") -> NDArray[np.float64]:
    """Return how far the accuracy on each experience [T] fell from its best to the end.

    The terms of the mean of `metrics.forgetting`; NaN for what came last. Where devices have
    different orders, the mean over the devices' own matrices.
    """
    orders = record.run["orders"]
    if orders is None:
        return _drops(record.matrix(model))
    rows = []
    for device, matrix in record.device_matrices(model).items():
        row = np.full(record.num_experiences, np.nan)
        row[list(orders[device])] = _drops(matrix)
        rows.append(row)
    if not rows:
        return np.full(record.num_experiences, np.nan)
    return np.array([_mean(column) for column in np.array(rows).T])


def forgetting_by_device(record: RunRecord, model: Model = "served") -> NDArray[np.float64]:
    """Return each device's own forgetting, in its own order; NaN where it is not known."""
    matrices = record.device_matrices(model).values()
    return np.array([metrics.forgetting(matrix) for matrix in matrices])


def final_by_device(record: RunRecord, model: Model = "served") -> NDArray[np.float64]:
    """Return each device's accuracy over all of its test samples at the end of the stream.

    Empty while the stream is not at its end: an accuracy on what was not seen yet says little.
    """
    if record.device_rows and record.device_rows[-1]["position"] == record.num_experiences - 1:
        return record.final_by_device(model)
    return np.array([])


def total_bytes(record: RunRecord, direction: Direction) -> int:
    """Return what crossed the wire in one direction, so far.

    A finished run's last line counts everything, the evaluation of the untrained model included.
    """
    key = f"bytes_{direction}"
    if record.is_complete:
        return int(sum(record.end[key]))
    return int(sum(line[key] for line in record.rounds))


def cumulative_bytes(
    record: RunRecord, direction: Direction
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rounds [N + 1], from 0, and the bytes [N + 1] that had crossed the wire after each."""
    sent = [line[f"bytes_{direction}"] for line in record.rounds]
    before = total_bytes(record, direction) - sum(sent)
    rounds = np.array([0, *(line["round"] for line in record.rounds)], dtype=np.int64)
    return rounds, np.cumsum([before, *sent], dtype=np.int64)


def outcomes(record: RunRecord) -> dict[str, int]:
    """Return how often each outcome occurred, in the record's order."""
    total: Counter[str] = Counter()
    for line in record.rounds:
        for name, number in line["outcomes"].items():
            total[name] += number
    return dict(total)


def troubles(record: RunRecord) -> tuple[Trouble, ...]:
    """Return the devices with problems, the most troubled first."""
    found: dict[int, Trouble] = {}
    for line in record.rounds:
        for problem in line["problems"]:
            device = problem["device"]
            first = Trouble(device, {}, problem.get("reason") or "", line["round"])
            counts = found.setdefault(device, first).counts
            counts[problem["outcome"]] = counts.get(problem["outcome"], 0) + 1
    return tuple(sorted(found.values(), key=lambda t: (-sum(t.counts.values()), t.device)))


def _drops(R: Matrix) -> NDArray[np.float64]:
    drops = np.full(len(R), np.nan)
    for j in range(len(R) - 1):
        seen = R[j:-1, j]
        seen = seen[~np.isnan(seen)]
        if len(seen):
            drops[j] = seen.max() - R[-1, j]
    return drops


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
