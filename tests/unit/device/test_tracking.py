"""What a device sees of its ranges after training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgelearn.device.learner import Learner
from edgelearn.device.learners import make_learner
from edgelearn.device.runtimes import RANGES, kept_in, num_ranges, places_of, remembered
from edgelearn.device.state import DeviceState
from edgelearn.device.tracking import Tracker, Trackers
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.ranges import Kept
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_scenario


def world_of(recalibrate: str, name: str = "int8") -> World:
    return build(
        toy_scenario(
            runtime={"recalibrate": recalibrate, "name": name, "num_calibration": 6},
            client={"strategy": "replay", "args": {"capacity": 4}},
        )
    )


@pytest.fixture(scope="module")
def world() -> World:
    return world_of("tracked")


@pytest.fixture
def learner(world: World) -> Learner:
    return make_learner(world)


@pytest.fixture
def tracker(world: World, learner: Learner) -> Tracker:
    found = Tracker.of(world, learner, Int8Runtime())
    assert found is not None
    return found


def observed(tracker: Tracker, state: DeviceState, num: int = 1) -> DeviceState:
    """A state with ranges of width 0."""
    kept = replace(Kept.none(tracker.places), num_observed=num)
    return replace(state, memory=remembered(state.memory, kept))


def test_ranges_widen_to_those_of_the_trained_weights(
    world: World, learner: Learner, tracker: Tracker
) -> None:
    """On samples that it has at hand, of which six take part."""
    samples = world.train_samples(0, 0)
    state = observed(tracker, learner.initial_state(world.train))
    kept_id = samples.ids[:1]
    buffer = torch.cat([kept_id, torch.full((3,), -1, dtype=torch.int32)])
    state = replace(state, memory=state.memory.replace(buffer=buffer))
    given, update = learner.initial(), torch.full((learner.layout.size,), 0.5)
    new = tracker.after(state, given, update, samples)
    ids = learner.calibration_ids(state, samples, most=6)
    x = world.train.batch(ids).x
    with torch.no_grad():
        found = Int8Runtime().prepare(learner.model, given + update).observed(x)
    least, most = tracker.places.pack(found).unbind(-1)
    expected = torch.stack([least.clamp(max=0), most.clamp(min=0)], -1)
    assert torch.equal(new.memory[RANGES], expected.repeat(1, 2))
    assert (most > 0).all()
    kept = kept_in(new.memory, tracker.places)
    assert kept is not None
    assert kept.num_observed == 1
    assert tracker.after(new, given, update, samples) is new  # nothing is wider than before


def test_nothing_changes_where_there_is_nothing_to_widen(
    world: World, learner: Learner, tracker: Tracker
) -> None:
    samples, given = world.train_samples(0, 0), learner.initial()
    fresh = learner.initial_state(world.train)
    assert tracker.after(fresh, given, given, samples) is fresh  # nothing was observed yet
    state = observed(tracker, fresh)
    none = Samples(world.train, samples.ids[:0])
    assert tracker.after(state, given, given, none) is state  # it did not train


def test_who_tracks(world: World, learner: Learner) -> None:
    assert Trackers.of(world) is not None
    state = learner.initial_state(world.train)
    assert Trackers(world).after(0, state, learner.initial(), learner.initial(), None) is state  # type: ignore[arg-type]
    for other in ("always", "on-drift"):
        found = world_of(other)
        assert Trackers.of(found) is None
        assert Tracker.of(found, make_learner(found), Int8Runtime()) is None
    floats = world_of("tracked", "float")
    plain = make_learner(floats)
    assert RANGES not in plain.declaration
    assert num_ranges(floats, plain.model, ("", 1.0)) == 0
    state = plain.initial_state(floats.train)
    assert Trackers(floats).after(0, state, plain.initial(), plain.initial(), None) is state  # type: ignore[arg-type]


def test_places_are_those_of_the_network_and_its_runtime(world: World, learner: Learner) -> None:
    places = places_of(world, Int8Runtime(), learner.model)
    assert places is not None
    assert learner.declaration[RANGES].shape == (len(places.names), 4)
    assert places_of(world_of("always"), Int8Runtime(), learner.model) is None
