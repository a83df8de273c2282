"""Examples and errors; the laws are in `tests/property/test_partition.py`."""

from __future__ import annotations

import numpy as np
import pytest

from edgelearn.errors import ScenarioError
from edgelearn.scenario.partition import partition, partition_like
from edgelearn.scenario.spec import PartitionSpec

LABELS = np.repeat(np.arange(10), 100)


def deal(kind, *, labels=LABELS, users=None, num_devices=20, seed=0, **kwargs):
    return partition(
        PartitionSpec(kind=kind, **kwargs),
        labels=labels,
        users=users,
        num_devices=num_devices,
        generator=np.random.default_rng(seed),
    )


def counts(parts, labels=LABELS):
    return np.array([np.bincount(labels[part], minlength=10) for part in parts])


def test_iid_parts_are_equal_and_mixed():
    parts = deal("iid")
    assert [len(part) for part in parts] == [50] * 20
    assert all(len(np.unique(LABELS[part])) > 5 for part in parts)


def test_dirichlet_is_more_skewed_the_smaller_alpha():
    def skew(alpha):  # mean share of a device's largest class
        table = counts(deal("dirichlet", alpha=alpha))
        return (table.max(1) / np.maximum(table.sum(1), 1)).mean()

    assert skew(1000.0) < 0.14 < 0.2 < skew(1.0) < 0.45 < skew(0.01)


def test_dirichlet_shares_of_a_class_follow_alpha():
    # The variance of one share of Dirichlet(a, ..., a) with K devices is (K-1) / (K^2 (K a + 1)).
    K, alpha, labels = 4, 0.5, np.zeros(10_000, int)
    shares = np.array(
        [
            [len(p) / 10_000 for p in deal("dirichlet", labels=labels, num_devices=K, seed=s)]
            for s in range(400)
        ]
    )
    assert shares.mean(0) == pytest.approx([0.25] * 4, abs=0.04)
    assert shares.var() == pytest.approx((K - 1) / (K**2 * (K * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-9])
def test_a_tiny_alpha_gives_each_class_to_one_device(alpha):
    table = counts(deal("dirichlet", alpha=alpha))
    assert (np.sort(table, 0)[-1] == 100).all()


@pytest.mark.parametrize("alpha", [1e12, 1e300, 1.7e308])
def test_a_huge_alpha_gives_equal_parts(alpha):
    assert (counts(deal("dirichlet", alpha=alpha)) == 5).all()


@pytest.mark.parametrize("per_device", [1, 2, 3])
def test_a_device_has_few_classes_from_shards(per_device):
    parts = deal("shards", shards_per_device=per_device)
    assert max(len(np.unique(LABELS[part])) for part in parts) <= per_device * 2
    assert max(map(len, parts)) - min(map(len, parts)) <= per_device
    assert counts(deal("shards", shards_per_device=1)).astype(bool).sum(1).max() == 1


def test_too_many_shards():
    with pytest.raises(ScenarioError, match="20 devices x 51 shards are more than the 1000 sam"):
        deal("shards", shards_per_device=51)


def test_users_stay_whole():
    users = np.random.default_rng(0).integers(100, 140, len(LABELS))
    parts = deal("user", users=users)
    owners = [set(users[part]) for part in parts]
    assert sum(map(len, owners)) == len(set.union(*owners)) == len(np.unique(users))
    assert {len(o) for o in owners} == {2}


def test_users_are_missing_or_too_few():
    with pytest.raises(ScenarioError, match=r"\[partition\] kind: the data set has no natural"):
        deal("user")
    with pytest.raises(ScenarioError, match="20 devices but the data set has 3 users"):
        deal("user", users=np.arange(1000) % 3)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "user"])
def test_a_part_is_in_random_order_and_depends_on_the_generator(kind):
    users = np.arange(1000) // 50
    parts = deal(kind, users=users)
    assert any((np.diff(part) < 0).any() for part in parts)
    again = deal(kind, users=users)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    other = deal(kind, users=users, seed=1)
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_partition_like_follows_the_training_labels():
    train = deal("dirichlet", alpha=0.3)
    test_labels = np.repeat(np.arange(10), 40)
    parts = partition_like(
        train,
        train_labels=LABELS,
        test_labels=test_labels,
        generator=np.random.default_rng(1),
    )
    expected = counts(train) * 40 / 100
    # Cuts are rounded, so a count is off by less than one.
    assert np.abs(counts(parts, test_labels) - expected).max() < 1


def test_partition_like_deals_out_a_class_that_nobody_trains_on():
    parts = partition_like(
        [np.array([0, 1]), np.array([2])],
        train_labels=np.array([0, 0, 0]),
        test_labels=np.array([0] * 6 + [7] * 6),
        generator=np.random.default_rng(0),
    )
    assert [len(part) for part in parts] == [4 + 3, 2 + 3]
