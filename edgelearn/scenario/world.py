"""A scenario made concrete: the samples in memory, who holds which, and each device's stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgelearn import plugins
from edgelearn.errors import Fault, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.datasets import Dataset, load_dataset
from edgelearn.scenario.partition import Indices, partition, partition_like
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.stream import Stream
from edgelearn.seeds import derive, numpy_generator


@dataclass(frozen=True)
class World:
    """What `build` makes of a scenario. Nothing in it changes during a run."""

    scenario: Scenario
    stream: Stream
    train: SharedSamples
    test: SharedSamples
    train_parts: tuple[Indices, ...]
    test_parts: tuple[Indices, ...]
    num_classes: int

    @cached_property
    def _train_index(self) -> _Index:
        return _Index.of(self.train_parts, self.train.y.numpy(), self.stream)

    @cached_property
    def _test_index(self) -> _Index:
        return _Index.of(self.test_parts, self.test.y.numpy(), self.stream)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.x.shape[1:])

    def train_samples(self, device: int, position: int) -> Samples:
        """Return the training samples that a device meets at a position of its stream."""
        experience_id = self.stream.experience_id(device, position)
        return Samples(self.train, self._train_index.ids(device, experience_id))

    def train_sizes(self, devices: NDArray[np.int64], position: int) -> NDArray[np.int64]:
        """Return how many training samples each device meets at a position of its stream."""
        starts, ends = self._train_index.bounds(self._groups(devices, position))
        return ends - starts

    def train_ids(
        self, devices: NDArray[np.int64], position: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return what `train_samples` gives for many devices.

        Returns:
            All ids [n], and where each device's begin, with the end [K + 1].
        """
        index, experiences = self._train_index, self._groups(devices, position)
        starts, ends = index.bounds(experiences)
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
        ids = index.sorted_ids.numpy()[places]
        if index.domain_size:
            shift = (experiences[1] * index.domain_size).astype(np.int32)
            ids = ids + np.repeat(shift, ends - starts)
        return ids, offsets

    def _groups(
        self, devices: NDArray[np.int64], position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the devices and the experience that each meets at a position."""
        if self.scenario.stream.order == "shared":
            experience = self.stream.experience_id(0, position)
            return devices, np.full(len(devices), experience, np.int64)
        found = [self.stream.experience_id(int(device), position) for device in devices]
        return devices, np.array(found, np.int64)

    def test_samples(self, device: int, experience_id: int) -> Samples:
        """Return a device's own test samples of an experience (by id, not position)."""
        return Samples(self.test, self._test_index.ids(device, experience_id))

    def num_test_samples(self, device: int) -> int:
        """Return how many test samples a device has, over all experiences."""
        repeats = 1 if self.stream.splits_classes else self.stream.num_experiences
        return repeats * len(self.test_parts[device])

    def model(self) -> FlatModel:
        """Return the scenario's network with its initial parameters, the same for every call."""
        spec = self.scenario.model
        factory = plugins.resolve(spec.name, plugins.MODELS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.scenario.seed, "initial-parameters"))
            try:
                module = factory(
                    input_shape=self.sample_shape, num_classes=self.num_classes, **spec.args
                )
            except (TypeError, ValueError) as error:
                fault = Fault("model", "args", str(error))
                raise ScenarioError(self.scenario.name, [fault]) from error
        if not isinstance(module, nn.Module):
            fault = Fault("model", "name", f"{spec.name} returned {type(module).__name__}")
            raise ScenarioError(self.scenario.name, [fault])
        return FlatModel(module)


@dataclass(frozen=True, slots=True)
class _Index:
    """Sample ids sorted by device and experience, so that a device's experience is a slice.

    Attributes:
        sorted_ids: Ids of the whole fleet [N], int32.
        starts: Where device d's experience e begins, at d * T + e [D * T + 1].
        num_experiences: T; 1 if experiences are domains, which share their samples.
        domain_size: Added to the ids once per domain; 0 if experiences differ by classes.
    """

    sorted_ids: Tensor
    starts: NDArray[np.int64]
    num_experiences: int
    domain_size: int

    @classmethod
    def of(cls, parts: Sequence[Indices], labels: NDArray[np.int64], stream: Stream) -> _Index:
        """Sort the indices of all devices."""
        ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        splits = stream.splits_classes
        count = stream.num_experiences if splits else 1
        keys = owners * count + (stream.experience_of_label()[labels[ids]] if splits else 0)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange(len(parts) * count + 1))
        size = 0 if splits else len(labels)
        return cls(torch.from_numpy(ids[order].astype(np.int32)), starts, count, size)

    def bounds(
        self, groups: tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the ids of devices' experiences begin and end; see `ids`."""
        devices, experiences = groups
        within = 0 if self.domain_size else experiences
        group = devices * self.num_experiences + within
        return self.starts[group], self.starts[group + 1]

    def ids(self, device: int, experience_id: int) -> Tensor:
        """Return the sample ids of a device's experience."""
        # Indexing the range refuses what would lead to the next device's samples.
        within = 0 if self.domain_size else range(self.num_experiences)[experience_id]
        group = device * self.num_experiences + within
        ids = self.sorted_ids[self.starts[group] : self.starts[group + 1]]
        return ids + experience_id * self.domain_size if self.domain_size else ids


def build(scenario: Scenario) -> World:
    """Load the data of a scenario and deal it out.

    Raises:
        DatasetError: If the data is missing or damaged.
        ScenarioError: If the data does not fit the scenario.
    """
    dataset = load_dataset(scenario.data)
    stream = Stream(scenario.stream, dataset.num_classes, scenario.seed)
    largest = max(len(dataset.y_train), len(dataset.y_test)) * stream.num_experiences
    if not stream.splits_classes and largest > 2**31:  # sample ids are int32
        message = f"got {stream.num_experiences}; samples x experiences must stay below 2**31"
        raise ScenarioError(scenario.name, [Fault("stream", "num_experiences", message)])
    train_parts = partition(
        scenario.partition,
        labels=dataset.y_train,
        users=dataset.users_train,
        num_devices=scenario.fleet.num_devices,
        generator=numpy_generator(scenario.seed, "partition"),
    )
    test_parts = _test_parts(scenario, dataset, train_parts)
    encoding = Encoding(dataset.scale, dataset.mean, dataset.std, stream.task_masks())
    domains = stream.domains(dataset.sample_shape)
    return World(
        scenario=scenario,
        stream=stream,
        train=SharedSamples(
            torch.from_numpy(dataset.x_train), torch.from_numpy(dataset.y_train), encoding, domains
        ),
        test=SharedSamples(
            torch.from_numpy(dataset.x_test), torch.from_numpy(dataset.y_test), encoding, domains
        ),
        train_parts=tuple(train_parts),
        test_parts=tuple(test_parts),
        num_classes=dataset.num_classes,
    )


def _test_parts(scenario: Scenario, dataset: Dataset, train: list[Indices]) -> list[Indices]:
    """A device tests on its own users where the test set has them, else on its mix of labels."""
    users, test_users = dataset.users_train, dataset.users_test
    if scenario.partition.kind == "user" and users is not None and test_users is not None:
        owners = [np.unique(users[part]) for part in train]
        if set(np.unique(test_users)) <= {int(user) for group in owners for user in group}:
            return [np.flatnonzero(np.isin(test_users, g)).astype(np.int32) for g in owners]
    return partition_like(
        train,
        train_labels=dataset.y_train,
        test_labels=dataset.y_test,
        generator=numpy_generator(scenario.seed, "test-partition"),
    )
