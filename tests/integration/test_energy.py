"""Energy in the record is what the profile makes of work and bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgelearn import simulate
from edgelearn.device.profile import load_profile
from edgelearn.fleet.plan import forward_flops
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build

Make = Callable[..., Scenario]


@pytest.mark.parametrize("federation", ["faithful", "fused"])
def test_a_round_costs_what_its_work_and_bytes_cost(small: Make, federation: str) -> None:
    scenario = small(
        fleet={"num_devices": 1, "cohort": 1, "profiles": {"phone-mid": 1.0}},
        client={"strategy": "naive", "args": {}, "epochs": 2},
    )
    world, profile = build(scenario), load_profile("phone-mid")
    record = simulate(scenario, federation=federation, engine="reference")
    spent = 0.0
    for line in record.rounds:
        samples = 2 * len(world.train_samples(0, line["position"]))
        expected = profile.energy_j(
            train_s=profile.train_s(3 * forward_flops(world) * samples),
            num_bytes=line["bytes_up"] + line["bytes_down"],
        )
        assert line["energy_j"] == pytest.approx(expected, rel=1e-9)
        spent += expected
    assert record.spent("energy")[-1] == pytest.approx(spent)
    assert 0 < record.area("energy") < 1
