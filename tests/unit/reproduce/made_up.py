"""A table that costs nothing, loaded from its file as a user's own."""

from __future__ import annotations

from pathlib import Path

from edgelearn.errors import DatasetError
from edgelearn.reproduce.table import Row, Table


def run(*, value: float, log: str, spread: float = 1.0, seed: int) -> dict[str, float]:
    """Return value + spread * seed, and leave a line for each call."""
    with Path(log).open("a") as file:
        file.write(f"{value} {seed}\n")
    if value < 0:
        raise ArithmeticError(f"{value} is below 0")
    if value == 0:
        raise DatasetError("zeros are nowhere on this machine")
    return {"score": value + spread * seed, "half": value / 2, "unknown": float("nan")}


def table(log: Path, *values: float) -> Table:
    """Return a table with a row for each value, and a second row on the first value's run."""
    rows = [
        Row(
            method=f"value {value:g}",
            setting="made up",
            run=run,
            arguments={"value": value, "log": str(log)},
            metric="score",
            reference=10.0,
            tolerance=1.5,
            source="nowhere",
        )
        for value in values
    ]
    half = Row(
        method="half",
        setting="made up",
        run=run,
        arguments=rows[0].arguments,
        metric="half",
        reference=5.0,
        tolerance=0.0,
    )
    return Table(
        name="made-up",
        title="A made-up table",
        about="Nothing is learned.",
        rule="none",
        rows=(*rows, half),
        minutes=0.1,
        num_seeds=3,
        quick={"spread": 0.0},
    )
