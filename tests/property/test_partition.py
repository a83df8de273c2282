"""Laws of partitions: nothing is lost and nothing is given away twice, whatever the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelearn.scenario.partition import partition, partition_like
from edgelearn.scenario.spec import PartitionSpec

# Few distinct labels, not contiguous and not from 0; also classes of one sample.
LABELS = hnp.arrays(np.int64, st.integers(1, 60), elements=st.sampled_from([0, 3, 4, 17, 1000]))
SEEDS = st.integers(0, 2**32)
DEVICES = st.integers(1, 80)  # often more than samples
ALPHAS = st.one_of(
    st.floats(1e-3, 10), st.sampled_from([5e-324, 1e-300, 1e-12, 1e-5, 1e9, 1e300, 1.7e308])
)


def assert_covers_once(parts, total, num_devices):
    assert len(parts) == num_devices
    assert all(part.dtype == np.int32 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))


def deal(spec, labels, num_devices, seed, users=None):
    return partition(
        spec,
        labels=labels,
        users=users,
        num_devices=num_devices,
        generator=np.random.default_rng(seed),
    )


@given(labels=LABELS, num_devices=DEVICES, seed=SEEDS)
def test_iid(labels, num_devices, seed):
    parts = deal(PartitionSpec(kind="iid"), labels, num_devices, seed)
    assert_covers_once(parts, len(labels), num_devices)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(labels=LABELS, num_devices=DEVICES, seed=SEEDS, alpha=ALPHAS)
def test_dirichlet(labels, num_devices, seed, alpha):
    parts = deal(PartitionSpec(kind="dirichlet", alpha=alpha), labels, num_devices, seed)
    assert_covers_once(parts, len(labels), num_devices)


@given(labels=LABELS, data=st.data(), seed=SEEDS)
def test_shards(labels, data, seed):
    num_devices = data.draw(st.integers(1, len(labels)))
    per_device = data.draw(st.integers(1, len(labels) // num_devices))
    spec = PartitionSpec(kind="shards", shards_per_device=per_device)
    parts = deal(spec, labels, num_devices, seed)
    assert_covers_once(parts, len(labels), num_devices)
    assert min(len(part) for part in parts) >= per_device


@given(labels=LABELS, data=st.data(), seed=SEEDS)
def test_users(labels, data, seed):
    users = data.draw(
        hnp.arrays(np.int64, len(labels), elements=st.integers(-5, 10**12)), label="users"
    )
    num_devices = data.draw(st.integers(1, len(np.unique(users))))
    parts = deal(PartitionSpec(kind="user"), labels, num_devices, seed, users)
    assert_covers_once(parts, len(labels), num_devices)
    owners = [set(users[part]) for part in parts]
    assert all(owners)
    assert sum(map(len, owners)) == len(set.union(*owners))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
@given(labels=LABELS, seed=SEEDS)
def test_the_generator_alone_decides(kind, labels, seed):
    spec = PartitionSpec(kind=kind, shards_per_device=1)
    first, again = (deal(spec, labels, 1 + len(labels) // 3, seed) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@given(train=LABELS, test=LABELS, num_devices=DEVICES, seed=SEEDS, alpha=ALPHAS)
def test_test_samples_follow_the_training_samples(train, test, num_devices, seed, alpha):
    spec = PartitionSpec(kind="dirichlet", alpha=alpha)
    parts = deal(spec, train, num_devices, seed)
    dealt = partition_like(
        parts, train_labels=train, test_labels=test, generator=np.random.default_rng(seed)
    )
    assert_covers_once(dealt, len(test), num_devices)
    for label in np.unique(test):
        held = np.array([(train[part] == label).sum() for part in parts])
        shares = held / held.sum() if held.sum() else np.full(num_devices, 1 / num_devices)
        given_out = np.array([(test[part] == label).sum() for part in dealt])
        assert np.abs(given_out - shares * (test == label).sum()).max() <= 1 + 1e-9
        if held.sum():
            assert not given_out[held == 0].any()  # who never trains on it is not asked about it
