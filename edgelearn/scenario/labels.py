"""What devices are told: labels that are wrong, and samples that have none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelearn.scenario.spec import LabelSpec
from edgelearn.scenario.stream import Stream
from edgelearn.seeds import numpy_generator


def told(labels: NDArray[np.int64], spec: LabelSpec, stream: Stream) -> NDArray[np.int64]:
    """Return the labels as devices are told them [N], with symmetric noise.

    A share of them, chosen at random from the whole data set, is replaced by another class, each
    with the same chance: of all classes, or in a task-incremental stream of the sample's task.

    Reference: van Rooyen, Menon, Williamson, "Learning with Symmetric Label Noise", NeurIPS 2015,
    arXiv:1505.07634. The share is of labels that are wrong, not of labels drawn anew.

    Args:
        labels: True labels [N].
        spec: The share.
        stream: Its tasks.
    """
    if spec.noise == 0:
        return labels
    generator = numpy_generator(stream.seed, "label-noise")
    wrong = generator.permutation(len(labels))[: round(spec.noise * len(labels))]
    groups = [tuple(range(stream.num_classes))]
    if stream.spec.kind == "task-incremental":
        groups = [stream.classes(e) for e in range(stream.num_experiences)]
    out = labels.copy()
    for group in groups:
        # The place of a label in its group moves by 1 to n - 1: never back to itself.
        members, n = np.array(group), len(group)
        hit = wrong[np.isin(labels[wrong], members)]
        steps = generator.integers(1, n, len(hit)) if n > 1 else np.zeros(len(hit), np.int64)
        out[hit] = members[(np.searchsorted(members, labels[hit]) + steps) % n]
    return out


def labelled(count: int, spec: LabelSpec, seed: int) -> NDArray[np.bool_]:
    """Return which of `count` samples have a label [N]; the others are chosen at random."""
    has_label = np.ones(count, bool)
    missing = numpy_generator(seed, "label-missing").permutation(count)
    has_label[missing[: round(spec.missing * count)]] = False
    return has_label
