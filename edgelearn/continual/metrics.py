"""What is measured of continual learning, from accuracy matrices.

R[i, j] is the accuracy on experience j after learning the experience at position i (both from 0,
T experiences); b[j] that of the untrained model. NaN marks what was not measured; means skip it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def average_accuracy(R: Matrix) -> float:
    """ACC = mean_j R[T-1, j] (Lopez-Paz and Ranzato 2017, arXiv:1706.08840, equation 2)."""
    return _mean(R[-1])


def average_incremental_accuracy(R: Matrix) -> float:
    """AIA = mean_i mean_{j <= i} R[i, j] (Rebuffi et al. 2017, iCaRL, arXiv:1611.07725)."""
    return _mean(np.array([_mean(R[i, : i + 1]) for i in range(len(R))]))


def backward_transfer(R: Matrix) -> float:
    """BWT = mean_{j < T-1} R[T-1, j] - R[j, j] (Lopez-Paz and Ranzato 2017, equation 3)."""
    return _mean(R[-1, :-1] - np.diagonal(R)[:-1])


def forward_transfer(R: Matrix, b: NDArray[np.float64]) -> float:
    """FWT = mean_{j >= 1} R[j-1, j] - b[j] (Lopez-Paz and Ranzato 2017, equation 4)."""
    return _mean(np.diagonal(R, offset=1) - b[1:])


def forgetting(R: Matrix) -> float:
    """F = mean_{j < T-1} max_{j <= l < T-1} R[l, j] - R[T-1, j] (Chaudhry et al. 2018).

    arXiv:1801.10112, equation 3. It can be negative, and is not -BWT.
    """
    return _mean(np.array([_peak(R[j:-1, j]) - R[-1, j] for j in range(len(R) - 1)]))


def learning_accuracy(R: Matrix) -> float:
    """LA = mean_j R[j, j]: how well each experience was learned when it came (Riemer 2019)."""
    return _mean(np.diagonal(R))


@dataclass(frozen=True, slots=True)
class ContinualScores:
    """All scores of one accuracy matrix; NaN where a score is not defined."""

    average_accuracy: float
    average_incremental_accuracy: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float
    learning_accuracy: float

    def as_dict(self) -> dict[str, float]:
        """Return the scores by name."""
        return asdict(self)


def scores(R: Matrix, b: NDArray[np.float64]) -> ContinualScores:
    """Return all scores of a square accuracy matrix [T, T] and the untrained accuracies [T]."""
    return ContinualScores(
        average_accuracy(R),
        average_incremental_accuracy(R),
        backward_transfer(R),
        forward_transfer(R, b),
        forgetting(R),
        learning_accuracy(R),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """How a value is spread over devices."""

    mean: float
    std: float
    worst_decile: float
    worst: float
    best: float
    num_devices: int


def spread(values: NDArray[np.float64]) -> Spread:
    """Return mean, population std, mean of the worst tenth (at least one), worst and best."""
    known = np.sort(values[~np.isnan(values)])
    if len(known) == 0:
        nan = float("nan")
        return Spread(nan, nan, nan, nan, nan, 0)
    tenth = max(1, len(known) // 10)
    return Spread(
        float(known.mean()),
        float(known.std()),
        float(known[:tenth].mean()),
        float(known[0]),
        float(known[-1]),
        len(known),
    )


def spread_of_costs(values: NDArray[np.float64]) -> Spread:
    """Return the spread of something of which less is better: worst is the largest."""
    s = spread(-values)
    return Spread(-s.mean, s.std, -s.worst_decile, -s.worst, -s.best, s.num_devices)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _peak(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else float("nan")
