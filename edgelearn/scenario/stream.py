"""When a device sees what: experiences, their order, and what changes between them."""

from __future__ import annotations

import math
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
        classes: Labels that occur in it.
    """

    position: int
    id: int
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """The experiences of a scenario and each device's way through them."""

    spec: StreamSpec
    num_classes: int
    seed: int

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
        """Whether experiences differ by their classes (else by their domain)."""
        return self.spec.kind != "domain-incremental"

    @property
    def num_experiences(self) -> int:
        """Experiences in the stream, T."""
        return self.spec.num_experiences

    def classes(self, experience_id: int) -> tuple[int, ...]:
        """Return the labels that occur in an experience."""
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
        generator = numpy_generator(self.seed, "experience-order", device)
        return tuple(int(i) for i in generator.permutation(self.num_experiences))

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

    def experience(self, device: int, position: int) -> Experience:
        """Return what a device meets at a position of its stream."""
        experience_id = self.experience_id(device, position)
        return Experience(position, experience_id, self.classes(experience_id))

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
        """Return the transforms of a domain-incremental stream; domain 0 is the data as it is.

        Raises:
            ScenarioError: If samples to rotate are not images.
        """
        if self.splits_classes:
            return None
        if self.spec.transform == "permute":
            return self._permutations(math.prod(sample_shape))
        if len(sample_shape) != 3:
            message = f"rotation needs images [C, H, W], samples are {sample_shape}"
            raise ScenarioError("stream", [Fault("stream", "transform", message)])
        return self._rotations(sample_shape)

    def _permutations(self, num_features: int) -> Domains:
        rows = [torch.arange(num_features)]
        for domain in range(1, self.num_experiences):
            generator = numpy_generator(self.seed, "permutation", domain)
            rows.append(torch.from_numpy(generator.permutation(num_features)))
        index = torch.stack(rows).to(torch.int64)[:, None, :]
        return Domains(index, torch.ones(index.shape))

    def _rotations(self, shape: tuple[int, ...]) -> Domains:
        """Bilinear clockwise rotations in equal steps of 180 degrees / T; outside is 0."""
        depth, height, width = shape
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
        middle = (height - 1) / 2, (width - 1) / 2
        index = np.zeros((self.num_experiences, 4, height, width), dtype=np.int64)
        weight = np.zeros((self.num_experiences, 4, height, width))
        for domain in range(self.num_experiences):
            angle = math.pi * domain / self.num_experiences
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
        flat = (self.num_experiences, 4, depth * height * width)
        return Domains(
            torch.from_numpy(full.reshape(flat).copy()),
            torch.from_numpy(weights.reshape(flat).astype(np.float32)),
        )
