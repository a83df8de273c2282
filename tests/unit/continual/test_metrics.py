from __future__ import annotations

import math

import numpy as np
import pytest

from edgelearn.continual.metrics import (
    ContinualScores,
    RoundScores,
    area_under,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    jain_index,
    learning_accuracy,
    min_accuracy,
    online_accuracy,
    round_scores,
    scores,
    spread,
    spread_of_costs,
    worst_case_accuracy,
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


def test_intransigence_by_hand():
    joint = np.array([[0.9, 0.1, 0.1], [0.9, 0.9, 0.1], [0.9, 0.9, 0.9]])
    assert intransigence(R, joint) == pytest.approx((0.0 + 0.1 + 0.05) / 3)
    assert intransigence(R, R) == 0
    joint[1, 1] = nan
    assert intransigence(R, joint) == pytest.approx((0.0 + 0.05) / 2)


# -- over rounds -----------------------------------------------------------------------------------

# Two rounds of each of three experiences; the first rounds after a boundary are a dip.
A = np.array(
    [
        [0.60, 0.10, 0.00],
        [0.90, 0.20, 0.10],
        [0.30, 0.50, 0.20],
        [0.95, 0.80, 0.30],
        [0.40, 0.25, 0.45],
        [0.50, 0.70, 0.85],
    ]
)
P = np.array([0, 0, 1, 1, 2, 2])


def test_scores_over_rounds_by_hand():
    online = (0.6 + 0.9 + 0.5 + 0.8 + 0.45 + 0.85) / 6
    lowest = (0.3 + 0.25) / 2  # 0.1 and 0.2 were before experience 1 was learned
    worst_case = 0.85 / 3 + 2 / 3 * lowest
    assert online_accuracy(A, P) == pytest.approx(online)
    assert min_accuracy(A, P) == pytest.approx(lowest)
    assert worst_case_accuracy(A, P) == pytest.approx(worst_case)
    assert round_scores(A, P) == RoundScores(*map(pytest.approx, (online, lowest, worst_case)))


def test_the_matrix_does_not_show_the_gap():
    ends = A[1::2]
    assert min_accuracy(ends, P[1::2]) == pytest.approx((0.5 + 0.7) / 2)
    assert min_accuracy(A, P) < min_accuracy(ends, P[1::2])


def test_rounds_without_measurement():
    holes = A.copy()
    holes[2, 0] = holes[4, 1] = nan
    assert min_accuracy(holes, P) == pytest.approx((0.4 + 0.7) / 2)
    holes[:, 0] = nan  # never measured
    assert min_accuracy(holes, P) == pytest.approx(0.7)
    assert online_accuracy(holes, P) == pytest.approx((0.5 + 0.8 + 0.45 + 0.85) / 4)


def test_a_stream_that_is_not_at_its_end_has_no_worst_case():
    assert math.isnan(worst_case_accuracy(A[:4], P[:4]))
    assert min_accuracy(A[:4], P[:4]) == pytest.approx(0.3)
    none = round_scores(np.full((2, 2), nan), np.array([0, 1]))
    assert all(math.isnan(v) for v in (none.online_accuracy, none.min_accuracy))


def test_one_experience_is_its_own_worst_case():
    found = round_scores(np.array([[0.4], [0.7]]), np.array([0, 0]))
    assert found.worst_case_accuracy == 0.7
    assert math.isnan(found.min_accuracy)


def test_area_by_hand():
    cost, accuracy = np.array([0.0, 10.0, 40.0]), np.array([0.0, 0.4, 0.8])
    whole = 10 * 0.2 + 30 * 0.6
    assert area_under(cost, accuracy) == pytest.approx(whole / 40)
    assert area_under(cost, accuracy, budget=80) == pytest.approx((whole + 40 * 0.8) / 80)
    cut = 10 * 0.2 + 15 * (0.4 + 0.6) / 2  # at 25 the accuracy is 0.6
    assert area_under(cost, accuracy, budget=25) == pytest.approx(cut / 25)
    assert area_under(1e6 * cost, accuracy) == pytest.approx(whole / 40)  # no unit is left


def test_area_with_holes_steps_and_nothing():
    holes = np.array([0.0, nan, 0.8])
    assert area_under(np.array([0.0, 10.0, 40.0]), holes) == pytest.approx(0.4)
    free = area_under(np.array([0.0, 10.0, 10.0, 20.0]), np.array([0.2, 0.2, 0.6, 0.6]))
    assert free == pytest.approx(0.4)  # a step that costs nothing
    for cost, accuracy in (
        ([0.0, nan], [0.1, 0.2]),  # what it cost is not known
        ([0.0, 0.0], [0.1, 0.2]),  # nothing was spent
        ([5.0], [0.2]),
        ([], []),
    ):
        assert math.isnan(area_under(np.array(cost), np.array(accuracy)))


# -- over devices ----------------------------------------------------------------------------------


def test_jain_index_by_hand():
    assert jain_index(np.array([0.7, 0.7, nan, 0.7])) == pytest.approx(1)
    assert jain_index(np.array([0.0, 0.0, 0.5, 0.0])) == pytest.approx(1 / 4)
    assert jain_index(np.array([0.2, 0.6])) == pytest.approx(0.64 / (2 * 0.4))
    assert math.isnan(jain_index(np.zeros(3)))
    assert math.isnan(jain_index(np.array([nan])))


def test_spread_by_hand():
    found = spread(np.array([0.9, 0.1, nan, 0.5, 0.5]))
    assert found.mean == pytest.approx(0.5)
    assert found.std == pytest.approx(math.sqrt((0.16 + 0.16) / 4))  # of the population
    assert found.worst == found.worst_decile == 0.1
    assert found.best == 0.9
    assert found.num_devices == 4
    assert found.variance == pytest.approx(0.08)
    assert found.gap == pytest.approx(0.8)
    assert found.jain == pytest.approx(4 / (4 * (0.81 + 0.01 + 0.25 + 0.25)))


@pytest.mark.parametrize(("count", "tenth"), [(1, 1), (10, 1), (19, 1), (20, 2), (30, 3)])
def test_the_worst_decile(count, tenth):
    values = np.random.default_rng(0).permutation(np.arange(count)).astype(float)
    assert spread(values).worst_decile == pytest.approx(np.arange(tenth).mean())


def test_the_worst_is_the_highest_of_what_should_be_low():
    values = np.array([0.3, nan, 0.1, 0.2])
    found = spread_of_costs(values)
    assert (found.worst, found.worst_decile, found.best) == (0.3, 0.3, 0.1)
    assert found.gap == pytest.approx(0.2)
    assert found.jain == pytest.approx(spread(values).jain)
    assert found.mean == pytest.approx(spread(values).mean)
    assert found.std == pytest.approx(spread(values).std)


def test_the_spread_of_nothing():
    for values in (np.array([]), np.array([nan, nan])):
        for found in (spread(values), spread_of_costs(values)):
            assert found.num_devices == 0
            assert math.isnan(found.mean)
            assert math.isnan(found.worst_decile)
