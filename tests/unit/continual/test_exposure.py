"""By hand: three devices, three experiences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgelearn.continual.exposure import (
    Exposure,
    exposure,
    mean_exposure,
    met,
    own_accuracy,
    pooled_accuracy,
)

FIRST_MET = np.array([[0, 1, 2], [2, 0, 1], [-1, 0, -1]])
COUNT = np.array([[10, 10, 20], [5, 0, 5], [10, 10, 10]])
CORRECT = np.array([[8, 4, 2], [1, 0, 4], [3, 9, 0]])
UNTRAINED = np.array([0.1, 0.2, 0.3])
nan = math.nan


def test_what_was_met():
    assert met(FIRST_MET, 0).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert met(FIRST_MET, 2).tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 0]]


def test_accuracy_on_what_each_device_has_met():
    # The second one has no test samples of what it has met.
    found = own_accuracy(CORRECT, COUNT, met(FIRST_MET, 0))
    assert found == pytest.approx([0.8, nan, 0.9], nan_ok=True)


def test_scores_after_the_first_experience():
    seen = met(FIRST_MET, 0)
    found = exposure(CORRECT, COUNT, seen, seen.any(0), UNTRAINED)
    assert found.own == pytest.approx((0.8 + 0.9) / 2)
    assert found.fleet == pytest.approx((8 + 4 + 1 + 0 + 3 + 9) / (10 + 10 + 5 + 0 + 10 + 10))
    # Not met by themselves, but by another: (0, 1), (1, 0), (2, 0); nobody has met 2.
    assert found.others == pytest.approx((4 + 1 + 3) / (10 + 5 + 10))
    assert found.gain == pytest.approx(8 / 25 - (0.1 * 15 + 0.2 * 10) / 25)


def test_scores_at_the_end():
    seen = met(FIRST_MET, 2)
    found = exposure(CORRECT, COUNT, seen, seen.any(0), UNTRAINED)
    assert found.own == pytest.approx((14 / 40 + 5 / 10 + 9 / 10) / 3)
    assert found.fleet == pytest.approx(CORRECT.sum() / COUNT.sum())
    assert found.others == pytest.approx(3 / 20)  # the third device on experiences 0 and 2
    assert found.gain == pytest.approx(3 / 20 - (0.1 * 10 + 0.3 * 10) / 20)


def test_what_is_not_defined_is_nan():
    all_, none = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    found = exposure(CORRECT, COUNT, all_, all_.any(0), UNTRAINED)
    assert (found.own, found.fleet) == pytest.approx((0.5 / 3 + 14 / 120 + 0.4 / 3, 31 / 80))
    assert math.isnan(found.others)
    assert math.isnan(found.gain)
    nothing = exposure(CORRECT, COUNT, none, none.any(0), UNTRAINED)
    assert all(map(math.isnan, nothing.as_dict().values()))
    assert math.isnan(pooled_accuracy(CORRECT[:0], COUNT[:0], all_[:0]))


def test_where_the_untrained_model_was_not_measured_there_is_no_gain():
    seen = met(FIRST_MET, 2)
    found = exposure(CORRECT, COUNT, seen, seen.any(0), np.array([0.1, 0.2, nan]))
    assert found.others == pytest.approx(3 / 20)
    assert found.gain == pytest.approx(3 / 10 - 0.1)


def test_the_mean_over_experiences_skips_what_is_not_defined():
    found = mean_exposure([Exposure(0.5, 0.5, nan, nan), Exposure(1.0, 0.7, 0.2, 0.1)])
    assert found == Exposure(0.75, 0.6, 0.2, 0.1)
    assert math.isnan(mean_exposure([]).own)
