"""A fleet that prunes, in whole runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgelearn.device.learner import Learner
from edgelearn.device.state import Fit
from edgelearn.errors import ScenarioError
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.spec import Scenario

Make = Callable[..., Scenario]
OWN = {"sparsity": 0.7, "num_prunings": 3}
NAMES: dict[str, dict[str, Any]] = {
    "pruned": OWN,
    "pruned+ewc": {"pruned": OWN, "ewc": {"strength": 100.0}},
    "pruned+replay": {"pruned": OWN, "replay": {"capacity": 10}},
}
STREAM = {"num_experiences": 2, "rounds_per_experience": 3}


def scenario_of(small: Make, name: str, **tables: Any) -> Scenario:
    return small(client={"strategy": name, "args": NAMES[name]}, stream=STREAM, **tables)


def weights_of(directory: Path) -> Tensor:
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([v.flatten() for k, v in tensors.items() if v.dim() > 1])


class Stop(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("federation", ["faithful", "fused"])
def test_zeros_survive_a_run_and_its_interruption(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, federation: str
) -> None:
    locals_of: dict[int, list[Tensor]] = {}
    fit = Learner.fit

    def spy(self: Learner, state: Any, params: Tensor, data: Any, **how: Any) -> Fit:
        done = fit(self, state, params, data, **how)
        local = params + self.model.layout.flatten(done.update.arrays)
        locals_of.setdefault(how["server_round"], []).append(local[: self.model.layout.num_trained])
        return done

    def stop(progress: object) -> None:
        if getattr(progress, "server_round", 0) == 4:
            raise Stop

    scenario = scenario_of(small, name)
    how: dict[str, Any] = {"federation": federation, "engine": "reference"}
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "fit", spy)
        simulate(scenario, out=tmp_path / "whole", **how)
    assert sorted(locals_of) == [1, 2, 3, 4, 5, 6]
    zeros = [torch.stack([p == 0 for p in locals_of[r]]) for r in sorted(locals_of)]
    for earlier, later in itertools.pairwise(zeros):
        assert (later == later[0]).all()  # on all devices
        assert not (earlier[0] & ~later[0]).any()
    weights = weights_of(tmp_path / "whole")
    largest = weights.abs().max()
    number = round(0.7 * len(weights))
    assert int(zeros[-1][0].sum()) == number
    if federation == "faithful":
        assert int((weights == 0).sum()) == number
    assert int((weights.abs() <= 1e-6 * largest).sum()) == number

    with pytest.raises(Stop):
        simulate(scenario, out=tmp_path / "parts", on_round=stop, checkpoint_every_s=0, **how)
    resume(tmp_path / "parts")
    whole, parts = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "parts"))
    assert whole == parts


def test_any_number_of_workers(small: Make, tmp_path: Path) -> None:
    scenario = scenario_of(small, "pruned+replay")
    simulate(scenario, out=tmp_path / "one", engine="reference")
    simulate(scenario, out=tmp_path / "two", engine="pool", num_workers=2)
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("one", "two"))
    assert one == two


def test_the_mask_costs_no_bytes_but_the_count(small: Make) -> None:
    plain = simulate(small(client={"strategy": "naive", "args": {}}, stream=STREAM))
    record = simulate(scenario_of(small, "pruned"))
    more = record.rounds[0]["bytes_up"] - plain.rounds[0]["bytes_up"]
    assert 0 < more <= 3 * 300  # a number and its name, from 3 devices


def test_servers_that_step_are_refused(small: Make) -> None:
    with pytest.raises(ScenarioError, match="FedAdam makes steps of its own"):
        simulate(scenario_of(small, "pruned", server={"strategy": "FedAdam"}))
