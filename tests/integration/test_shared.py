"""What travels beside the network, and what stays behind, in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgelearn.api import compare
from edgelearn.errors import RunError, ScenarioError
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]
SHARING = ("scaffold", "fedcurv")
IN_ROUNDS = (*SHARING, "fedper", "fedrep", "moon", "replay+scaffold", "fedcurv+fedper")
DIFFERS = {"wall_s", "cpu_s", "engine", "updates_per_s"}


def with_client(small: Make, name: str, **tables: Any) -> Scenario:
    return small(client={"strategy": name, "args": {}}, **tables)


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in DIFFERS} for line in found]


def model_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", IN_ROUNDS)
def test_any_number_of_workers(small: Make, tmp_path: Path, name: str) -> None:
    scenario = with_client(small, name)
    simulate(scenario, out=tmp_path / "one", engine="reference")
    simulate(scenario, out=tmp_path / "two", engine="pool", num_workers=2)
    assert model_of(tmp_path / "one") == model_of(tmp_path / "two")
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


@pytest.mark.parametrize("name", IN_ROUNDS)
def test_fused_equals_faithful(small: Make, tmp_path: Path, name: str) -> None:
    scenario = with_client(small, name, partition={"kind": "dirichlet", "alpha": 0.3})
    for mode in ("faithful", "fused"):
        record = simulate(scenario, out=tmp_path / mode, federation=mode)
        assert record.run["engine"]["federation"] == mode
    for one, other in zip(lines(tmp_path / "fused"), lines(tmp_path / "faithful"), strict=True):
        for key in ("loss", "energy_j"):  # sums in another order
            if one.get(key) is not None:
                assert one.pop(key) == pytest.approx(other.pop(key), rel=1e-5)
        assert one == other
    fused, faithful = (load_file(tmp_path / m / "model.safetensors") for m in ("fused", "faithful"))
    for key, value in fused.items():
        torch.testing.assert_close(value, faithful[key], rtol=1e-6, atol=1e-6)


class Stop(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("name", IN_ROUNDS)
@pytest.mark.parametrize("federation", ["faithful", "fused"])
def test_a_resumed_run_ends_in_the_same_bits(
    small: Make, tmp_path: Path, name: str, federation: str
) -> None:
    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 3:
            raise Stop

    scenario, how = with_client(small, name), {"federation": federation, "engine": "reference"}
    simulate(scenario, out=tmp_path / "whole", **how)
    with pytest.raises(Stop):
        simulate(scenario, out=tmp_path / "parts", on_round=stop, checkpoint_every_s=0, **how)
    resume(tmp_path / "parts")
    assert model_of(tmp_path / "whole") == model_of(tmp_path / "parts")
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


@pytest.mark.parametrize(("name", "times"), [("scaffold", 2), ("fedcurv", 3), ("fedper", 1)])
def test_bytes_are_booked_and_what_is_served_is_the_network(
    small: Make, name: str, times: int
) -> None:
    plain = simulate(with_client(small, "naive"))
    record = simulate(with_client(small, name))
    for key in ("num_parameters", "model_bytes"):
        assert record.run[key] == plain.run[key]
    assert record.run["num_parameters"] * 4 == record.run["model_bytes"]["float"]
    network = 4 * plain.run["num_parameters"]
    more = record.rounds[0]["bytes_up"] - plain.rounds[0]["bytes_up"]
    assert more / 3 == pytest.approx((times - 1) * network, rel=0.1)  # 3 devices sent an update


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("server", ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "QFedAvg"])
def test_servers_that_step_are_refused(small: Make, tmp_path: Path, name: str, server: str) -> None:
    scenario = with_client(small, name, server={"strategy": server})
    with pytest.raises(ScenarioError, match=f"{server} makes steps of its own .*'{name}' sends"):
        simulate(scenario, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_servers_that_step_may_where_nothing_is_shared(small: Make) -> None:
    assert simulate(with_client(small, "moon", server={"strategy": "FedAdam"})).is_complete


@pytest.mark.parametrize(
    ("server", "args"),
    [("Krum", {"num_malicious_nodes": 0}), ("FedMedian", {}), ("FedProx", {"proximal_mu": 0.1})],
)
def test_servers_that_choose_or_average_are_not(
    small: Make, server: str, args: dict[str, Any]
) -> None:
    for name in SHARING:
        scenario = with_client(small, name, server={"strategy": server, "args": args})
        record = simulate(scenario)
        assert all(line["outcomes"]["ok"] == 3 for line in record.rounds)


LEAKY = """
from edgelearn.continual.scaffold import Scaffold
from edgelearn import ClientStrategy, Update
import torch


class Leaky(ClientStrategy):
    def shares(self, model, facts):
        return Scaffold().shares(model, facts)

    def upload(self, update, data, memory):
        return Update({**update.arrays, "shared/more": data.batch().x}, update.metrics)
"""


def test_the_guard_knows_what_is_shared(small: Make, tmp_path: Path) -> None:
    plugin = tmp_path / "leaky.py"
    plugin.write_text(LEAKY)
    with pytest.raises(RunError, match=r"not declared .*declared: .*shared/control"):
        simulate(with_client(small, f"{plugin}:Leaky"))


def test_the_device_and_the_servers_proximity_are_one(small: Make, tmp_path: Path) -> None:
    mine = small(client={"strategy": "fedprox", "args": {"mu": 0.5}})
    theirs = small(
        client={"strategy": "naive", "args": {}},
        server={"strategy": "FedProx", "args": {"proximal_mu": 0.5}},
    )
    for federation in ("faithful", "fused"):
        ends = []
        for who, scenario in (("mine", mine), ("theirs", theirs)):
            out = tmp_path / f"{federation}-{who}"
            record = simulate(scenario, out=out, federation=federation)
            ends.append((record.run["engine"]["tier"], model_of(out)))
        assert ends[0] == ends[1]


def test_compared_by_name(small: Make) -> None:
    clients = ("naive", "fedprox", "scaffold", "fedper")
    found: dict[str, list[RunRecord]] = compare(with_client(small, "naive"), clients=clients)
    assert {name: len(records) for name, records in found.items()} == dict.fromkeys(clients, 1)
    assert all(records[0].is_complete for records in found.values())
