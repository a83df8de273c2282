"""Experiences that the data set brings with it (kind "given"), checked against the stream.

Any order of data can be learned this way: a benchmark of Avalanche, logs by month, sensors by site.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.spec import StreamSpec
from edgelearn.scenario.stream import Stream

Experiences = NDArray[np.int64]


def given_classes(dataset: Dataset, spec: StreamSpec) -> tuple[tuple[int, ...], ...] | None:
    """Return the labels that occur in each of a data set's experiences; None for other kinds.

    Raises:
        ScenarioError: If the data set has no experiences, or not as many as the stream.
    """
    if spec.kind != "given":
        return None
    found = dataset.experiences_train
    if found is None:
        message = (
            f"got 'given', but the data set {dataset.name!r} does not say which experience its "
            "samples are of (experiences_train)"
        )
        raise ScenarioError("stream", [Fault("stream", "kind", message)])
    count = dataset.num_experiences
    if count != spec.num_experiences:
        message = f"got {spec.num_experiences}; the data set {dataset.name!r} has {count}"
        raise ScenarioError("stream", [Fault("stream", "num_experiences", message)])
    return tuple(
        tuple(np.unique(dataset.y_train[found == experience]).tolist())
        for experience in range(count)
    )


def experiences_of(
    dataset: Dataset, stream: Stream
) -> tuple[Experiences | None, Experiences | None]:
    """Return the experience of each training sample [N] and of each test sample [M].

    They are None where a sample belongs to no experience by itself: new instances are cut by each
    device, and domains show every sample; so are test samples of a data set that has one test set
    for all of its experiences.

    Raises:
        ScenarioError: If classes follow each other in other groups than in the data set.
    """
    if stream.spec.kind == "given":
        return dataset.experiences_train, dataset.experiences_test
    if not stream.splits_classes:
        return None, None
    table = stream.experience_of_label()
    by_class = table[dataset.y_train], table[dataset.y_test]
    _check_groups(dataset, stream, by_class[0])
    return by_class


def _check_groups(dataset: Dataset, stream: Stream, by_class: Experiences) -> None:
    """A stream as long as the data set's own has to be the same, or be asked for by its kind."""
    found, spec = dataset.experiences_train, stream.spec
    if found is None or spec.shuffle_classes or dataset.num_experiences != spec.num_experiences:
        return
    own = [set(np.unique(dataset.y_train[found == e])) for e in range(spec.num_experiences)]
    if sum(map(len, own)) > len(set().union(*own)) or np.array_equal(found, by_class):
        return  # where classes come back, groups of classes are another stream anyway
    dealt = [len(stream.classes(e)) for e in range(spec.num_experiences)]
    message = (
        f"got {spec.kind!r}, which deals {stream.num_classes} classes out in groups of {dealt}; "
        f"the data set {dataset.name!r} has {[len(e) for e in own]}, or other classes in them; "
        "'given' takes them as they are"
    )
    raise ScenarioError("stream", [Fault("stream", "kind", message)])
