"""Same scenario, same seed, same bits; for any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]


def bits(scenario: Scenario, directory: Path, **options: object) -> bytes:
    simulate(scenario, out=directory, **options)
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("client", ["naive", "replay", "ewc"])
def test_any_number_of_workers(small: Make, tmp_path: Path, client: str) -> None:
    scenario = small(client={"strategy": client, "args": {}})
    expected = bits(scenario, tmp_path / "reference", engine="reference")
    counts = (1, 2, 3, 8) if client == "replay" else (2,)
    for workers in counts:
        engine = {"engine": "pool", "num_workers": workers}
        assert bits(scenario, tmp_path / str(workers), **engine) == expected


def test_the_seed_decides(small: Make, tmp_path: Path) -> None:
    first = bits(small(seed=1), tmp_path / "a")
    assert bits(small(seed=1), tmp_path / "b") == first
    assert bits(small(seed=2), tmp_path / "c") != first


def test_the_evaluation_has_no_effect_on_learning(small: Make, tmp_path: Path) -> None:
    first = bits(small(), tmp_path / "a")
    assert bits(small(evaluate={"every_rounds": 2}), tmp_path / "b") == first
