from __future__ import annotations

import math

import numpy as np
import pytest

from edgelearn.continual.metrics import (
    ContinualScores,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    scores,
    spread,
    spread_of_costs,
)

nan = math.nan
R = np.array(
    [
        [0.90, 0.20, 0.10],
        [0.95, 0.80, 0.30],
        [0.50, 0.70, 0.85],
    ]
)
B = np.array([0.10, 0.15, 0.20])


def test_hand_computed():
    assert average_accuracy(R) == pytest.approx((0.5 + 0.7 + 0.85) / 3)
    assert average_incremental_accuracy(R) == pytest.approx(
        (0.9 + (0.95 + 0.8) / 2 + (0.5 + 0.7 + 0.85) / 3) / 3
    )
    assert backward_transfer(R) == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert forward_transfer(R, B) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.2)) / 2)
    assert forgetting(R) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)  # not -BWT
    assert learning_accuracy(R) == pytest.approx((0.9 + 0.8 + 0.85) / 3)


def test_scores_are_all_of_them_by_name():
    found = scores(R, B)
    assert found == ContinualScores(
        average_accuracy=average_accuracy(R),
        average_incremental_accuracy=average_incremental_accuracy(R),
        backward_transfer=backward_transfer(R),
        forward_transfer=forward_transfer(R, B),
        forgetting=forgetting(R),
        learning_accuracy=learning_accuracy(R),
    )
    assert list(found.as_dict()) == [
        "average_accuracy",
        "average_incremental_accuracy",
        "backward_transfer",
        "forward_transfer",
        "forgetting",
        "learning_accuracy",
    ]


def test_the_last_value_is_no_peak():
    # Better at the end than ever before: forgetting is negative.
    improved = np.array([[0.5, 0.1, 0.1], [0.6, 0.5, 0.1], [0.9, 0.8, 0.7]])
    assert forgetting(improved) == pytest.approx(((0.6 - 0.9) + (0.5 - 0.8)) / 2)


def test_accuracy_before_an_experience_is_no_peak():
    early = np.array([[0.5, 0.9, 0.1], [0.5, 0.4, 0.1], [0.5, 0.4, 0.7]])
    assert forgetting(early) == pytest.approx(0.0)


def test_what_was_not_measured_is_left_out():
    holes = R.copy()
    holes[2, 0] = nan  # the first experience, at the end
    holes[0, 1] = nan
    assert average_accuracy(holes) == pytest.approx((0.7 + 0.85) / 2)
    assert average_incremental_accuracy(holes) == pytest.approx(
        (0.9 + (0.95 + 0.8) / 2 + (0.7 + 0.85) / 2) / 3
    )
    assert backward_transfer(holes) == pytest.approx(0.7 - 0.8)
    assert forward_transfer(holes, B) == pytest.approx(0.3 - 0.2)
    assert forgetting(holes) == pytest.approx(0.8 - 0.7)
    assert learning_accuracy(holes) == pytest.approx((0.9 + 0.8 + 0.85) / 3)
    holes[1, 0] = nan
    assert average_incremental_accuracy(holes) == pytest.approx((0.9 + 0.8 + 0.775) / 3)


def test_peaks_skip_what_was_not_measured():
    holes = R.copy()
    holes[1, 0] = nan
    assert forgetting(holes) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.7)) / 2)


def test_an_experience_that_a_device_never_saw():
    holes = R.copy()
    holes[:, 1] = nan
    assert forgetting(holes) == pytest.approx(0.95 - 0.5)
    assert backward_transfer(holes) == pytest.approx(0.5 - 0.9)


def test_nothing_measured_gives_nothing():
    found = scores(np.full((3, 3), nan), np.full(3, nan))
    assert all(math.isnan(value) for value in found.as_dict().values())


def test_one_experience_has_no_transfer():
    found = scores(np.array([[0.7]]), np.array([0.1]))
    assert found.average_accuracy == found.learning_accuracy == 0.7
    assert found.average_incremental_accuracy == 0.7
    for value in (found.backward_transfer, found.forward_transfer, found.forgetting):
        assert math.isnan(value)


def test_spread_by_hand():
    found = spread(np.array([0.9, 0.1, nan, 0.5, 0.5]))
    assert found.mean == pytest.approx(0.5)
    assert found.std == pytest.approx(math.sqrt((0.16 + 0.16) / 4))  # of the population
    assert found.worst == found.worst_decile == 0.1
    assert found.best == 0.9
    assert found.num_devices == 4


@pytest.mark.parametrize(("count", "tenth"), [(1, 1), (10, 1), (19, 1), (20, 2), (30, 3)])
def test_the_worst_decile(count, tenth):
    values = np.random.default_rng(0).permutation(np.arange(count)).astype(float)
    assert spread(values).worst_decile == pytest.approx(np.arange(tenth).mean())


def test_the_worst_is_the_highest_of_what_should_be_low():
    values = np.array([0.3, nan, 0.1, 0.2])
    found = spread_of_costs(values)
    assert (found.worst, found.worst_decile, found.best) == (0.3, 0.3, 0.1)
    assert found.mean == pytest.approx(spread(values).mean)
    assert found.std == pytest.approx(spread(values).std)


def test_the_spread_of_nothing():
    for values in (np.array([]), np.array([nan, nan])):
        for found in (spread(values), spread_of_costs(values)):
            assert found.num_devices == 0
            assert math.isnan(found.mean)
            assert math.isnan(found.worst_decile)
