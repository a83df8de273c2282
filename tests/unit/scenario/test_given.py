"""Streams of experiences that the data set brings with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import edgelearn
from edgelearn.errors import ScenarioError
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.partition import partition
from edgelearn.scenario.spec import PartitionSpec
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_dataset, toy_scenario

T, NUM_DEVICES = 3, 4
TOY = toy_dataset(None)  # type: ignore[arg-type]
# Uneven, mixed up, and classes that come back: {0, 1, 2}, all, {3}.
train_of = np.where(TOY.y_train == 3, 2, np.arange(120) % 5 // 3)
test_of = np.where(TOY.y_test == 3, 2, np.arange(40) % 5 // 3)
train_of[TOY.y_train == 3] = np.where(np.arange(30) % 2, 1, 2)
GIVEN = replace(TOY, experiences_train=train_of, experiences_test=test_of)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(dataset: Dataset = GIVEN, *, stream: Any = (), **tables: Any) -> World:
        monkeypatch.setattr("edgelearn.testing.toy.toy_dataset", lambda _spec: dataset)
        stream = {"kind": "given", "num_experiences": T, **dict(stream)}
        return build(toy_scenario(stream=stream, **tables))

    return made


def ids(world: World, device: int, position: int, **kwargs: Any) -> list[int]:
    return world.train_samples(device, position, **kwargs).ids.tolist()


PARTITIONS = [
    {"kind": "iid"},
    {"kind": "dirichlet", "alpha": 0.3},
    {"kind": "shards", "shards_per_device": 2},
]


@pytest.mark.parametrize("kind", PARTITIONS)
def test_each_experience_brings_what_the_data_set_says(world: Any, kind: Any) -> None:
    made = world(partition=kind)
    for position in range(T):
        found = [i for d in range(NUM_DEVICES) for i in ids(made, d, position)]
        assert sorted(found) == np.flatnonzero(train_of == position).tolist()
        tested = [
            i for d in range(NUM_DEVICES) for i in made.test_samples(d, position).ids.tolist()
        ]
        assert sorted(tested) == np.flatnonzero(test_of == position).tolist()
    assert [made.stream.classes(e) for e in range(T)] == [(0, 1, 2), (0, 1, 2, 3), (3,)]
    assert made.stream.experience(0, 2).classes == (3,)


def test_orders_rounds_and_boundaries_are_those_of_any_stream(world: Any) -> None:
    made = world(stream={"order": "staggered"})
    for device in range(NUM_DEVICES):
        for position in range(T):
            found = made.stream.experience_id(device, position)
            own = set(ids(made, device, position))
            assert own == set(made.train_parts[device].tolist()) & set(
                np.flatnonzero(train_of == found).tolist()
            )
            assert made.first_met[device, found] == position
    assert made.changes()[0] == [1, 2]
    online = world(stream={"online": True})
    whole = ids(online, 1, 0)
    rounds = [ids(online, 1, 0, server_round=r) for r in (1, 2)]
    assert rounds[0] + rounds[1] == whole
    assert min(map(len, rounds)) > 0
    assert set(ids(world(stream={"cumulative": True}), 0, 1)) == set(
        made.train_parts[0][train_of[made.train_parts[0]] < 2].tolist()
    )


def test_one_test_set_for_all_is_cut_into_parts(world: Any) -> None:
    made = world(replace(GIVEN, experiences_test=None))
    tested = [made.test_samples(d, e).ids.tolist() for d in range(NUM_DEVICES) for e in range(T)]
    assert sorted(i for own in tested for i in own) == list(range(40))
    assert all(tested)


def test_a_data_set_without_experiences_or_with_others_is_refused(world: Any) -> None:
    with pytest.raises(ScenarioError, match=r"kind: got 'given', but the data set 'toy' does not"):
        world(TOY)
    with pytest.raises(ScenarioError, match=r"num_experiences: got 2; the data set 'toy' has 3"):
        world(stream={"num_experiences": 2})
    with pytest.raises(ScenarioError, match=r"shuffle_classes: got true; the data set says"):
        world(stream={"shuffle_classes": True})
    with pytest.raises(
        ScenarioError, match=r"4 devices x 4 shards are more than the 15 samples of the "
    ):
        world(partition={"kind": "shards", "shards_per_device": 4})


def test_classes_that_follow_each_other_otherwise_are_refused(world: Any) -> None:
    kind = {"kind": "class-incremental", "num_experiences": 2}
    uneven = replace(
        TOY, experiences_train=(TOY.y_train > 0).astype(np.int64), experiences_test=None
    )
    with pytest.raises(ScenarioError, match=r"groups of \[2, 2\]; the data set 'toy' has \[1, 3\]"):
        world(uneven, stream=kind)
    as_given = world(uneven, stream={"num_experiences": 2})
    assert as_given.stream.classes(1) == (1, 2, 3)
    even = replace(uneven, experiences_train=TOY.y_train // 2)
    assert world(even, stream=kind).stream.classes(1) == (2, 3)
    world(uneven, stream={**kind, "shuffle_classes": True})
    world(uneven, stream={**kind, "num_experiences": 4})  # another stream, asked for
    world(stream={**kind, "num_experiences": 3})  # classes come back in it: no such stream


# -- who holds what --------------------------------------------------------------------------------


def dealt(kind: str, labels: Any, experiences: Any, num_devices: int = 5, **spec: Any) -> Any:
    parts = partition(
        PartitionSpec(kind=kind, **spec),
        labels=labels,
        users=None,
        num_devices=num_devices,
        generator=np.random.default_rng(0),
        experiences=experiences,
    )
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    return parts


def test_iid_is_even_in_each_experience_and_in_all() -> None:
    experiences = np.repeat(np.arange(6), [7, 1, 13, 9, 2, 22])
    parts = dealt("iid", np.zeros(54, np.int64), experiences)
    counts = np.array([np.bincount(experiences[part], minlength=6) for part in parts])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(1)) <= 1


def test_shares_of_labels_are_the_same_in_all_experiences() -> None:
    labels = np.tile(np.arange(4), 600)
    experiences = np.repeat(np.arange(3), 800)
    parts = dealt("dirichlet", labels, experiences, alpha=0.3)
    counts = np.zeros((3, 4, 5))
    for device, part in enumerate(parts):
        np.add.at(counts[:, :, device], (experiences[part], labels[part]), 1)
    shares = counts / counts.sum(2, keepdims=True)
    assert np.abs(shares - shares[0]).max() < 0.011  # 200 samples in a cell: one is 0.005
    assert np.ptp(shares[0], axis=1).min() > 0.2


def test_cells_of_one_sample_do_not_go_to_the_same_device() -> None:
    labels = np.tile(np.arange(4), 200)  # 200 experiences with one sample of each class
    parts = dealt("dirichlet", labels, np.repeat(np.arange(200), 4), alpha=1e9)
    assert all(120 < len(part) < 200 for part in parts)


def test_shards_of_a_device_have_the_same_labels_in_all_experiences() -> None:
    labels = np.tile(np.arange(10), 60)
    experiences = np.repeat(np.arange(3), 200)
    for part in dealt("shards", labels, experiences, shards_per_device=2):
        per_experience = [set(labels[part[experiences[part] == e]].tolist()) for e in range(3)]
        assert per_experience[0] == per_experience[1] == per_experience[2]
        assert len(per_experience[0]) <= 4


def test_tests_of_a_device_follow_what_it_has_in_each_experience(world: Any) -> None:
    # A label within an experience decides: device 0 alone has class 0 in the first of them.
    made = world(partition={"kind": "dirichlet", "alpha": 0.05})
    for device in range(NUM_DEVICES):
        for position in range(T):
            learned = made.train_samples(device, position).labels
            tested = made.test_samples(device, position).labels
            counts = torch.bincount(learned, minlength=4)
            few = [int(y) for y in tested.unique() if counts[y] == 0]
            assert not few, (device, position, few)


# -- whole runs ------------------------------------------------------------------------------------


def test_a_fleet_learns_such_a_stream(world: Any) -> None:
    scenario = world(client={"strategy": "replay", "args": {"capacity": 16}, "epochs": 3}).scenario
    truth = edgelearn.simulate(scenario, engine="reference", federation="faithful")
    other = edgelearn.simulate(scenario)
    assert truth.scores().average_accuracy > 0.9
    assert other.scores().average_accuracy == pytest.approx(
        truth.scores().average_accuracy, abs=0.03
    )
    assert len(truth.rounds) == 2 * T
