from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelearn.errors import ScenarioError
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.world import build


def made(raw, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return build(from_dict(raw, overrides=overrides))


def test_devices_share_out_training_and_test_samples(raw):
    world = made(raw, partition__kind="dirichlet", partition__alpha=0.1)
    for parts, store, samples in (
        (world.train_parts, world.train, world.train_samples),
        (world.test_parts, world.test, world.test_samples),
    ):
        assert len(parts) == 6
        assert sorted(np.concatenate(parts)) == list(range(len(store.y)))
        ids = torch.cat([samples(d, i).ids for d in range(6) for i in range(5)])
        assert sorted(ids.tolist()) == list(range(len(store.y)))
        assert ids.dtype == torch.int32


def test_samples_of_an_experience_have_its_classes(raw):
    world = made(raw, stream__order="per-device")
    for device in range(6):
        order = world.stream.order(device)
        for position, experience_id in enumerate(order):
            classes = set(world.stream.classes(experience_id))
            # training by position, test by id
            assert set(world.train_samples(device, position).labels.tolist()) == classes
            assert set(world.test_samples(device, experience_id).labels.tolist()) == classes


def test_domains(raw):
    world = made(raw, stream__kind="domain-incremental", stream__num_experiences=3)
    first, second = (world.train_samples(0, position) for position in (0, 1))
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(
        first.batch().x.flatten(1).sort().values, second.batch().x.flatten(1).sort().values
    )
    assert not torch.equal(first.batch().x, second.batch().x)
    tested = world.test_samples(0, 1).batch().x
    index = world.train.domains.index[1, 0]
    assert torch.equal(tested.flatten(1), world.test_samples(0, 0).batch().x.flatten(1)[:, index])


@pytest.mark.parametrize("kind", ["class-incremental", "domain-incremental"])
def test_the_number_of_a_devices_test_samples(raw, kind):
    raw["stream"]["kind"] = kind
    world = build(from_dict(raw))
    for device in range(6):
        sizes = [len(world.test_samples(device, e)) for e in range(world.stream.num_experiences)]
        assert world.num_test_samples(device) == sum(sizes) > 0


def test_tasks(raw):
    world = made(raw, stream__kind="task-incremental")
    batch = world.train_samples(0, 2).batch()
    assert batch.mask.unique(dim=0).nonzero()[:, 1].tolist() == list(world.stream.classes(2))


def test_the_same_scenario_is_the_same_world(raw):
    first, again, other = made(raw), made(raw), made(raw, seed=1)
    for a, b in zip(first.train_parts, again.train_parts, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first.train_parts[0], other.train_parts[0])
    initial = first.model().initial()
    assert torch.equal(initial, first.model().initial())
    assert torch.equal(initial, again.model().initial())
    assert not torch.equal(initial, other.model().initial())


def test_a_model_leaves_the_global_generator_alone(raw):
    world = made(raw)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    world.model()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"name": "mlp", "args": {"hiden": [3]}}, r"\[model\] args: .*hiden"),
        ({"name": "cnn", "args": {"kernel_size": 4}}, r"\[model\] args: .*must be odd"),
        ({"name": "builtins:dict"}, r"\[model\] name: builtins:dict returned dict"),
    ],
)
def test_a_model_that_does_not_fit(raw, model, expected):
    raw["model"] = model
    with pytest.raises(ScenarioError, match=expected):
        made(raw).model()


def test_a_stream_that_does_not_fit(raw):
    with pytest.raises(ScenarioError, match="11 experiences but only 10 classes"):
        made(raw, stream__num_experiences=11)
    with pytest.raises(ScenarioError, match="has no natural users"):
        made(raw, partition__kind="user")


def given(monkeypatch, raw, users_train, users_test, labels=2):
    rng = np.random.default_rng(0)
    n, m = len(users_train), len(users_test)
    dataset = Dataset(
        "toy",
        rng.integers(0, 9, (n, 3)).astype(np.uint8),
        rng.integers(0, labels, n),
        rng.integers(0, 9, (m, 3)).astype(np.uint8),
        rng.integers(0, labels, m),
        labels,
        scale=1.0,
        users_train=users_train,
        users_test=users_test,
    )
    monkeypatch.setattr("edgelearn.scenario.world.load_dataset", lambda _spec: dataset)
    overrides = {
        "partition.kind": "user",
        "fleet.num_devices": 3,
        "stream.num_experiences": 2,
    }
    return build(from_dict(raw, overrides=overrides)), dataset


def test_a_device_is_tested_on_its_own_users(monkeypatch, raw):
    users_train = np.repeat(np.arange(6), 20)
    users_test = np.tile(np.array([0, 1, 2, 3, 5]), 4)  # user 4 has no test samples
    world, data = given(monkeypatch, raw, users_train, users_test)
    for train, test in zip(world.train_parts, world.test_parts, strict=True):
        assert set(data.users_test[test]) == set(data.users_train[train]) - {4}
    assert sorted(np.concatenate(world.test_parts)) == list(range(20))


def test_test_users_that_nobody_holds_are_dealt_out_by_label(monkeypatch, raw):
    world, _ = given(monkeypatch, raw, np.repeat(np.arange(6), 20), np.full(20, 99))
    assert sorted(np.concatenate(world.test_parts)) == list(range(20))
    assert min(map(len, world.test_parts)) > 0


def test_more_sample_ids_than_int32_holds(monkeypatch, raw):
    raw["stream"].update(kind="domain-incremental", num_experiences=1000)

    class Many(np.ndarray):
        def __len__(self):
            return 3_000_000

    dataset = Dataset(
        "toy",
        np.zeros((1, 3), np.uint8),
        np.zeros(1, np.int64).view(Many),
        np.zeros((1, 3), np.uint8),
        np.zeros(1, np.int64),
        1,
        scale=1.0,
    )
    monkeypatch.setattr("edgelearn.scenario.world.load_dataset", lambda _spec: dataset)
    with pytest.raises(ScenarioError, match=r"1000 domains; samples x domains .* below 2\*\*31"):
        build(from_dict(raw))


@pytest.mark.parametrize("order", ["shared", "per-device"])
@pytest.mark.parametrize("kind", ["class-incremental", "domain-incremental"])
def test_beyond_the_end_of_the_stream_there_is_nothing(raw, order, kind):
    world = made(raw, stream__order=order, stream__kind=kind)
    with pytest.raises(IndexError):
        world.train_samples(0, 5)  # not the next device's first experience
    with pytest.raises(IndexError):
        world.test_samples(0, 5).batch()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"stream__order": "per-device"},
        {"stream__kind": "domain-incremental"},
    ],
)
def test_ids_of_many_devices_are_those_of_each(raw, overrides):
    world = made(raw, **overrides)
    devices = np.array([5, 0, 3])
    for position in range(world.stream.num_experiences):
        ids, starts = world.train_ids(devices, position)
        assert ids.dtype == np.int32
        assert np.diff(starts).tolist() == world.train_sizes(devices, position).tolist()
        for row, device in enumerate(devices.tolist()):
            alone = world.train_samples(device, position).ids.numpy()
            assert np.array_equal(ids[starts[row] : starts[row + 1]], alone)
