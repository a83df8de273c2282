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
from edgelearn.errors import Fault, ScenarioError, StateError
from edgelearn.params import FlatModel
from edgelearn.scenario.arrivals import Arrivals, arrivals, domain_of, drifted, first_met
from edgelearn.scenario.datasets import load_dataset
from edgelearn.scenario.dealing import deal
from edgelearn.scenario.given import experiences_of, given_classes
from edgelearn.scenario.kinds import BASE, Kinds, kinds_of
from edgelearn.scenario.labels import labelled, told
from edgelearn.scenario.partition import Indices
from edgelearn.scenario.presence import Presence, presence
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.scenario.spec import ModelSpec, Scenario, VariantSpec
from edgelearn.scenario.stream import Stream
from edgelearn.seeds import derive, numpy_generator


@dataclass(frozen=True)
class World:
    """What `build` makes of a scenario. Nothing in it changes during a run.

    Attributes:
        scenario: What it was made of.
        stream: Its stream.
        train: Training samples of all devices, with the labels that devices are told.
        test: Test samples of all devices, with the true labels.
        train_parts: Indices of each device's training samples.
        test_parts: The same of its test samples.
        num_classes: Labels, C.
        true_labels: Of the training samples [N]: they decide who has what and when.
        train_experiences: Which experience has each training sample [N], by its class or because
            the data set says so; None where devices cut what they have.
        test_experiences: The same of the test samples [M].
        presence: When each device is part of the fleet; None if all always are.
        public: Ids of the training samples that all devices have, and none as its own [n], int32;
            those of the first domain, in random order.
    """

    scenario: Scenario
    stream: Stream
    train: SharedSamples
    test: SharedSamples
    train_parts: tuple[Indices, ...]
    test_parts: tuple[Indices, ...]
    num_classes: int
    true_labels: NDArray[np.int64]
    train_experiences: NDArray[np.int64] | None
    test_experiences: NDArray[np.int64] | None
    presence: Presence | None
    public: Tensor

    @cached_property
    def orders(self) -> NDArray[np.int64] | None:
        """Experiences of each device in its order [D, T]; None if all share one."""
        return self.stream.orders(len(self.train_parts))

    @cached_property
    def kinds(self) -> Kinds:
        """Which kind of device each one is."""
        return kinds_of(self.scenario)

    @property
    def is_uneven(self) -> bool:
        """Whether devices differ in what they have met at a time, by order or presence."""
        return self.orders is not None or self.presence is not None

    @cached_property
    def first_met(self) -> NDArray[np.int64]:
        """Position at which device d first meets experience e [D, T]; -1 is never."""
        return first_met(
            self.train_parts,
            self.true_labels,
            self.stream,
            experiences=self.train_experiences,
            orders=self.orders,
            presence=self.presence,
        )

    def changes(self) -> list[list[int]]:
        """Return the positions at which what a device learns from changes, by device.

        That is where the experience, or in domain-incremental streams the domain (under gradual
        drift that of most samples), is not that of the last position at which it had samples.
        """
        count, T = len(self.train_parts), self.stream.num_experiences
        everyone, places = np.arange(count), np.arange(T)
        kinds = places
        if self.stream.has_domains:
            kinds = domain_of(self.stream, places)
        elif self.stream.is_stationary:
            kinds = np.zeros(T, np.int64)
        last = np.full(count, -1)
        found: list[list[int]] = [[] for _ in range(count)]
        for position in range(T):
            told = max(position - self.stream.delay, 0)
            met = np.full(count, told) if self.orders is None else self.orders[:, told]
            has_samples = self.train_sizes(everyone, position) > 0
            kind = np.where(has_samples, kinds[met], last)
            for device in np.flatnonzero((kind != last) & (last >= 0)).tolist():
                found[device].append(position)
            last = kind
        return found

    @cached_property
    def _arrivals(self) -> Arrivals:
        spec = self.scenario.labels
        return arrivals(
            self.train_parts,
            self.true_labels,
            self.stream,
            experiences=self.train_experiences,
            orders=self.orders,
            told=self.train.y.numpy(),
            has_label=labelled(len(self.true_labels), spec, self.scenario.seed),
            per_class=spec.per_class,
        )

    @cached_property
    def _test_index(self) -> _Index | None:
        if self.test_experiences is None:
            return None
        return _Index.of(self.test_parts, self.test_experiences, self.stream.num_experiences)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.x.shape[1:])

    def train_samples(
        self, device: int, position: int, *, server_round: int | None = None
    ) -> Samples:
        """Return the training samples that a device has at a position of its stream.

        Args:
            device: Index in the fleet.
            position: Where it is in its stream.
            server_round: Where each round of an experience brings its own part, the round; None
                asks for all of them.
        """
        ids, _ = self.train_ids(np.array([device]), position, server_round=server_round)
        return Samples(self.train, torch.from_numpy(ids))

    def train_sizes(
        self, devices: NDArray[np.int64], position: int, *, server_round: int | None = None
    ) -> NDArray[np.int64]:
        """Return how many training samples each device has at a position of its stream."""
        starts, ends, _ = self._bounds(devices, position, server_round)
        return ends - starts

    def train_ids(
        self, devices: NDArray[np.int64], position: int, *, server_round: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return what `train_samples` gives for many devices.

        Returns:
            All ids [n], and where each device's begin, with the end [K + 1].
        """
        starts, ends, last = self._bounds(devices, position, server_round)
        sizes = ends - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        ids = self._arrivals.ids[places]
        if self._arrivals.num_positions == 1:  # the same samples, in the domain of the position
            met = last if self.orders is None else self.orders[devices, np.maximum(last, 0)]
            shift = domain_of(self.stream, met) * len(self.train.y)
            ids = ids + np.repeat(shift.astype(np.int32), sizes)
        return ids, offsets

    def _bounds(
        self, devices: NDArray[np.int64], position: int, server_round: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return where devices' samples begin and end, and the position that they arrived at [K].

        That is before the first where no labels have come yet, or where the device was away.
        """
        told = range(self.stream.num_experiences)[position] - self.stream.delay
        last = np.full(len(devices), max(told, -1))
        first = np.zeros(len(devices), np.int64) if self.stream.spec.cumulative else last
        if (there := self.presence) is not None:
            first = np.maximum(first, there.joins[devices])
            last = np.where(there.at(position)[devices], last, -1)
        starts, ends = self._arrivals.bounds(devices, np.maximum(first, 0), last)
        part, count = self.stream.part(server_round)
        if count > 1:
            sizes = ends - starts
            starts, ends = starts + sizes * part // count, starts + sizes * (part + 1) // count
        return starts, ends, last

    def test_samples(self, device: int, experience_id: int) -> Samples:
        """Return a device's own test samples of an experience (by id, not position)."""
        experience = range(self.stream.num_experiences)[experience_id]
        if self._test_index is not None:
            return Samples(self.test, self._test_index.ids(device, experience))
        own, T = self.test_parts[device], self.stream.num_experiences
        if not self.stream.has_domains:  # a device's classes follow each other: each part has all
            return Samples(self.test, torch.from_numpy(own[experience::T].copy()))
        ids = own + self._test_domains[experience][own] * len(self.test.y)
        return Samples(self.test, torch.from_numpy(ids.astype(np.int32)))

    @cached_property
    def _test_domains(self) -> list[NDArray[np.int64]]:
        """Domain of each test sample, by experience: the mixture that the experience has."""
        stream, count = self.stream, len(self.test.y)
        everyone = np.arange(count)
        if stream.spec.drift != "gradual":
            domains = domain_of(stream, np.arange(stream.num_experiences))
            return [np.broadcast_to(domain, count) for domain in domains]
        within = numpy_generator(stream.seed, "drift-test").random(count)
        times = [experience + within for experience in range(stream.num_experiences)]
        return [drifted(stream, time, everyone, count) for time in times]

    def num_test_samples(self, device: int) -> int:
        """Return how many test samples a device has, over all experiences."""
        repeats = self.stream.num_experiences if self.stream.has_domains else 1
        return repeats * len(self.test_parts[device])

    def model(self, variant: str = BASE) -> FlatModel:
        """Return one of the scenario's networks with its initial parameters, always the same.

        Args:
            variant: Its name; "" is the network of `[model]` itself.
        """
        spec: ModelSpec | VariantSpec = self.scenario.model
        purpose, table = "initial-parameters", "model"
        if variant != BASE:
            spec = self.scenario.model.variants[variant]
            purpose, table = f"{purpose}:{variant}", f"model.variants.{variant}"
        factory = plugins.resolve(spec.name, plugins.MODELS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.scenario.seed, purpose))
            try:
                module = factory(
                    input_shape=self.sample_shape, num_classes=self.num_classes, **spec.args
                )
            except (TypeError, ValueError, StateError) as error:  # the last is of a stored network
                fault = Fault(table, "args", str(error))
                raise ScenarioError(self.scenario.name, [fault]) from error
        if not isinstance(module, nn.Module):
            fault = Fault(table, "name", f"{spec.name} returned {type(module).__name__}")
            raise ScenarioError(self.scenario.name, [fault])
        return FlatModel(module)


