"""What a device knows of what it has seen, of what only others have, and of everything.

Where devices meet experiences in different orders, join late or leave early, "the accuracy so far"
has several meanings. All functions take counts [D, T] of correct answers and of test samples, by
device and experience, and `first_met` [D, T]: the position at which a device first meets an
experience, -1 where it never does. Means over nothing are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Exposure:
    """Accuracies at one time.

    Attributes:
        own: A device on what it has itself met, mean over devices: each counts alike.
        fleet: On everything that any device has met, all devices' test samples pooled.
        others: On what a device has not met but others have, pooled over devices.
        gain: How much more that is than the untrained model had on the same samples: what devices
            have from others.
    """

    own: float
    fleet: float
    others: float
    gain: float

    def as_dict(self) -> dict[str, float]:
        """Return the scores by name."""
        return asdict(self)


def met(first_met: Counts, position: int) -> Mask:
    """Return which experiences each device has met up to and with a position [D, T]."""
    return (first_met >= 0) & (first_met <= position)


def own_accuracy(correct: Counts, count: Counts, seen: Mask) -> NDArray[np.float64]:
    """Return each device's accuracy on what it has met [D]."""
    return _ratio((correct * seen).sum(1), (count * seen).sum(1))


def pooled_accuracy(correct: Counts, count: Counts, mask: Mask) -> float:
    """Return the accuracy over all test samples where the mask is set."""
    return float(_ratio((correct * mask).sum(), (count * mask).sum()))


def exposure(
    correct: Counts,
    count: Counts,
    seen: Mask,
    seen_by_any: Mask,
    untrained: NDArray[np.float64],
) -> Exposure:
    """Score what devices answered.

    Args:
        correct: Correct answers [D, T].
        count: Test samples [D, T].
        seen: What each of these devices has met [D, T].
        seen_by_any: What any device of the fleet has met [T].
        untrained: Accuracy of the untrained model on each experience [T], NaN where unknown.
    """
    everything = np.broadcast_to(seen_by_any, seen.shape)
    foreign = everything & ~seen
    weight = (count * foreign).sum(0)
    known = ~np.isnan(untrained) & (weight > 0)
    before = _ratio((untrained[known] * weight[known]).sum(), weight[known].sum())
    others = pooled_accuracy(correct, count, foreign)
    return Exposure(
        own=_nanmean(own_accuracy(correct, count, seen)),
        fleet=pooled_accuracy(correct, count, everything),
        others=others,
        gain=pooled_accuracy(correct, count, foreign & known) - float(before),
    )


def mean_exposure(found: Sequence[Exposure]) -> Exposure:
    """Return the mean over times; a score counts where it is defined."""
    names = ("own", "fleet", "others", "gain")
    columns = (np.array([getattr(one, name) for one in found]) for name in names)
    return Exposure(*[_nanmean(column) for column in columns])


def _ratio(part: Counts, whole: Counts) -> NDArray[np.float64]:
    out = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=out, where=np.asarray(whole) > 0)
    return out


def _nanmean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
