"""Flower's strategies run as they are, by name, and can be resumed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelearn.errors import RunError, ScenarioError, StateError
from edgelearn.federated.server import strategy_names
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]
ARGS = {
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_momentum": 0.9},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4},
    "Bulyan": {"num_malicious_nodes": 1},
}


def with_server(small: Make, name: str, **args: object) -> Scenario:
    return small(
        fleet={"num_devices": 8, "cohort": 7}, server={"strategy": name, "args": args or {}}
    )


class Stop(BaseException):
    """Ends a run as a dead process would."""


@pytest.mark.parametrize("name", strategy_names())
def test_it_runs_and_resumes(small: Make, tmp_path: Path, name: str) -> None:
    scenario = with_server(small, name, **ARGS.get(name, {}))
    record = simulate(scenario, out=tmp_path / "whole")
    assert record.is_complete
    assert all(line["outcomes"]["ok"] + line["outcomes"]["idle"] == 7 for line in record.rounds)

    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 3:
            raise Stop

    with pytest.raises(Stop):
        simulate(scenario, out=tmp_path / "parts", on_round=stop, checkpoint_every_s=0)
    resume(tmp_path / "parts")
    final = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert final[0] == final[1]


def test_all_named_strategies_are_flowers(small: Make) -> None:
    assert {"FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedProx", "FedMedian", "Krum"} <= set(
        strategy_names()
    )
    with pytest.raises(ScenarioError, match="did you mean 'FedMedian'"):
        simulate(with_server(small, "FedMedain"))
    with pytest.raises(ScenarioError, match="did you mean 'proximal_mu'"):
        simulate(with_server(small, "FedProx", proximal_nu=1.0))


PLUGIN = """
    from flwr.serverapp.strategy import FedAvg

    class Mine(FedAvg):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.seen = {seen}

        def aggregate_train(self, server_round, replies):
            {body}
            return super().aggregate_train(server_round, replies)
"""


def plugin(folder: Path, *, seen: str = "[]", body: str = "pass") -> str:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(PLUGIN).format(seen=seen, body=body))
    return f"{path}:Mine"


def test_a_strategy_of_ones_own(small: Make, tmp_path: Path) -> None:
    reference = plugin(tmp_path, body="self.seen.append(server_round)")
    assert simulate(with_server(small, reference), out=tmp_path / "run").is_complete


def test_state_that_a_checkpoint_cannot_hold_is_named(small: Make, tmp_path: Path) -> None:
    scenario = with_server(small, plugin(tmp_path, seen="object()"))
    with pytest.raises(StateError, match=r"Mine keeps a object in 'seen'.*state_dict"):
        simulate(scenario, out=tmp_path / "run", checkpoint_every_s=0)


def test_a_strategy_that_raises_is_named(small: Make, tmp_path: Path) -> None:
    reference = plugin(tmp_path, body="raise ValueError('no majority')")
    with pytest.raises(RunError, match=r"round 1: Mine.aggregate_train raised ValueError: no maj"):
        simulate(with_server(small, reference))


def test_an_exploding_update_is_rejected_by_name(small: Make) -> None:
    scenario = small(server={"strategy": "FedAvg", "max_update_norm": 1e-9})
    record = simulate(scenario)
    for line in record.rounds:
        assert line["outcomes"]["rejected"] + line["outcomes"]["idle"] == 3
        assert "the update's norm" in line["problems"][0]["reason"]
    assert len({tuple(line["accuracy"]["float"]) for line in record.rounds}) == 1  # nothing moved
