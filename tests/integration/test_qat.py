"""A fleet that trains through rounding, in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelearn.errors import RunError
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]
ARGS: dict[str, Any] = {"qat": {"bits": 4}, "replay": {"capacity": 10}}


def model_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


class Stop(BaseException):
    """Stands for the death of the process."""


def test_workers_and_interruptions_change_nothing(small: Make, tmp_path: Path) -> None:
    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 3:
            raise Stop

    scenario = small(client={"strategy": "replay+qat", "args": ARGS})
    simulate(scenario, out=tmp_path / "one", engine="reference")
    simulate(scenario, out=tmp_path / "two", engine="pool", num_workers=2)
    with pytest.raises(Stop):
        simulate(
            scenario,
            out=tmp_path / "parts",
            on_round=stop,
            checkpoint_every_s=0,
            engine="reference",
        )
    resume(tmp_path / "parts")
    assert model_of(tmp_path / "one") == model_of(tmp_path / "two")
    assert model_of(tmp_path / "one") == model_of(tmp_path / "parts")


@pytest.mark.parametrize("engine", ["batched", "native"])
def test_stacks_of_devices_are_refused(small: Make, engine: str) -> None:
    """And not trained without the rounding."""
    with pytest.raises(RunError, match=r"(?i)does more in a round|computes what it does"):
        simulate(small(client={"strategy": "qat", "args": {}}), engine=engine)


def test_the_network_is_another_than_without(small: Make, tmp_path: Path) -> None:
    for name in ("naive", "qat"):
        simulate(small(client={"strategy": name, "args": {}}), out=tmp_path / name)
    assert model_of(tmp_path / "naive") != model_of(tmp_path / "qat")
