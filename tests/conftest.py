"""What all tests share: one torch thread, repeatable examples, and a small valid scenario."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run, no files beside the code, no clock.
settings.register_profile(
    "edgelearn",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("edgelearn")

_SCENARIO: dict[str, Any] = {
    "name": "toy",
    "data": {"dataset": "digits"},
    "model": {"name": "mlp", "args": {"hidden": [8]}},
    "fleet": {"num_devices": 6, "cohort": 3},
    "stream": {
        "kind": "class-incremental",
        "num_experiences": 5,
        "rounds_per_experience": 2,
    },
    "client": {"strategy": "naive", "lr": 0.05},
}


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_searched() -> None:
    """Spare the collector what was imported: Flower's QFedAvg calls it for every array."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def raw() -> dict[str, Any]:
    """A valid scenario as nested dictionaries, for the test to change."""
    return copy.deepcopy(_SCENARIO)