@dataclass(frozen=True, slots=True)
class _Index:
    """Test samples sorted by device and experience, where each is of one experience.

    Attributes:
        sorted_ids: Ids of the whole fleet [N], int32.
        starts: Where device d's experience e begins, at d * T + e [D * T + 1].
        num_experiences: T.
    """

    sorted_ids: Tensor
    starts: NDArray[np.int64]
    num_experiences: int

    @classmethod
    def of(cls, parts: Sequence[Indices], experiences: NDArray[np.int64], count: int) -> _Index:
        """Sort the indices of all devices."""
        ids = np.concatenate([*parts, np.empty(0, np.int32)]).astype(np.int32)
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        keys = owners * count + experiences[ids]
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange(len(parts) * count + 1))
        return cls(torch.from_numpy(ids[order]), starts, count)

    def ids(self, device: int, experience_id: int) -> Tensor:
        """Return the sample ids of a device's experience."""
        group = device * self.num_experiences + experience_id
        return self.sorted_ids[self.starts[group] : self.starts[group + 1]]


def build(scenario: Scenario) -> World:
    """Load the data of a scenario and deal it out.

    Raises:
        DatasetError: If the data is missing or damaged.
        ScenarioError: If the data does not fit the scenario.
    """
    dataset = load_dataset(scenario.data)
    labels = scenario.labels
    stream = Stream(
        scenario.stream,
        dataset.num_classes,
        scenario.seed,
        labels.delay,
        given_classes(dataset, scenario.stream),
    )
    largest = max(len(dataset.y_train), len(dataset.y_test)) * stream.num_domains
    if largest > 2**31:  # sample ids are int32
        message = f"{stream.num_domains} domains; samples x domains must stay below 2**31"
        raise ScenarioError(scenario.name, [Fault("stream", "num_experiences", message)])
    train_experiences, test_experiences = experiences_of(dataset, stream)
    public, train_parts, test_parts = deal(scenario, dataset)
    encoding = Encoding(dataset.scale, dataset.mean, dataset.std, stream.task_masks())
    domains, meanings = stream.domains(dataset.sample_shape), stream.meanings()
    y_told = torch.from_numpy(told(dataset.y_train, labels, stream))
    y_test = torch.from_numpy(dataset.y_test)
    return World(
        scenario=scenario,
        stream=stream,
        train=SharedSamples(torch.from_numpy(dataset.x_train), y_told, encoding, domains, meanings),
        test=SharedSamples(torch.from_numpy(dataset.x_test), y_test, encoding, domains, meanings),
        train_parts=tuple(train_parts),
        test_parts=tuple(test_parts),
        num_classes=dataset.num_classes,
        true_labels=dataset.y_train,
        train_experiences=train_experiences,
        test_experiences=test_experiences,
        presence=presence(scenario.fleet, stream.num_experiences, scenario.seed),
        public=torch.from_numpy(public),
    )
