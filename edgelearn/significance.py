"""What can be said over seeds: intervals, paired tests, and Holm's correction for several of them.

Runs with the same seed share data, partition, cohorts and initial parameters, so strategies are
compared by the **differences** within seeds, which vary less than the values themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_FLIPPED = 16  # differences, of which all sign patterns are tried at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, and how sure it is.

    Attributes:
        mean: NaN without values.
        std: Sample standard deviation (n - 1); NaN of fewer than two values.
        low: Lower end of the interval of the mean; NaN of fewer than two values.
        high: Upper end.
        n: Number of values.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def estimate(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Return the mean with Student's interval, mean ± t s / sqrt(n); NaN values are left out.

    Where a value is infinite, such as the rounds to a goal that was not reached, so is the mean,
    and there is no interval.

    Example:
        >>> found = estimate([1.0, 2.0, 3.0])
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2 or not all(map(math.isfinite, known)):
        mean = sum(known) / len(known) if known else math.nan
        return Estimate(mean, math.nan, math.nan, math.nan, len(known))
    mean, std = statistics.fmean(known), statistics.stdev(known)
    margin = student_quantile(confidence, len(known) - 1) * std / math.sqrt(len(known))
    return Estimate(mean, std, mean - margin, mean + margin, len(known))


def student_p(t: float, df: int) -> float:
    """Return P(|T| >= |t|) of Student's distribution: I_x(df / 2, 1 / 2), x = df / (df + t^2).

    Args:
        t: The statistic.
        df: Degrees of freedom, at least 1.

    Raises:
        ValueError: If there are no degrees of freedom.
    """
    if df < 1:
        raise ValueError(f"df is {df}; at least 1 is needed")
    if math.isnan(t) or math.isinf(t):
        return math.nan if math.isnan(t) else 0.0
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def student_quantile(confidence: float, df: int) -> float:
    """Return t with P(|T| <= t) = confidence, by bisection.

    Example:
        >>> round(student_quantile(0.95, 1), 4), round(student_quantile(0.95, 4), 4)
        (12.7062, 2.7764)

    Raises:
        ValueError: If the confidence is not between 0 and 1, or there are no degrees of freedom.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    low, high = 0.0, 1.0
    while student_p(high, df) > 1 - confidence:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if student_p(middle, df) > 1 - confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def paired_t_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of Student's paired test.

    NaN of fewer than two differences, and where all are equal: without any spread the statistic
    is 0 / 0 or infinite, and says nothing.
    """
    if len(differences) < 2:
        return math.nan
    mean, std = statistics.fmean(differences), statistics.stdev(differences)
    if std <= 1e-12 * max(map(abs, differences)):
        return math.nan
    return student_p(mean / (std / math.sqrt(len(differences))), len(differences) - 1)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact two-sided p of the sign-flip (paired permutation) test.

    The share of all 2^n sign patterns whose |sum| is at least that of the differences as they are.
    It assumes nothing of their distribution but symmetry around 0, and can't be below 2^(1-n): five
    seeds reach 0.0625, six 0.03125.

    Reference: Fisher, "The Design of Experiments", 1935, section 21.

    Returns:
        p; NaN of no differences, and of more than `MOST_FLIPPED`, where Student's test serves.
    """
    n = len(differences)
    if n == 0 or n > MOST_FLIPPED:
        return math.nan
    values = np.asarray(differences, np.float64)
    patterns = np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1  # the others mirror these
    sums = np.abs((1 - 2 * patterns) @ values)
    slack = 1e-12 * np.abs(values).sum()  # sums that differ by rounding alone are equal
    return float((sums >= sums[0] - slack).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the same order; NaN stays and is not counted.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal
    of Statistics 6, 1979.

    Example:
        >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        adjusted[i] = least
    return adjusted


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function I_x(a, b), by its continued fraction."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges quickly on the other side
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 26.5.8 of Abramowitz and Stegun, evaluated by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        factor = 1.0
        for term in (even, odd):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            factor = c * d
            value *= factor
        if abs(factor - 1.0) < 1e-15:
            break
    return value
