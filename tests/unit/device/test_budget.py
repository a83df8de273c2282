"""Whether a fleet's devices have the memory that learning needs, and what a run says if not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from edgelearn.continual.naive import Naive
from edgelearn.device import budget
from edgelearn.device.budget import Ways, at_least, at_most, budget_faults, candidates
from edgelearn.device.learners import FleetLearners, make_learner
from edgelearn.device.profile import assign
from edgelearn.errors import Fault, ScenarioError
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.spec import ClientSpec
from edgelearn.scenario.world import World, build

CNN = {"name": "cnn", "args": {"channels": [8, 8], "hidden": 16}}
REST = "train_gflops = 1\ndownlink_mbps = 1\nuplink_mbps = 1\npower_w = 1\nradio_j_per_mb = 1\n"


def board(folder: Path, num_bytes: float, name: str = "board") -> str:
    path = folder / f"{name}.toml"
    path.write_text(f"memory_mib = {num_bytes / 2**20!r}\n{REST}")
    return str(path)


def with_profiles(raw: dict[str, Any], *references: str) -> World:
    raw["data"]["max_train"] = 300
    raw["fleet"]["profiles"] = dict.fromkeys(references, 1.0)
    return build(from_dict(raw))


def faults(world: World) -> list[Fault]:
    fleet, seed = world.scenario.fleet, world.scenario.seed
    profiles = assign(fleet.profiles, fleet.num_devices, seed)
    return list(budget_faults(world, FleetLearners(world), profiles))


def needed(raw: dict[str, Any]) -> int:
    world = build(from_dict(raw))
    return Ways(world).way(world.kinds.kinds[0], {}).training_bytes


def test_a_run_is_refused_where_fit_check_says_so(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"] = CNN
    raw["client"] |= {"batch_size": 32, "momentum": 0.9}
    raw["data"]["max_train"] = 300
    limit = needed(raw)
    assert not faults(with_profiles(raw, board(tmp_path, limit)))
    reference = board(tmp_path, limit - 1)
    (fault,) = faults(with_profiles(raw, reference))
    assert (fault.table, fault.key) == ("fleet.profiles", reference)
    for part in ("learning needs 0.", " MiB (kernels ", "it fits with --set client.accumulate=2"):
        assert part in fault.message
    assert f"see `edgelearn fit-check SCENARIO --profile {reference}`" in fault.message
    with pytest.raises(ScenarioError, match="learning needs"):
        simulate(from_dict(raw))


def test_boards_of_one_name_are_told_apart(raw: dict[str, Any], tmp_path: Path) -> None:
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    large, small = board(tmp_path / "large", 1e8), board(tmp_path / "small", 1_000)
    for references in ((large, small), (small, large)):
        (fault,) = faults(with_profiles(raw, *references))
        assert fault.key == small
        assert f"--profile {small}`" in fault.message


def test_where_no_option_helps_the_refusal_says_so(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "candidates", lambda _: iter([{"train": "bias"}]))
    (fault,) = faults(with_profiles(raw, board(tmp_path, 9_000)))
    assert "no option of [client] makes it fit" in fault.message
    (fault,) = faults(with_profiles(raw, board(tmp_path, 1_000)))
    assert "answering needs" in fault.message
    assert "a smaller network is needed" in fault.message


def test_steps_are_taken_only_where_there_is_doubt(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def needs(*arguments: Any, **options: Any) -> Any:
        counted.append(arguments)
        return original(*arguments, **options)

    original = budget.needs
    monkeypatch.setattr(budget, "needs", needs)
    assert not faults(with_profiles(raw, "phone-mid", "sensor-hub"))
    assert not counted
    both = board(tmp_path, 2e5), board(tmp_path, 3e5, "other")
    assert not faults(with_profiles(raw, *both))
    assert len(counted) == 1, "one network, two profiles"


class Failing(Naive):
    """Raises in its first step."""

    def loss(self, *_: Any) -> Any:
        raise RuntimeError("not today")


def test_what_can_not_be_counted_is_held_against_a_lower_bound(
    raw: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw["client"]["strategy"] = f"{__file__}:Failing"
    least = 3 * 4 * (64 * 8 + 8 + 8 * 10 + 10)
    with caplog.at_level(logging.WARNING):
        assert not faults(with_profiles(raw, board(tmp_path, least)))
    assert "what learning takes on board was not counted: RuntimeError: not today" in caplog.text
    (fault,) = faults(with_profiles(raw, board(tmp_path, least - 1)))
    assert "learning needs more than" in fault.message


HEAVY = ("agem", "fedcurv", "fot", "gem", "int8-train", "maml", "naive", "replay", "si")


@pytest.mark.parametrize("strategy", HEAVY)
def test_the_rule_of_thumb_has_room(raw: dict[str, Any], strategy: str) -> None:
    """Without its constant part, which alone is more than these need."""
    raw["client"] |= {"strategy": strategy, "batch_size": 2}
    raw["data"]["max_train"] = 300
    world = build(from_dict(raw))
    learner, found = make_learner(world), needed(raw)
    assert at_least(learner) <= found
    assert found <= (at_most(learner, world.sample_shape) - 2**20) / 2


def test_candidates_begin_with_what_changes_no_result() -> None:
    found = list(candidates(ClientSpec(strategy="naive", lr=0.1, batch_size=10)))
    assert found[:4] == [{"accumulate": n} for n in (2, 4, 8, 10)]
    assert found[4:6] == [{"checkpoint": True}, {"checkpoint": True, "accumulate": 10}]
    assert all("train" in changes for changes in found[6:])
    assert len(found) == 6 + 9
    chosen = ClientSpec(strategy="naive", lr=0.1, batch_size=1, train="bias", checkpoint=True)
    assert list(candidates(chosen)) == []
