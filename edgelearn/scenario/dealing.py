"""A data set dealt out to a fleet: training samples as the scenario says, tests like them.

Public samples are set apart first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.partition import Indices, partition, partition_like
from edgelearn.scenario.spec import Scenario
from edgelearn.seeds import numpy_generator


def deal(scenario: Scenario, dataset: Dataset) -> tuple[Indices, list[Indices], list[Indices]]:
    """Return the public samples, and the training samples and the test samples of each device.

    Public ones are drawn first, and no device has them as its own. A data set's own experiences,
    where the stream asks for them, are dealt out one by one.

    Raises:
        ScenarioError: If the data do not suffice.
    """
    public, rest = _set_apart(scenario, len(dataset.y_train))
    users, experiences = dataset.users_train, dataset.experiences_train
    is_given = scenario.stream.kind == "given"
    parts = partition(
        scenario.partition,
        labels=dataset.y_train[rest],
        users=None if users is None else users[rest],
        num_devices=scenario.fleet.num_devices,
        generator=numpy_generator(scenario.seed, "partition"),
        experiences=experiences[rest] if is_given and experiences is not None else None,
    )
    train = [rest[part].astype(np.int32) for part in parts]
    return public, train, _test_parts(scenario, dataset, train)


def _set_apart(scenario: Scenario, count: int) -> tuple[Indices, NDArray[np.int64]]:
    """Return the public samples, and the others in their order."""
    num_public = scenario.data.public
    if num_public >= count:
        message = f"got {num_public}; there are {count} training samples, some for the devices"
        raise ScenarioError(scenario.name, [Fault("data", "public", message)])
    shuffled = numpy_generator(scenario.seed, "public").permutation(count)
    return shuffled[:num_public].astype(np.int32), np.sort(shuffled[num_public:])


def _test_parts(scenario: Scenario, dataset: Dataset, train: list[Indices]) -> list[Indices]:
    """A device tests on its own users where the test set has them, else on its mix of labels."""
    users, test_users = dataset.users_train, dataset.users_test
    if scenario.partition.kind == "user" and users is not None and test_users is not None:
        owners = [np.unique(users[part]) for part in train]
        if set(np.unique(test_users)) <= {int(user) for group in owners for user in group}:
            return [np.flatnonzero(np.isin(test_users, g)).astype(np.int32) for g in owners]
    train_labels, test_labels = dataset.y_train, dataset.y_test
    found, test_found, is_by_experience = dataset.experiences_train, dataset.experiences_test, False
    if scenario.stream.kind == "given" and found is not None and test_found is not None:
        is_by_experience = True
        train_labels = train_labels + found * dataset.num_classes  # a label within an experience
        test_labels = test_labels + test_found * dataset.num_classes
    return partition_like(
        train,
        train_labels=train_labels,
        test_labels=test_labels,
        generator=numpy_generator(scenario.seed, "test-partition"),
        rounds_by_chance=is_by_experience,
    )
