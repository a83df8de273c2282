import doctest

import numpy as np
import pytest

from edgelearn.continual.metrics import spread_of_costs
from edgelearn.report import formats, results


def test_formats_do_what_their_examples_say():
    assert doctest.testmod(formats).failed == 0


def test_formats_of_the_unknown():
    nan = float("nan")
    texts = (formats.percent(nan), formats.points(nan), formats.size(nan), formats.duration(nan))
    assert set(texts) == {formats.UNKNOWN}


def test_a_loss_has_a_minus_sign():
    assert formats.points(-0.034) == "\N{MINUS SIGN}3.4 pp"


def test_when_learned_is_the_diagonal(record):
    np.testing.assert_allclose(results.when_learned(record), [0.9, 0.8, 0.7])


def test_when_learned_takes_each_device_at_its_own_moment(make_record):
    record = make_record(orders=[[0, 1, 2], [2, 1, 0]])
    np.testing.assert_allclose(results.when_learned(record), [0.65, 0.8, 0.45])


def test_forgotten_by_experience(record):
    np.testing.assert_allclose(results.forgotten(record), [0.4, 0.2, np.nan])
    assert np.nanmean(results.forgotten(record)) == pytest.approx(record.scores().forgetting)


def test_forgotten_in_each_devices_own_order(make_record):
    record = make_record(orders=[[0, 1, 2], [2, 1, 0]])
    np.testing.assert_allclose(results.forgotten(record), [0.3, 0.2, -0.3])


def test_the_device_that_forgets_most_is_the_worst(record):
    values = results.forgetting_by_device(record)
    np.testing.assert_allclose(values, [0.2, 0.4])
    s = spread_of_costs(values)
    assert (s.mean, s.std) == pytest.approx((0.3, 0.1))
    assert (s.worst_decile, s.worst, s.best) == pytest.approx((0.4, 0.4, 0.2))


def test_average_over_what_was_seen(record):
    rounds, means = results.seen_average(record)
    assert rounds.tolist() == [2, 4, 6]
    np.testing.assert_allclose(means, [0.9, 0.75, 0.6])


def test_average_over_what_any_device_has_seen(make_record):
    _, means = results.seen_average(make_record(orders=[[0, 1, 2], [2, 1, 0]]))
    np.testing.assert_allclose(means, [0.45, 1.6 / 3, 0.6])


def test_curves_start_with_the_untrained_model(record):
    rounds, values = results.curves(record)
    assert rounds.tolist() == [0, 2, 4, 6]
    np.testing.assert_allclose(values[0], [0.2, 0, 0.1])


def test_bytes_of_the_first_evaluation_count(record, make_record):
    assert results.total_bytes(record, "up") == 1300
    rounds, total = results.cumulative_bytes(record, "up")
    assert rounds.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert total.tolist() == [100, 300, 500, 700, 900, 1100, 1300]
    assert results.total_bytes(make_record(rounds=3), "up") == 600


def test_final_accuracy_is_unknown_before_the_end(record, make_record):
    np.testing.assert_allclose(results.final_by_device(record), [0.7, 0.5])
    assert results.final_by_device(make_record(rounds=4)).size == 0


def test_outcomes_and_troubles(record):
    assert results.outcomes(record) == {
        "ok": 9, "late": 1, "failed": 2, "rejected": 0, "offline": 0,
    }  # fmt: skip
    first, second = results.troubles(record)
    assert (first.device, first.counts, first.first_round) == (1, {"failed": 2}, 2)
    assert (second.device, second.counts, second.reason) == (0, {"late": 1}, "no reply")


def test_spans(record):
    assert results.spans(record)[1] == results.Span(position=1, first=3, last=4)
