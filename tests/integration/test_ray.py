"""The ray tier on a local Ray of two workers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.spec import Scenario

ray = pytest.importorskip("ray", reason="needs edgelearn[ray]")

Make = Callable[..., Scenario]
# Ray's own, at its import and start.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


DEADLY = """
    import os
    from edgelearn import ClientStrategy

    class Deadly(ClientStrategy):
        def extend(self, batch, memory, generator):
            if (batch.y == 3).any():
                os._exit(9)
            return batch
"""


def test_a_part_whose_actor_dies_is_recorded_as_failed(small: Make, tmp_path: Path) -> None:
    """On a cluster that the run starts and stops."""
    plugin = tmp_path / "deadly.py"
    plugin.write_text(textwrap.dedent(DEADLY))
    scenario = small(
        client={"strategy": f"{plugin}:Deadly", "args": {}},
        partition={"kind": "dirichlet", "alpha": 0.05},
        stream={"num_experiences": 1, "rounds_per_experience": 2},
        data={"dataset": "digits"},
    )
    record = simulate(scenario, engine="ray", num_workers=2)
    assert record.is_complete
    outcomes = [line["outcomes"] for line in record.rounds]
    assert sum(found["failed"] for found in outcomes) > 0
    assert sum(found["ok"] for found in outcomes) > 0
    reasons = {p["reason"] for line in record.rounds for p in line["problems"]}
    assert all(reason.startswith("its Ray actor died") for reason in reasons)
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that several runs use, each with actors of its own."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("client", "federation"),
    [("replay", "fused"), ("ewc", "faithful"), ("replay+scaffold", "fused")],
)
def test_the_same_bits_as_one_machine(
    cluster: None, small: Make, tmp_path: Path, client: str, federation: str
) -> None:
    keeps_ranges = {"recalibrate": "tracked" if client == "ewc" else "always"}
    scenario = small(client={"strategy": client, "args": {}}, runtime=keeps_ranges)
    record = simulate(
        scenario, out=tmp_path / "ray", engine="ray", num_workers=2, federation=federation
    )
    assert (record.run["engine"]["tier"], record.run["engine"]["workers"]) == ("ray", 2)
    inner = record.run["engine"]["reason"].split()[-2]
    alone = simulate(scenario, out=tmp_path / "alone", engine=inner, federation=federation)
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("ray", "alone")]
    assert models[0] == models[1]
    for one, other in zip(record.rounds, alone.rounds, strict=True):
        for key in ("cohort", "outcomes", "problems", "accuracy", "bytes_up", "clock_s"):
            assert one[key] == other[key], key
