"""What is measured of continual learning, from accuracy matrices.

R[i, j] is the accuracy on experience j after learning the experience at position i (both from 0,
T experiences); b[j] that of the untrained model; A[n, j] the accuracy on experience j after the
n-th measured round, which was one of the experience at position p[n]. Columns are in the order in
which experiences were met. NaN marks what was not measured; means skip it.
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

    arXiv:1801.10112. It can be negative, and is not -BWT.
    """
    return _mean(np.array([_peak(R[j:-1, j]) - R[-1, j] for j in range(len(R) - 1)]))


def learning_accuracy(R: Matrix) -> float:
    """LA = mean_j R[j, j]: plasticity, how well each experience was learned when it came.

    Riemer et al. 2019, arXiv:1810.11910.
    """
    return _mean(np.diagonal(R))


def intransigence(R: Matrix, joint: Matrix) -> float:
    """I = mean_j a*[j] - R[j, j]: what was not learned that could have been (Chaudhry et al. 2018).

    arXiv:1801.10112; the mean of I_k over k. Negative where learning one experience
    after another did better.

    Args:
        R: The run's matrix [T, T].
        joint: That of a run which, at each position, had the data of all experiences up to it;
            a*[j] is its diagonal.
    """
    return _mean(np.diagonal(joint) - np.diagonal(R))


# -- over rounds -----------------------------------------------------------------------------------


def online_accuracy(A: Matrix, p: NDArray[np.int64]) -> float:
    """Mean over rounds of the accuracy on the experience that is being learned: A[n, p[n]].

    How good the device is while it learns. The usual definition counts the answers on each arriving
    batch before training on it; here it is the accuracy on **test** samples after each round.

    Args:
        A: [N, T].
        p: [N].
    """
    return _mean(A[np.arange(len(A)), p])


def min_accuracy(A: Matrix, p: NDArray[np.int64]) -> float:
    """min-ACC = mean_{j < T-1} min_{n: p[n] > j} A[n, j]: stability, with what is lost in passing.

    The lowest point of each experience after it was learned, which the accuracy at the end of
    experiences does not show (the stability gap). De Lange, van de Ven, Tuytelaars, "Continual
    Evaluation for Lifelong Learning: Identifying the Stability Gap", ICLR 2023, arXiv:2205.13452.
    Theirs is over iterations, this one over measured rounds, so it sees less.

    Args:
        A: [N, T].
        p: [N].
    """
    lowest = [-_peak(-A[p > j, j]) for j in range(A.shape[1] - 1)]
    return _mean(np.array(lowest))


def worst_case_accuracy(A: Matrix, p: NDArray[np.int64]) -> float:
    """WC-ACC = A[N-1, T-1] / T + (1 - 1 / T) min-ACC: plasticity and stability at their worst.

    De Lange et al. 2023, arXiv:2205.13452, at the end of the stream. NaN if the stream
    has not come to its last experience.
    """
    T = A.shape[1]
    if len(A) == 0 or p[-1] != T - 1:
        return float("nan")
    last = float(A[-1, -1])
    return last if T == 1 else last / T + (1 - 1 / T) * min_accuracy(A, p)


@dataclass(frozen=True, slots=True)
class RoundScores:
    """What the accuracies after each round say; NaN where a score is not defined."""

    online_accuracy: float
    min_accuracy: float
    worst_case_accuracy: float


def round_scores(A: Matrix, p: NDArray[np.int64]) -> RoundScores:
    """Return all scores of accuracies after rounds [N, T] and the positions of the rounds [N]."""
    return RoundScores(online_accuracy(A, p), min_accuracy(A, p), worst_case_accuracy(A, p))


def area_under(
    cost: NDArray[np.float64], accuracy: NDArray[np.float64], *, budget: float | None = None
) -> float:
    """Return the area under accuracy against what it cost, by trapezoids, over the budget.

    Divided by the width, so it is a mean accuracy, without unit, whatever the cost is measured in
    (bytes, joules, seconds). Two runs have to be given the same budget to be compared.

    Args:
        cost: What had been spent at each point [N], ascending.
        accuracy: [N]; points without one are left out.
        budget: End of the axis: a run that costs more is cut there, one that costs less keeps
            its last accuracy. None is what this run costs.

    Returns:
        NaN where a cost is not known, or nothing was spent.
    """
    known = ~np.isnan(accuracy)
    x, y = np.asarray(cost, np.float64)[known], np.asarray(accuracy, np.float64)[known]
    if len(x) == 0 or np.isnan(x).any():
        return float("nan")
    end = float(x[-1]) if budget is None else budget
    if not end > x[0]:
        return float("nan")
    inside = int(np.searchsorted(x, end, side="right"))
    last = float(y[-1]) if inside == len(x) else float(np.interp(end, x, y))
    x, y = np.append(x[:inside], end), np.append(y[:inside], last)
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (end - x[0]))


# -- all at once -----------------------------------------------------------------------------------


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


# -- over devices ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """How a value is spread over devices.

    Attributes:
        mean: Mean.
        std: Standard deviation of the population.
        worst_decile: Mean of the worst tenth, at least one device.
        worst: The worst device.
        best: The best.
        num_devices: Devices of which the value is known.
        jain: Jain's index, see `jain_index`.
    """

    mean: float
    std: float
    worst_decile: float
    worst: float
    best: float
    num_devices: int
    jain: float

    @property
    def variance(self) -> float:
        """Variance of the population."""
        return self.std**2

    @property
    def gap(self) -> float:
        """Between the best device and the worst; not negative."""
        return abs(self.best - self.worst)


def jain_index(values: NDArray[np.float64]) -> float:
    """Jain's index (sum a)^2 / (n sum a^2): 1 if all are equal, 1 / n if one has everything.

    For values that are not negative. Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and
    Discrimination for Resource Allocation in Shared Computer Systems", 1984, arXiv:cs/9809099.

    Returns:
        NaN of no values, and if all are 0.
    """
    known = values[~np.isnan(values)]
    squares = float((known**2).sum())
    return float(known.sum() ** 2 / (len(known) * squares)) if squares > 0 else float("nan")


def spread(values: NDArray[np.float64]) -> Spread:
    """Return how values, of which more is better, are spread; NaN is left out."""
    known = np.sort(values[~np.isnan(values)])
    if len(known) == 0:
        nan = float("nan")
        return Spread(nan, nan, nan, nan, nan, 0, nan)
    tenth = max(1, len(known) // 10)
    return Spread(
        float(known.mean()),
        float(known.std()),
        float(known[:tenth].mean()),
        float(known[0]),
        float(known[-1]),
        len(known),
        jain_index(known),
    )


def spread_of_costs(values: NDArray[np.float64]) -> Spread:
    """Return the spread of something of which less is better: worst is the largest."""
    s = spread(-values)
    return Spread(-s.mean, s.std, -s.worst_decile, -s.worst, -s.best, s.num_devices, s.jain)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _peak(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else float("nan")
