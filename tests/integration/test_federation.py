"""The fused way of asking a fleet gives what the faithful way gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgelearn.errors import RunError
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]

SERVERS = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedAdam": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedProx": {"proximal_mu": 0.5},
}
DIFFERS = {"wall_s", "cpu_s", "engine", "updates_per_s"}


def lines(directory: Path) -> list[dict[str, object]]:
    text = (directory / "record.jsonl").read_text()
    return [
        {k: v for k, v in json.loads(line).items() if k not in DIFFERS}
        for line in text.splitlines()
    ]


def assert_alike(one: Path, other: Path) -> None:
    """The same record but for rounding of sums over devices, and parameters to 1e-6."""
    for found, expected in zip(lines(one), lines(other), strict=True):
        for name, rel in (("loss", 1e-5), ("energy_j", 1e-12)):
            if found.get(name) is not None:
                assert found.pop(name) == pytest.approx(expected.pop(name), rel=rel)
        assert found == expected
    parameters = [load_file(run / "model.safetensors") for run in (one, other)]
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("server", SERVERS)
def test_fused_equals_faithful(small: Make, tmp_path: Path, server: str) -> None:
    scenario = small(server={"strategy": server, "args": SERVERS[server]})
    for mode in ("faithful", "fused"):
        record = simulate(scenario, out=tmp_path / mode, federation=mode)
        assert record.run["engine"]["federation"] == mode
    assert_alike(tmp_path / "fused", tmp_path / "faithful")


def test_late_offline_and_rejected_devices_are_the_same_ones(small: Make, tmp_path: Path) -> None:
    slow = tmp_path / "slow.toml"
    slow.write_text(
        "memory_mib = 64\ntrain_gflops = 0.000002\ndownlink_mbps = 1\nuplink_mbps = 1\n"
        "power_w = 1\nradio_j_per_mb = 1\navailability = 0.9\n"
    )
    scenario = small(
        fleet={
            "num_devices": 8,
            "cohort": 5,
            "deadline_s": 10.0,
            "profiles": {str(slow): 0.5, "phone-mid": 0.5},
        },
        server={"max_update_norm": 0.08},
    )
    for mode in ("faithful", "fused"):
        record = simulate(scenario, out=tmp_path / mode, federation=mode)
    seen = {name for line in record.rounds for name, n in line["outcomes"].items() if n}
    assert {"ok", "late", "rejected"} <= seen
    assert_alike(tmp_path / "fused", tmp_path / "faithful")


def test_robust_strategies_get_every_reply(small: Make) -> None:
    scenario = small(server={"strategy": "FedMedian"})
    assert simulate(scenario).run["engine"]["federation"] == "faithful"
    with pytest.raises(RunError, match=r"only averages \(FedAvg, .*not FedMedian; use faithful"):
        simulate(scenario, federation="fused")
    with pytest.raises(RunError, match=r"unknown federation 'fuse' .did you mean 'fused'"):
        simulate(scenario, federation="fuse")


def test_a_resumed_run_goes_on_as_it_began(small: Make, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 2:
            raise Stop

    scenario = small(server={"strategy": "FedAdam"})
    simulate(scenario, out=tmp_path / "whole", federation="faithful", engine="reference")
    with pytest.raises(Stop):
        simulate(
            scenario,
            out=tmp_path / "parts",
            federation="faithful",
            engine="reference",
            on_round=stop,
            checkpoint_every_s=0,
        )
    resume(tmp_path / "parts")
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert models[0] == models[1]
