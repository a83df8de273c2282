"""A benchmark of Avalanche as a data set: the samples of its streams, and their order.

Nothing of Avalanche is imported; the benchmark is somebody's own object. A data set plug-in that
uses it is two lines in a file, named `file.py:split_mine` in a scenario's `[data]`::

    def split_mine(spec):
        return from_benchmark(nc_benchmark(train, test, n_experiences=5, task_labels=False))

The other way round is `edgelearn.continual.avalanche.as_avalanche`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import DatasetError
from edgelearn.scenario.datasets import Dataset


def from_benchmark(benchmark: Any, *, name: str = "avalanche") -> Dataset:
    """Return the data set of a benchmark with a train and a test stream.

    Each training sample keeps the experience that it is from, and each test sample, too, where the
    test stream is as long. A stream of kind "given" then brings the experiences to each device as
    the benchmark has them.

    Where no class is in two experiences (`nc_benchmark`, `class_incremental_benchmark`), labels are
    numbered anew in the order in which the stream brings them. A class-incremental or task-
    incremental stream with as many experiences then brings the same samples in the same order, if
    all experiences have as many classes (or the first ones one more).

    Where classes come back (`ni_benchmark`, `new_instances_benchmark`, domain-incremental ones),
    labels stay, and the user of a sample is the experience that it is from: with
    `partition.kind = "user"` and as many devices, each device is one of them.

    Args:
        benchmark: An object with `train_stream` and `test_stream`: sequences of experiences, each
            with a `dataset` of (input, label, ...).
        name: Short name.

    Raises:
        DatasetError: If an experience is empty, or has no shape of samples in common with the
            others; if the test stream has classes that the train stream has not; or if it has
            several experiences, but not as many.
    """
    train, test = _chunks(benchmark.train_stream), _chunks(benchmark.test_stream)
    x_train, y_train, chunk_train = _joined(train)
    x_test, y_test, chunk_test = _joined(test)
    classes = [np.unique(y) for _, y in train]
    known = np.unique(y_train)
    if unknown := sorted(set(y_test.tolist()) - set(known.tolist())):
        raise DatasetError(f"{name}: only the test stream has the classes {unknown}")
    if len(test) not in (1, len(train)):
        raise DatasetError(
            f"{name}: {len(test)} experiences to test and {len(train)} to train on; allowed is one "
            "for each, or one for all"
        )
    x_train, x_test, scale = _compact(x_train, x_test)
    dataset = Dataset(
        name,
        x_train,
        y_train,
        x_test,
        y_test,
        num_classes=int(known.max()) + 1,
        scale=scale,
        experiences_train=chunk_train,
        experiences_test=chunk_test if len(test) == len(train) else None,
    )
    order = np.concatenate(classes)
    if len(order) > len(known):
        return replace(dataset, users_train=chunk_train, users_test=chunk_test)
    place = np.empty(int(known.max()) + 1, np.int64)
    place[order] = np.arange(len(order))
    return replace(dataset, y_train=place[y_train], y_test=place[y_test], num_classes=len(order))


Chunk = tuple[NDArray[Any], NDArray[np.int64]]


def _chunks(stream: Any) -> list[Chunk]:
    chunks = []
    for position, experience in enumerate(stream):
        items = [experience.dataset[index] for index in range(len(experience.dataset))]
        if not items:
            raise DatasetError(f"experience {position} of the benchmark has no samples")
        x = np.stack([np.asarray(item[0]) for item in items])
        chunks.append((x, np.array([int(item[1]) for item in items], np.int64)))
    if not chunks:
        raise DatasetError("a stream of the benchmark has no experiences")
    return chunks


def _joined(chunks: Sequence[Chunk]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    shapes = sorted({x.shape[1:] for x, _ in chunks})
    if len(shapes) > 1:
        raise DatasetError(f"samples of the benchmark have several shapes: {shapes}")
    owner = np.repeat(np.arange(len(chunks)), [len(y) for _, y in chunks])
    return np.concatenate([x for x, _ in chunks]), np.concatenate([y for _, y in chunks]), owner


def _compact(train: NDArray[Any], test: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return samples as bytes where nothing is lost by it, and the factor that undoes it."""
    if train.dtype == test.dtype == np.uint8:
        return train, test, 1 / 255
    pair = train.astype(np.float32), test.astype(np.float32)
    if all(x.min() >= 0 and x.max() <= 1 for x in pair):
        rounded = [np.rint(x * 255) for x in pair]
        if all(np.abs(r / 255 - x).max() < 1e-6 for r, x in zip(rounded, pair, strict=True)):
            return rounded[0].astype(np.uint8), rounded[1].astype(np.uint8), 1 / 255
    return *pair, 1.0
