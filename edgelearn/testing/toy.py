"""Toy data: four kinds of 4x4 images, in two experiences, that a tiny network learns at once.

Small enough that whole runs take milliseconds, and deterministic: no seed to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.device.learner import Learner
from edgelearn.params import FlatModel
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.models import mlp
from edgelearn.scenario.samples import Encoding, OwnedSamples, Samples, SampleStore, SharedSamples
from edgelearn.scenario.spec import ClientSpec, DataSpec, Scenario
from edgelearn.scenario.stream import Experience
from edgelearn.seeds import derive, numpy_generator

NUM_CLASSES = 4
NUM_EXPERIENCES = 2
NUM_PUBLIC = 8
SHAPE = (1, 4, 4)
ENCODING = Encoding(scale=1 / 255, mean=0.3, std=0.3)
_DATASET = "edgelearn.testing.toy:toy_dataset"


def toy_images(num_per_class: int, part: str = "train") -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images [N, 1, 4, 4], uint8, and labels [N], int64, the classes taking turns.

    Class c is bright in quadrant c; all pixels are noisy.
    """
    labels = np.tile(np.arange(NUM_CLASSES), num_per_class)
    noise = numpy_generator(0, f"toy-{part}").integers(0, 80, (len(labels), *SHAPE))
    images = 20 + noise
    for label in range(NUM_CLASSES):
        row, column = 2 * (label // 2), 2 * (label % 2)
        images[labels == label, 0, row : row + 2, column : column + 2] += 150
    return images.astype(np.uint8), labels.astype(np.int64)


def toy_samples(num_per_class: int = 15) -> SharedSamples:
    """Return a store with `num_per_class` images of each class; ids follow `toy_images`."""
    x, y = toy_images(num_per_class)
    return SharedSamples(torch.from_numpy(x), torch.from_numpy(y), ENCODING)


def toy_model() -> FlatModel:
    """Return a network of 172 parameters with the same initial values each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "toy-model"))
        return FlatModel(mlp(input_shape=SHAPE, num_classes=NUM_CLASSES, hidden=(8,)))


def toy_facts() -> Facts:
    """Return what a strategy may know of the toy before data arrives."""
    return Facts(NUM_EXPERIENCES, NUM_CLASSES, sample_bytes=17, num_public=NUM_PUBLIC)


def toy_learner(strategy: ClientStrategy, **spec: Any) -> Learner:
    """Return a learner of the toy.

    Args:
        strategy: The client strategy.
        **spec: Values of `ClientSpec` to replace, such as `lr=0.1`.
    """
    values = {"epochs": 2, "batch_size": 4, "lr": 0.1, **spec}
    return Learner(
        model=toy_model(),
        strategy=strategy,
        spec=ClientSpec(strategy="toy", **values),
        facts=toy_facts(),
        seed=0,
    )


@dataclass(frozen=True, slots=True)
class ToyDevice:
    """What one device has: classes 0 and 1 in the first experience, 2 and 3 in the second.

    Attributes:
        device: Index of the device.
        store: Where the ids lead.
        ids: Ids of its samples by position.
        public: Ids of the samples that all devices have.
    """

    device: int
    store: SampleStore
    ids: tuple[Tensor, ...]
    public: Tensor | None = None

    def experience(self, position: int) -> Experience:
        """Return the experience at a position."""
        return Experience(position, position, (2 * position, 2 * position + 1))

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:  # noqa: ARG002
        """Return the samples of that experience."""
        return Samples(self.store, self.ids[position])


def toy_devices(num_devices: int = 3, *, num_per_class: int = 5) -> list[ToyDevice]:
    """Return devices that share one store, as simulated ones do, each with its own samples.

    Args:
        num_devices: Devices.
        num_per_class: Samples of each class that a device has.
    """
    num_own = num_devices * num_per_class
    store = toy_samples(num_own + NUM_PUBLIC // NUM_CLASSES)
    public = torch.arange(num_own * NUM_CLASSES, len(store.y), dtype=torch.int32)
    devices = []
    for device in range(num_devices):
        first = device * num_per_class * NUM_CLASSES
        ids = torch.arange(first, first + num_per_class * NUM_CLASSES, dtype=torch.int32)
        labels = store.labels(ids)
        parts = tuple(ids[labels // 2 == position] for position in range(NUM_EXPERIENCES))
        devices.append(ToyDevice(device, store, parts, public))
    return devices


def toy_owned(like: ToyDevice, store: OwnedSamples, position: int) -> ToyDevice:
    """Return a device with a store of its own, as a real one has, when an experience arrives.

    Args:
        like: The device whose samples of that experience arrive.
        store: What the real device holds already; it takes them in.
        position: The experience; of others it then has no samples.
    """
    shared = like.store
    if not isinstance(shared, SharedSamples):
        raise TypeError(f"expected a device with shared samples, got {type(shared).__name__}")
    arriving = like.ids[position]
    public = like.public  # it comes with the first experience, and stays if it is remembered
    if public is not None and position == 0:
        public = store.add(shared.stored(public), shared.labels(public))
    ids = store.add(shared.stored(arriving), shared.labels(arriving))
    parts = tuple(ids if p == position else ids[:0] for p in range(NUM_EXPERIENCES))
    return ToyDevice(like.device, store, parts, public)


def toy_store() -> OwnedSamples:
    """Return the empty store of a real device."""
    return OwnedSamples.empty(SHAPE, torch.uint8, ENCODING)


# -- whole runs ------------------------------------------------------------------------------------


def toy_dataset(_spec: DataSpec) -> Dataset:
    """Return the toy as a data set; scenarios name it `edgelearn.testing.toy:toy_dataset`."""
    x_train, y_train = toy_images(30)
    x_test, y_test = toy_images(10, "test")
    return Dataset(
        "toy",
        x_train,
        y_train,
        x_test,
        y_test,
        NUM_CLASSES,
        scale=ENCODING.scale,
        mean=ENCODING.mean,
        std=ENCODING.std,
    )


def toy_scenario(**tables: Any) -> Scenario:
    """Return a scenario of four devices and four rounds.

    Args:
        **tables: Values by table to replace, such as `client={"strategy": "file.py:Class"}`.

    Example:
        >>> toy_scenario(fleet={"cohort": 2}).fleet.cohort
        2
    """
    raw: dict[str, Any] = {
        "name": "toy",
        "data": {"dataset": _DATASET},
        "model": {"name": "mlp", "args": {"hidden": [8]}},
        "fleet": {"num_devices": 4, "cohort": 4},
        "stream": {
            "kind": "class-incremental",
            "num_experiences": NUM_EXPERIENCES,
            "rounds_per_experience": 2,
        },
        "client": {"strategy": "naive", "batch_size": 4, "lr": 0.1},
    }
    for name, value in tables.items():
        both = isinstance(value, Mapping) and isinstance(raw.get(name), Mapping)
        raw[name] = {**raw[name], **value} if both else value
    return from_dict(raw, source="toy")
