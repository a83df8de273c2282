"""When a device sees what: experiences, their order, and what changes between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.samples import Domains
from edgelearn.scenario.spec import StreamSpec
from edgelearn.seeds import numpy_generator


@dataclass(frozen=True, slots=True)
class Experience:
    """One chunk of data that reaches a device at one time.

    Attributes:
        position: Its place in the device's own stream, from 0.
        id: Which chunk it is, from 0; equal to the position where all devices share the order.
        classes: Labels that can occur in it; none while no labels have come yet.
    """

    position: int
    id: int
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """The experiences of a scenario and each device's way through them.

    Attributes:
        spec: What the scenario says.
        num_classes: Labels of the data set, C.
        seed: Of the run.
        delay: Positions by which labels come after their samples.
        given: Labels that occur in each experience, where the data set says which samples are in
            it (kind "given").
    """

    spec: StreamSpec
    num_classes: int
    seed: int
    delay: int = 0
    given: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.splits_classes and self.spec.num_experiences > self.num_classes:
            fault = Fault(
                "stream",
                "num_experiences",
                f"{self.spec.num_experiences} experiences but only {self.num_classes} classes",
            )
            raise ScenarioError("stream", [fault])

    @property
    def splits_classes(self) -> bool:
        """Whether experiences differ by their classes."""
        return self.spec.kind in ("class-incremental", "task-incremental")

    @property
    def has_domains(self) -> bool:
        """Whether experiences show the same samples, each in its own domain."""
        return self.spec.kind == "domain-incremental"

    @property
    def is_stationary(self) -> bool:
        """Whether all experiences are of one distribution."""
        return self.spec.kind == "new-instances"

    @property
    def num_domains(self) -> int:
        """Domains, M; 1 where there are none."""
        return (self.spec.num_domains or self.num_experiences) if self.has_domains else 1

    @property
    def num_experiences(self) -> int:
        """Experiences in the stream, T."""
        return self.spec.num_experiences

    def classes(self, experience_id: int) -> tuple[int, ...]:
        """Return the labels that occur in an experience."""
        if self.given is not None:
            return self.given[experience_id]
        if not self.splits_classes:
            return tuple(range(self.num_classes))
        order = np.arange(self.num_classes)
        if self.spec.shuffle_classes:
            order = numpy_generator(self.seed, "class-order").permutation(order)
        groups = np.array_split(order, self.num_experiences)
        return tuple(int(c) for c in sorted(groups[experience_id]))

    def order(self, device: int) -> tuple[int, ...]:
        """Return the experience ids in the order in which a device meets them."""
        ids = range(self.num_experiences)
        if self.spec.order == "shared":
            return tuple(ids)
        if self.spec.order == "staggered":
            shift = device % ((self.spec.max_shift or self.num_experiences - 1) + 1)
            return tuple((position + shift) % self.num_experiences for position in ids)
        generator = numpy_generator(self.seed, "experience-order", device)
        return tuple(int(i) for i in generator.permutation(self.num_experiences))

    def orders(self, num_devices: int) -> NDArray[np.int64] | None:
        """Return the order of each device [D, T]; None if all have the same."""
        if self.spec.order == "shared":
            return None
        if self.spec.order == "per-device":
            return np.array([self.order(device) for device in range(num_devices)], np.int64)
        period = (self.spec.max_shift or self.num_experiences - 1) + 1
        table = np.array([self.order(device) for device in range(period)], np.int64)
        return table[np.arange(num_devices) % period]

    def experience_id(self, device: int, position: int) -> int:
        """Return which experience a device meets at a position of its stream."""
        ids = range(self.num_experiences) if self.spec.order == "shared" else self.order(device)
        return ids[position]

    def experience_of_label(self) -> NDArray[np.int64]:
        """Return the experience in which each label occurs [C], where classes are split."""
        table = np.zeros(self.num_classes, np.int64)
        for experience_id in range(self.num_experiences):
            table[list(self.classes(experience_id))] = experience_id
        return table

    def position(self, server_round: int) -> int:
        """Return the position in the stream at a round (from 1)."""
        return (server_round - 1) // self.spec.rounds_per_experience

    def ends_experience(self, server_round: int) -> bool:
        """Whether an experience ends with this round."""
        return server_round % self.spec.rounds_per_experience == 0

    def part(self, server_round: int | None) -> tuple[int, int]:
        """Return which part of an experience a round brings: (k, n) for part k of n.

        Args:
            server_round: Round, from 1; None asks for the experience as a whole.
        """
        if not self.spec.online or server_round is None:
            return 0, 1
        count = self.spec.rounds_per_experience
        return (server_round - 1) % count, count

    def experience(self, device: int, position: int) -> Experience:
        """Return what a device learns at a position of its stream.

        Where labels are delayed, that is the experience whose labels come then.
        """
        order, told = self.order(device), range(self.num_experiences)[position] - self.delay
        if told < 0:
            return Experience(position, order[0], ())
        ids = [order[p] for p in self._mixed(told)]
        occurring = {label for experience_id in ids for label in self.classes(experience_id)}
        return Experience(position, order[told], tuple(sorted(occurring)))

    def _mixed(self, position: int) -> Sequence[int]:
        """Return the positions whose experiences can occur at a position."""
        last, reach = self.num_experiences - 1, 1 if self.spec.blur > 0 else 0
        if reach and self.spec.blur_reach == "all":
            return range(last + 1)
        first = 0 if self.spec.cumulative else max(position - reach, 0)
        return range(first, min(position + reach, last) + 1)

    def task_masks(self) -> Tensor | None:
        """Return the classes allowed beside each label [C, C], bool (task-incremental only)."""
        if self.spec.kind != "task-incremental":
            return None
        masks = torch.zeros(self.num_classes, self.num_classes, dtype=torch.bool)
        for experience_id in range(self.num_experiences):
            classes = torch.tensor(self.classes(experience_id))
            masks[classes[:, None], classes] = True
        return masks

    def domains(self, sample_shape: tuple[int, ...]) -> Domains | None:
        """Return the transforms of samples, by domain; domain 0 is the data as it is.

        Raises:
            ScenarioError: If samples to rotate are not images.
        """
        if not self.has_domains or self.spec.transform == "relabel":
            return None
        if self.spec.transform == "permute":
            return self._permutations(math.prod(sample_shape))
        if len(sample_shape) != 3:
            message = f"rotation needs images [C, H, W], samples are {sample_shape}"
            raise ScenarioError("stream", [Fault("stream", "transform", message)])
        return self._rotations(sample_shape)

    def meanings(self) -> Tensor | None:
        """Return what each label is called in each domain [M, C], int64; None if that is fixed.

        Domain 0 has the labels of the data set; in every other one all names are dealt out anew.
        """
        if not self.has_domains or self.spec.transform != "relabel":
            return None
        rows = [torch.arange(self.num_classes)]
        for domain in range(1, self.num_domains):
            generator = numpy_generator(self.seed, "meaning", domain)
            rows.append(torch.from_numpy(generator.permutation(self.num_classes)))
        return torch.stack(rows).to(torch.int64)

    def _permutations(self, num_features: int) -> Domains:
        rows = [torch.arange(num_features)]
        for domain in range(1, self.num_domains):
            generator = numpy_generator(self.seed, "permutation", domain)
            rows.append(torch.from_numpy(generator.permutation(num_features)))
        index = torch.stack(rows).to(torch.int64)[:, None, :]
        return Domains(index, torch.ones(index.shape))

    def _rotations(self, shape: tuple[int, ...]) -> Domains:
        """Bilinear clockwise rotations in equal steps of 180 degrees / M; outside is 0."""
        depth, height, width = shape
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
        middle = (height - 1) / 2, (width - 1) / 2
        index = np.zeros((self.num_domains, 4, height, width), dtype=np.int64)
        weight = np.zeros((self.num_domains, 4, height, width))
        for domain in range(self.num_domains):
            angle = math.pi * domain / self.num_domains
            sin, cos = math.sin(angle), math.cos(angle)
            source_row = cos * (rows - middle[0]) - sin * (columns - middle[1]) + middle[0]
            source_col = sin * (rows - middle[0]) + cos * (columns - middle[1]) + middle[1]
            top, left = np.floor(source_row + 1e-9), np.floor(source_col + 1e-9)
            for tap, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                row, column = top + down, left + right
                share = (1 - abs(source_row - row)) * (1 - abs(source_col - column))
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                place = np.clip(row, 0, height - 1) * width + np.clip(column, 0, width - 1)
                index[domain, tap] = place.astype(np.int64)
                weight[domain, tap] = np.where(inside, np.clip(share, 0, 1), 0)
        planes = np.arange(depth)[:, None, None] * (height * width)
        full = index[:, :, None] + planes
        weights = np.broadcast_to(weight[:, :, None], full.shape)
        flat = (self.num_domains, 4, depth * height * width)
        return Domains(
            torch.from_numpy(full.reshape(flat).copy()),
            torch.from_numpy(weights.reshape(flat).astype(np.float32)),
        )
