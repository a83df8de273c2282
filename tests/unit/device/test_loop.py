from __future__ import annotations

import pytest
import torch

import edgelearn
from edgelearn.device.learners import make_learner
from edgelearn.device.loop import DeviceLoop
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.errors import DivergenceError, StateError
from edgelearn.runtime.int8 import Int8Prepared, Int8Runtime
from edgelearn.scenario.samples import OwnedSamples
from edgelearn.scenario.world import build


@pytest.fixture(scope="module")
def world():
    return build(
        edgelearn.load(
            "split-digits",
            data={"max_train": 400, "max_test": 100},
            fleet={"num_devices": 1, "cohort": 1},
            client={"args": {"capacity": 20}},
        )
    )


def wake(world, directory, learner=None, **options):
    return DeviceLoop(
        learner or make_learner(world),
        Int8Runtime(),
        directory,
        encoding=world.train.encoding,
        sample_shape=world.sample_shape,
        **options,
    )


def shown(world, position):
    samples = world.train_samples(0, position)
    return world.train.stored(samples.ids), samples.labels


def share(device, x, labels):
    return float((device.infer(x) == labels).float().mean())


def live(device, world, positions):
    for position in positions:
        device.feedback(*shown(world, position))
        for _ in range(3):
            device.learn()
        device.end_experience()


def test_it_learns_from_feedback_and_remembers(world, tmp_path):
    device = wake(world, tmp_path)
    assert share(device, *shown(world, 1)) < 0.6
    live(device, world, (0, 1))
    assert share(device, *shown(world, 0)) > 0.8
    assert share(device, *shown(world, 1)) > 0.9
    assert device.position == 2


def test_ranges_are_observed_anew_only_when_they_drift(world, tmp_path, monkeypatch):
    rows = []
    observed = Int8Prepared.observed
    monkeypatch.setattr(
        Int8Prepared, "observed", lambda self, x: rows.append(len(x)) or observed(self, x)
    )
    device = wake(world, tmp_path, recalibrate="on-drift")
    device.feedback(*shown(world, 0))
    for _ in range(4):
        device.infer(shown(world, 0)[0])
        device.learn()
    x, labels = shown(world, 0)
    assert share(device, x, labels) > 0.9
    assert rows[:2] == [8, 64]
    assert rows.count(8) == 5  # a probe for each model
    assert 1 <= rows.count(64) < 5
    with pytest.raises(ValueError, match="recalibrate is 'never'; allowed are always, on-drift"):
        wake(world, tmp_path, recalibrate="never")


def test_it_survives_a_restart_between_any_two_steps(world, tmp_path):
    whole = wake(world, tmp_path / "whole")
    live(whole, world, (0, 1))
    for position in (0, 1):
        wake(world, tmp_path / "restarted").feedback(*shown(world, position))
        device = wake(world, tmp_path / "restarted")
        for _ in range(3):
            device.learn()
        wake(world, tmp_path / "restarted").end_experience()
    again = wake(world, tmp_path / "restarted")
    assert again.position == 2
    assert torch.equal(again.params, whole.params)
    x, _ = shown(world, 0)
    assert torch.equal(again.infer(x), whole.infer(x))


def test_only_what_is_remembered_stays_on_the_device(world, tmp_path):
    device = wake(world, tmp_path)
    live(device, world, (0,))
    assert int(device._stored.samples.used.sum()) == 20
    unused = device._stored.samples.x[~device._stored.samples.used]
    assert not unused.any()


def test_a_diverging_lesson_changes_nothing(world, tmp_path):
    device = wake(world, tmp_path)
    live(device, world, (0,))
    before, scores = device.params, share(device, *shown(world, 0))
    device.feedback(*shown(world, 1))
    wild = edgelearn.load(
        "split-digits", client={"lr": 1e30}, fleet={"num_devices": 1, "cohort": 1}
    )
    learner = make_learner(world)
    object.__setattr__(learner, "spec", wild.client)
    reckless = wake(world, tmp_path, learner)
    with pytest.raises(DivergenceError):
        reckless.learn()
    assert torch.equal(reckless.params, before)
    assert share(wake(world, tmp_path), *shown(world, 0)) == scores


def test_parameters_of_the_fleet_are_adopted(world, tmp_path):
    device = wake(world, tmp_path)
    device.adopt(torch.zeros_like(device.params))
    assert not wake(world, tmp_path).params.any()
    with pytest.raises(StateError, match="the network has"):
        device.adopt(torch.zeros(3))


def test_no_feedback_is_no_lesson(world, tmp_path):
    device = wake(world, tmp_path)
    before = device.params
    assert device.learn() == 0.0
    assert torch.equal(device.params, before)


def test_damaged_parameters_are_named(world, tmp_path):
    live(wake(world, tmp_path), world, (0,))
    path = tmp_path / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StateError, match=r"parameters\.safetensors: damaged or truncated"):
        wake(world, tmp_path)


def test_a_strategy_that_needs_public_samples_is_refused_where_there_are_none(tmp_path):
    scenario = edgelearn.load(
        "split-digits",
        data={"max_train": 100, "public": 10},
        fleet={"num_devices": 1, "cohort": 1},
        client={"strategy": "fedmd", "args": {}},
    )
    world = build(scenario)
    with pytest.raises(StateError, match="'fedmd' learns with other devices by public samples"):
        wake(world, tmp_path)
    learner = make_learner(world)
    store = OwnedSamples.empty(world.sample_shape, torch.uint8, world.train.encoding)
    ids = store.add(world.train.stored(world.public), world.train.labels(world.public))
    given = Stored(learner.initial_state(store, ids), store)
    DeviceStore(tmp_path, digest=learner.layout.digest).save(given, learner.declaration)
    assert wake(world, tmp_path, learner).position == 0, "with them it wakes up"
