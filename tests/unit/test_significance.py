from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgelearn.significance import (
    MOST_FLIPPED,
    estimate,
    holm,
    paired_t_p,
    sign_flip_p,
    student_p,
    student_quantile,
)

nan = math.nan


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452)]
)
def test_quantiles_of_the_tables(df, t):
    assert student_quantile(0.95, df) == pytest.approx(t, abs=5e-5)
    assert student_p(t, df) == pytest.approx(0.05, abs=5e-6)
    assert student_p(-t, df) == student_p(t, df)


def test_closed_forms():
    for t in (0.0, 0.3, 1.0, 7.0, 1e6):
        assert student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-6)
        assert student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    assert student_p(math.inf, 3) == 0
    assert math.isnan(student_p(nan, 3))


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 9, 30, 500):
        for t in (0.0, 0.1, 1.0, 2.5, 10.0, 100.0):
            assert student_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-8, abs=1e-300)
        for confidence in (0.5, 0.9, 0.99):
            expected = stats.t.ppf((1 + confidence) / 2, df)
            assert student_quantile(confidence, df) == pytest.approx(expected, rel=1e-8)
    values = np.random.default_rng(0).normal(0.5, 1, 8)
    assert paired_t_p(list(values)) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    exact = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(list(values)) == pytest.approx(exact.pvalue)
    low, high = stats.t.interval(0.95, 7, values.mean(), values.std(ddof=1) / math.sqrt(8))
    found = estimate(list(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_bad_arguments():
    with pytest.raises(ValueError, match="df is 0"):
        student_p(1.0, 0)
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            student_quantile(confidence, 3)


def test_estimate_by_hand():
    found = estimate([1.0, nan, 3.0])
    assert (found.mean, found.n) == (2.0, 2)
    assert found.std == pytest.approx(math.sqrt(2))
    assert found.margin == pytest.approx(12.7062, abs=1e-4)
    assert (found.low, found.high) == pytest.approx((2 - found.margin, 2 + found.margin))


@pytest.mark.parametrize("values", [[], [nan], [0.5]])
def test_without_two_values_there_is_no_interval(values):
    found = estimate(values)
    assert math.isnan(found.low)
    assert math.isnan(found.std)
    assert found.n == sum(not math.isnan(v) for v in values)


def test_a_goal_that_was_not_reached():
    found = estimate([3.0, math.inf, nan])
    assert (found.mean, found.n) == (math.inf, 2)
    assert math.isnan(found.std)


def slow_flip(values):
    total = abs(sum(values))
    signs = itertools.product((1, -1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(row, values, strict=True))) for row in signs]
    return sum(found >= total - 1e-9 for found in sums) / len(sums)


@pytest.mark.parametrize(
    "values", [[1.0], [1.0, 2.0], [0.3, -0.1, 0.2], [0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.0, 1.0]]
)
def test_sign_flips_one_by_one(values):
    assert sign_flip_p(values) == pytest.approx(slow_flip(values))


def test_the_least_p_of_a_few_seeds():
    for n in range(1, 8):
        assert sign_flip_p([0.1] * n) == 2.0 ** (1 - n)
    assert sign_flip_p([0.0, 0.0]) == 1
    assert math.isnan(sign_flip_p([]))
    assert math.isnan(sign_flip_p([0.1] * (MOST_FLIPPED + 1)))


def test_no_spread_no_t_test():
    assert math.isnan(paired_t_p([0.1]))
    assert math.isnan(paired_t_p([0.1 + 0.2, 0.3, 0.3]))  # equal but for rounding
    assert math.isnan(paired_t_p([0.0, 0.0]))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    mixed = holm([nan, 0.02, 0.01])
    assert math.isnan(mixed[0])
    assert mixed[1:] == pytest.approx([0.02, 0.02])
    assert holm([]) == []
