"""Who holds which samples: every index goes to exactly one device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.spec import PartitionSpec

Indices = NDArray[np.int32]


def partition(
    spec: PartitionSpec,
    *,
    labels: NDArray[np.int64],
    users: NDArray[np.int64] | None,
    num_devices: int,
    generator: np.random.Generator,
    experiences: NDArray[np.int64] | None = None,
) -> list[Indices]:
    """Deal samples out to devices.

    Args:
        spec: The kind and its parameters.
        labels: Label of each sample [N].
        users: Natural user of each sample [N], if the data set has users.
        num_devices: Number of devices.
        generator: Source of randomness.
        experiences: Experience of each sample [N], where each of them is to be dealt out by itself.
            A device's shares of labels are the same in all, and so are the places of its shards.
            Users stay together.

    Returns:
        For each device its indices, int32, in random order; together each of 0..N-1 once.

    Raises:
        ScenarioError: If the data set has no users, fewer users than devices, or too few samples
            for the shards.
    """
    if spec.kind == "iid":
        groups = _iid(generator.permutation(len(labels)), num_devices, experiences)
    elif spec.kind == "dirichlet":
        groups = _dirichlet(labels, num_devices, spec.alpha, generator, experiences)
    elif spec.kind == "shards":
        groups = _shards(labels, num_devices, spec.shards_per_device, generator, experiences)
    else:
        groups = _by_user(users, num_devices)
    return [generator.permutation(group).astype(np.int32) for group in groups]


def partition_like(
    train: Sequence[Indices],
    *,
    train_labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    generator: np.random.Generator,
    rounds_by_chance: bool = False,
) -> list[Indices]:
    """Deal test samples out so that each device's labels follow those of its training data.

    Each class of the test set is split over the devices in proportion to how many training
    samples of it they hold, so local test sets together are the whole test set.

    Args:
        train: Indices of each device's training samples.
        train_labels: [N].
        test_labels: [M].
        generator: Source of randomness.
        rounds_by_chance: Whether shares that are no whole numbers are rounded at random. Where
            many labels have few samples each, rounding would else favour the same devices.
    """
    parts: list[list[NDArray[np.int64]]] = [[] for _ in train]
    for label in np.unique(test_labels):
        held = np.array([np.count_nonzero(train_labels[ids] == label) for ids in train])
        weights = held if held.sum() else np.ones(len(train))
        shuffled = generator.permutation(np.flatnonzero(test_labels == label))
        chance = generator if rounds_by_chance else None
        for part, piece in zip(parts, _split(shuffled, weights, chance), strict=True):
            part.append(piece)
    return [np.concatenate(part).astype(np.int32) for part in parts]


def _split(
    indices: NDArray[np.int64],
    weights: NDArray[np.float64],
    chance: np.random.Generator | None = None,
) -> list[NDArray[np.int64]]:
    """Cut indices in proportion to weights; with a source of chance, exactly so on average."""
    cuts = np.cumsum(weights / weights.sum())[:-1] * len(indices)
    whole = np.round(cuts) if chance is None else np.floor(cuts + chance.random())
    return np.split(indices, np.minimum(whole, len(indices)).astype(np.int64))


def _within(
    indices: NDArray[np.int64], experiences: NDArray[np.int64] | None
) -> list[NDArray[np.int64]]:
    """Return indices by experience, as they are ordered; all in one if there are no experiences."""
    if experiences is None:
        return [indices]
    own = experiences[indices]
    return [indices[own == experience] for experience in np.unique(own)]


def _iid(
    shuffled: NDArray[np.int64], num_devices: int, experiences: NDArray[np.int64] | None
) -> list[NDArray[np.int64]]:
    if experiences is None:
        return np.array_split(shuffled, num_devices)
    # In turns, from one experience to the next: what is over goes to another device each time.
    order = np.concatenate(_within(shuffled, experiences))
    return [order[device::num_devices] for device in range(num_devices)]


def _dirichlet(
    labels: NDArray[np.int64],
    num_devices: int,
    alpha: float,
    generator: np.random.Generator,
    experiences: NDArray[np.int64] | None,
) -> list[NDArray[np.int64]]:
    """Label skew of Hsu, Qi, Brown 2019 (arXiv:1909.06335), in the per-class form of Li et al."""
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(num_devices)]
    for label in np.unique(labels):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        # Beyond 1e9 all shares are equal, and their sum would overflow.
        shares = generator.dirichlet(np.full(num_devices, min(alpha, 1e9)))
        chance = None if experiences is None else generator
        for cell in _within(shuffled, experiences):
            for part, piece in zip(parts, _split(cell, shares, chance), strict=True):
                part.append(piece)
    return [np.concatenate(part) for part in parts]


def _shards(
    labels: NDArray[np.int64],
    num_devices: int,
    per_device: int,
    generator: np.random.Generator,
    experiences: NDArray[np.int64] | None,
) -> list[NDArray[np.int64]]:
    """Pathological split of McMahan et al. 2017 (arXiv:1602.05629): label-sorted shards."""
    num_shards = num_devices * per_device
    by_label = _within(np.argsort(labels, kind="stable"), experiences)
    smallest = min(len(cell) for cell in by_label)
    if num_shards > smallest:
        where = "" if experiences is None else " of the smallest experience"
        message = (
            f"{num_devices} devices x {per_device} shards are more than the {smallest} samples"
        )
        raise ScenarioError(
            "partition", [Fault("partition", "shards_per_device", f"{message}{where}")]
        )
    shards = [np.array_split(cell, num_shards) for cell in by_label]
    order = generator.permutation(num_shards).reshape(num_devices, per_device)
    return [np.concatenate([cell[s] for cell in shards for s in own]) for own in order]


def _by_user(users: NDArray[np.int64] | None, num_devices: int) -> list[NDArray[np.int64]]:
    if users is None:
        fault = Fault("partition", "kind", "the data set has no natural users")
        raise ScenarioError("partition", [fault])
    names = np.unique(users)
    if len(names) < num_devices:
        fault = Fault(
            "fleet", "num_devices", f"{num_devices} devices but the data set has {len(names)} users"
        )
        raise ScenarioError("partition", [fault])
    return [np.flatnonzero(np.isin(users, group)) for group in np.array_split(names, num_devices)]
