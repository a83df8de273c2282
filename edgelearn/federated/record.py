"""The run record: append-only JSON lines, and what can be asked of them.

Lines, by their `kind`:

- `run`: once, first: versions, seed, scenario digest, sizes, engine, orders of the devices, and
  when each first meets each experience, where they differ in that; what each kind of device holds
  and serves with its sizes under `kinds`, and which of them each device is under `kind_of`;
- `start`: once: accuracy of the untrained model;
- `round`: one per round: cohort, outcomes, loss, accuracy, bytes, clock; where devices look for
  boundaries themselves, [device, alarms] of those that noticed one;
- `devices`: at the end of an experience: each device's counts on each experience, and which
  devices were offline;
- `end`: once, last: bytes by device, seconds.

Accuracies come as `correct` and `count` by experience id, so that every mean can be recomputed. A
round's `energy_j` is that of all devices, modelled; null where nobody models it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelearn.continual.boundaries import Detections, detections
from edgelearn.continual.exposure import Exposure, exposure, met
from edgelearn.continual.metrics import (
    ContinualScores,
    Matrix,
    RoundScores,
    Spread,
    area_under,
    forgetting,
    intransigence,
    round_scores,
    scores,
    spread,
    spread_of_costs,
)
from edgelearn.errors import StateError

Model = Literal["served", "float"]
Cost = Literal["bytes", "energy", "time"]
Line = dict[str, Any]


def encode_line(line: Mapping[str, Any]) -> bytes:
    """Return a line of the record as bytes."""
    return (json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n").encode()


def read_lines(path: Path) -> list[Line]:
    """Read a record.

    Raises:
        StateError: If the file is missing, or a line of it is damaged (naming the line).
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{path}: there is no record here") from None
    lines: list[Line] = []
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise StateError(f"{path}, line {number}: damaged or truncated: {error}") from error
        if not isinstance(line, dict) or "kind" not in line:
            raise StateError(f"{path}, line {number}: damaged: not an object with a kind")
        lines.append(line)
    if not lines or lines[0]["kind"] != "run":
        raise StateError(f"{path}: the record has no first line that describes the run")
    return lines


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind, as data.

    Attributes:
        lines: All lines, in order.
        path: The run's directory, if it has one.
    """

    lines: tuple[Line, ...]
    path: Path | None = None

    @classmethod
    def read(cls, directory: str | Path) -> RunRecord:
        """Read the record of a run directory.

        Raises:
            StateError: If it is missing or damaged.
        """
        directory = Path(directory)
        return cls(tuple(read_lines(directory / "record.jsonl")), directory)

    @property
    def run(self) -> Line:
        """The line that describes the run."""
        return self.lines[0]

    @property
    def is_complete(self) -> bool:
        """Whether the run reached its end."""
        return bool(self.lines[-1]["kind"] == "end")

    @property
    def end(self) -> Line:
        """The last line.

        Raises:
            StateError: If the run did not reach its end.
        """
        if not self.is_complete:
            raise StateError(f"{self.path or 'this run'} is not complete; resume it first")
        return self.lines[-1]

    @cached_property
    def rounds(self) -> tuple[Line, ...]:
        """The lines of the rounds."""
        return tuple(line for line in self.lines if line["kind"] == "round")

    @cached_property
    def device_rows(self) -> tuple[Line, ...]:
        """The lines with each device's counts, one per finished experience."""
        return tuple(line for line in self.lines if line["kind"] == "devices")

    @property
    def num_experiences(self) -> int:
        """Experiences in the stream, T."""
        return int(self.run["num_experiences"])

    def accuracy(self, line: Line, model: Model = "served") -> Matrix:
        """Return accuracies by experience id [T] of a `start` or `round` line; else NaN."""
        seen = line.get("accuracy")
        if seen is None:
            return np.full(self.num_experiences, np.nan)
        return _ratio(np.array(seen[model]), np.array(seen["count"]))

    def baseline(self, model: Model = "served") -> Matrix:
        """Return the untrained model's accuracies by experience id [T]."""
        found = [line for line in self.lines if line["kind"] == "start"]
        return self.accuracy(found[0] if found else {}, model)

    def matrix(self, model: Model = "served") -> Matrix:
        """Return R [T, T] over the whole test set: row = position, column = experience id.

        The accuracy of what the devices serve: all devices' test samples, pooled. Rows that were
        not reached are NaN.
        """
        R = np.full((self.num_experiences, self.num_experiences), np.nan)
        for line in self.device_rows:
            counts = np.array(line["count"]).sum(0)
            R[line["position"]] = _ratio(np.array(line[model]).sum(0), counts)
        return R

    def device_matrices(self, model: Model = "served") -> dict[int, Matrix]:
        """Return R_k [T, T] of each device, columns in the order in which **it** met them."""
        T = self.num_experiences
        orders = self.run["orders"]
        matrices: dict[int, Matrix] = {}
        for line in self.device_rows:
            values = _ratio(np.array(line[model]), np.array(line["count"]))
            for device, row in zip(line["devices"], values, strict=True):
                order = orders[device] if orders is not None else range(T)
                matrix = matrices.setdefault(device, np.full((T, T), np.nan))
                matrix[line["position"]] = row[list(order)]
        return matrices

    def scores(self, model: Model = "served") -> ContinualScores:
        """Return the continual-learning scores of the fleet as a whole.

        Where devices have different orders, there is no common diagonal: the scores are then
        means over the devices' own matrices.
        """
        if self.run["orders"] is None:
            return scores(self.matrix(model), self.baseline(model))
        rows = [
            list(
                scores(matrix, self.baseline(model)[self.run["orders"][device]]).as_dict().values()
            )
            for device, matrix in self.device_matrices(model).items()
        ]
        if not rows:
            return ContinualScores(*[math.nan] * 6)
        means = [_nanmean(np.array(column)) for column in zip(*rows, strict=True)]
        return ContinualScores(*means)

    def exposure(self, model: Model = "served") -> tuple[Exposure, ...]:
        """Return, for each finished experience, what devices know of what they have met or not.

        Empty where all devices meet the same at the same time.
        """
        if self.run.get("first_met") is None:
            return ()
        first_met = np.array(self.run["first_met"])
        found = []
        for line in self.device_rows:
            seen = met(first_met, line["position"])
            correct, count = np.array(line[model]), np.array(line["count"])
            by_any: NDArray[np.bool_] = np.logical_or.reduce(seen, axis=0)
            of_devices, untrained = seen[line["devices"]], self.baseline(model)
            found.append(exposure(correct, count, of_devices, by_any, untrained))
        return tuple(found)

    def detections(self) -> Detections | None:
        """Return how well devices found the boundaries of experiences; None if they were told."""
        positions = self.run.get("changes")
        if positions is None:
            return None
        length = self.run["rounds_per_experience"]
        changes = [[1 + length * position for position in own] for own in positions]
        visits: dict[int, list[int]] = {}
        alarms: dict[int, dict[int, int]] = {}
        for line in self.rounds:
            failed = {problem["device"] for problem in line["problems"]}
            for device in line["cohort"]:
                if device not in failed:
                    visits.setdefault(device, []).append(line["round"])
            for device, number in line["alarms"]:
                alarms.setdefault(device, {})[line["round"]] = number
        return detections(visits, alarms, changes)

    def device_accuracy(self, model: Model = "served") -> Spread:
        """Return how the final accuracy on all experiences is spread over devices."""
        return spread(self.final_by_device(model))

    def device_forgetting(self, model: Model = "served") -> Spread:
        """Return how forgetting is spread over devices, each in its own order; worst is most."""
        matrices = self.device_matrices(model).values()
        return spread_of_costs(np.array([forgetting(matrix) for matrix in matrices]))

    def final_by_device(self, model: Model = "served") -> NDArray[np.float64]:
        """Return each device's final accuracy over all of its test samples."""
        if not self.device_rows or not self.device_rows[-1]["devices"]:
            return np.array([])
        line = self.device_rows[-1]
        return _ratio(np.array(line[model]).sum(1), np.array(line["count"]).sum(1))

    def round_scores(self, model: Model = "served") -> RoundScores:
        """Return what the accuracies after each round say; NaN where devices differ in order."""
        lines = [line for line in self.rounds if line.get("accuracy") is not None]
        if self.run["orders"] is not None or not lines:
            return RoundScores(*[math.nan] * 3)
        accuracies = np.array([self.accuracy(line, model) for line in lines])
        return round_scores(accuracies, np.array([line["position"] for line in lines]))

    def intransigence(self, joint: RunRecord, model: Model = "served") -> float:
        """Return how much less was learned of each experience than in a joint run.

        Args:
            joint: A run of the same stream whose devices have all data up to each position.
            model: Which model.

        Raises:
            StateError: If it is of another stream, or devices differ in their order.
        """
        for key in ("num_experiences", "classes", "orders", "num_devices"):
            if joint.run[key] != self.run[key]:
                raise StateError(
                    f"the joint run has other {key}: {joint.run[key]!r}, not {self.run[key]!r}"
                )
        if self.run["orders"] is not None:
            raise StateError("intransigence needs one order of experiences on all devices")
        return intransigence(self.matrix(model), joint.matrix(model))

    def seen_accuracy(self, line: Line, model: Model = "served") -> float:
        """Return the mean accuracy on the experiences met so far, of a `start` or `round` line.

        Before the first round that is the first experience. Where devices have different orders,
        an experience counts once any device has met it.
        """
        met, orders = line.get("position", 0) + 1, self.run["orders"]
        ids = range(met) if orders is None else {e for order in orders for e in order[:met]}
        return _nanmean(self.accuracy(line, model)[sorted(ids)])

    def spent(self, cost: Cost) -> NDArray[np.float64]:
        """Return what had been spent by all devices after each round [N].

        Args:
            cost: "bytes" moved in rounds, both ways; "energy", modelled, in joules; "time", the
                clock in seconds (virtual in simulation).

        Returns:
            NaN from where on it is not known.
        """
        if cost == "time":
            return np.array([float(line["clock_s"]) for line in self.rounds])
        if cost == "bytes":
            each = [float(line["bytes_up"] + line["bytes_down"]) for line in self.rounds]
        else:
            known = [line.get("energy_j") for line in self.rounds]
            each = [math.nan if joules is None else float(joules) for joules in known]
        return np.cumsum(np.array(each, np.float64))

    def area(self, cost: Cost, model: Model = "served", *, budget: float | None = None) -> float:
        """Return the area under the accuracy on what was met so far, against what was spent.

        It begins with the untrained model, at no cost; see `metrics.area_under`.
        """
        start = [line for line in self.lines if line["kind"] == "start"]
        accuracy = [self.seen_accuracy(line, model) for line in (*start, *self.rounds)]
        spent = np.concatenate([np.zeros(len(start)), self.spent(cost)])
        return area_under(spent, np.array(accuracy), budget=budget)


def _ratio(correct: NDArray[Any], count: NDArray[Any]) -> NDArray[np.float64]:
    out = np.full(np.shape(correct), np.nan)
    np.divide(correct, count, out=out, where=np.asarray(count) > 0)
    return out


def _nanmean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
