"""A small scenario on real data, for whole runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import edgelearn
from edgelearn.scenario.spec import Scenario

SMALL = {
    "data": {"max_train": 300, "max_test": 80},
    "model": {"args": {"hidden": [16]}},
    "fleet": {"num_devices": 6, "cohort": 3},
    "stream": {"num_experiences": 2, "rounds_per_experience": 2},
    "client": {"epochs": 1},
}


@pytest.fixture
def small() -> Callable[..., Scenario]:
    """Return a function that makes the small scenario, with values replaced."""

    def make(**tables: object) -> Scenario:
        merged: dict[str, object] = {**SMALL}
        for table, value in tables.items():
            before = merged.get(table)
            both = isinstance(before, dict) and isinstance(value, dict)
            merged[table] = {**before, **value} if both else value
        return edgelearn.load("split-digits", **merged)

    return make
