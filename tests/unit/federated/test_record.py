from __future__ import annotations

import math

import numpy as np
import pytest

from edgelearn.errors import StateError
from edgelearn.federated.record import RunRecord, encode_line, read_lines

nan = math.nan
T = 3


def run_line(orders=None):
    return {"kind": "run", "num_experiences": T, "orders": orders}


def devices(position, served, *, count=None, exact=None, who=(0, 1)):
    """Counts of two devices with ten test samples of each experience."""
    return {
        "kind": "devices",
        "position": position,
        "devices": list(who),
        "served": served,
        "float": exact or served,
        "count": count or [[10] * T for _ in who],
    }


START = {
    "kind": "start",
    "accuracy": {"served": [1, 2, 3], "float": [2, 2, 2], "count": [10, 20, 30]},
}
ROWS = (
    devices(0, [[8, 1, 0], [10, 1, 2]], exact=[[9, 1, 0], [10, 2, 2]]),
    devices(1, [[6, 7, 1], [9, 8, 1]]),
    devices(2, [[4, 5, 9], [7, 8, 8]]),
)
END = {"kind": "end", "seconds": 1.5}


def record(*lines, orders=None):
    return RunRecord((run_line(orders), *lines))


def written(tmp_path, *lines):
    (tmp_path / "record.jsonl").write_bytes(b"".join(lines))
    return tmp_path


# -- lines -----------------------------------------------------------------------------------------


def test_lines_round_trip(tmp_path):
    lines = [run_line(), START, *ROWS, END]
    directory = written(tmp_path, *map(encode_line, lines))
    found = RunRecord.read(directory)
    assert list(found.lines) == lines
    assert found.path == directory
    assert found.is_complete
    assert found.end == END
    assert found.run == run_line()


def test_a_line_is_one_line():
    text = encode_line({"kind": "run", "title": "two\nlines\u2028and\x85more"})
    assert text.count(b"\n") == 1
    assert text.endswith(b"\n")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("value", [nan, math.inf])
def test_a_number_that_json_does_not_have(value):
    with pytest.raises(ValueError, match="JSON"):
        encode_line({"kind": "round", "loss": value})


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        (b'{"kind": "round", "loss', "line 3: damaged or truncated"),
        (b"\n", "line 3: damaged or truncated"),
        (b"\xff\xfe\n", "line 3: damaged or truncated"),
        (b"[1, 2]\n", "line 3: damaged: not an object with a kind"),
        (b'{"round": 1}\n', "line 3: damaged: not an object with a kind"),
    ],
)
@pytest.mark.parametrize("more", [b"", encode_line(END)])
def test_a_damaged_line_is_named(tmp_path, damaged, expected, more):
    directory = written(tmp_path, encode_line(run_line()), encode_line(START), damaged, more)
    with pytest.raises(StateError, match=expected) as error:
        RunRecord.read(directory)
    assert str(directory / "record.jsonl") in str(error.value)


@pytest.mark.parametrize("lines", [(), (encode_line(START),)])
def test_a_record_without_its_beginning(tmp_path, lines):
    with pytest.raises(StateError, match="no first line that describes the run"):
        RunRecord.read(written(tmp_path, *lines))


def test_no_record(tmp_path):
    with pytest.raises(StateError, match="there is no record here"):
        RunRecord.read(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="there is no record here"):
        read_lines(tmp_path / "file" / "record.jsonl")


def test_a_run_that_is_not_complete():
    found = record(START, ROWS[0])
    assert not found.is_complete
    with pytest.raises(StateError, match="this run is not complete; resume it first"):
        _ = found.end
    # What there is can be asked for.
    assert found.matrix()[0] == pytest.approx([0.9, 0.1, 0.1])
    assert np.isnan(found.matrix()[1:]).all()
    assert found.scores().learning_accuracy == pytest.approx(0.9)
    assert math.isnan(found.scores().average_accuracy)
    assert found.final_by_device() == pytest.approx([9 / 30, 13 / 30])


def test_rounds_are_the_lines_of_rounds():
    rounds = [{"kind": "round", "round": i} for i in (1, 2)]
    found = record(START, rounds[0], ROWS[0], rounds[1], END)
    assert list(found.rounds) == rounds
    assert list(found.device_rows) == [ROWS[0]]


# -- accuracies ------------------------------------------------------------------------------------


def test_the_baseline():
    found = record(START, *ROWS)
    assert found.baseline() == pytest.approx([0.1, 0.1, 0.1])
    assert found.baseline("float") == pytest.approx([0.2, 0.1, 2 / 30])
    assert np.isnan(record(*ROWS).baseline()).all()


def test_the_accuracy_of_a_round():
    found = record()
    line = {
        "kind": "round",
        "accuracy": {"served": [1, 0, 3], "float": [1, 1, 3], "count": [4, 0, 4]},
    }
    np.testing.assert_allclose(found.accuracy(line), [0.25, nan, 0.75])
    assert np.isnan(found.accuracy({"kind": "round"})).all()
    assert np.isnan(found.accuracy({"kind": "round", "accuracy": None})).all()


def test_the_matrix_pools_the_samples_of_all_devices():
    found = record(START, *ROWS, END)
    np.testing.assert_allclose(
        found.matrix(), [[0.9, 0.1, 0.1], [0.75, 0.75, 0.1], [0.55, 0.65, 0.85]]
    )
    assert found.matrix("float")[0] == pytest.approx([0.95, 0.15, 0.1])
    # A device with more samples counts for more.
    uneven = record(devices(0, [[1, 0, 0], [9, 0, 0]], count=[[1, 0, 0], [99, 0, 0]]))
    np.testing.assert_allclose(uneven.matrix()[0], [0.1, nan, nan])


def test_matrices_of_devices():
    found = record(START, *ROWS, END).device_matrices()
    assert list(found) == [0, 1]
    np.testing.assert_allclose(found[0], [[0.8, 0.1, 0.0], [0.6, 0.7, 0.1], [0.4, 0.5, 0.9]])
    np.testing.assert_allclose(found[1], [[1.0, 0.1, 0.2], [0.9, 0.8, 0.1], [0.7, 0.8, 0.8]])


ORDERS = [[2, 0, 1], [0, 1, 2]]


def test_columns_follow_the_order_of_each_device():
    found = record(*ROWS, orders=ORDERS).device_matrices()
    np.testing.assert_allclose(found[0], [[0.0, 0.8, 0.1], [0.1, 0.6, 0.7], [0.9, 0.4, 0.5]])
    np.testing.assert_allclose(found[1], [[1.0, 0.1, 0.2], [0.9, 0.8, 0.1], [0.7, 0.8, 0.8]])


def test_a_device_that_was_not_asked_every_time():
    rows = (ROWS[0], devices(2, [[7, 8, 8]], count=[[10, 0, 10]], who=(1,)))
    found = record(*rows).device_matrices()
    assert np.isnan(found[0][1:]).all()
    np.testing.assert_allclose(found[1][2], [0.7, nan, 0.8])
    assert np.isnan(found[1][1]).all()


def test_scores_with_a_shared_order():
    found = record(START, *ROWS, END).scores()
    assert found.average_accuracy == pytest.approx((0.55 + 0.65 + 0.85) / 3)
    assert found.learning_accuracy == pytest.approx((0.9 + 0.75 + 0.85) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.55) + (0.75 - 0.65)) / 2)
    assert found.backward_transfer == pytest.approx(-((0.9 - 0.55) + (0.75 - 0.65)) / 2)
    assert found.forward_transfer == pytest.approx(0.0)


def test_scores_with_an_order_per_device_are_means_over_devices():
    start = {"kind": "start", "accuracy": {"served": [1, 2, 3], "count": [10, 10, 10]}}
    found = record(start, *ROWS, END, orders=ORDERS).scores()
    # Device 0 met 2, 0, 1: its diagonal is 0.0, 0.6, 0.5.
    assert found.learning_accuracy == pytest.approx(((0.0 + 0.6 + 0.5) + (1.0 + 0.8 + 0.8)) / 6)
    assert found.average_accuracy == pytest.approx((0.4 + 0.5 + 0.9 + 0.7 + 0.8 + 0.8) / 6)
    assert found.forgetting == pytest.approx(
        ((0.1 - 0.9) + (0.6 - 0.4) + (1.0 - 0.7) + (0.8 - 0.8)) / 4
    )
    # Forward transfer is against the untrained model, in the order of the device too.
    first = ((0.8 - 0.1) + (0.7 - 0.2)) / 2
    second = ((0.1 - 0.2) + (0.1 - 0.3)) / 2
    assert found.forward_transfer == pytest.approx((first + second) / 2)


def test_scores_of_a_run_that_measured_nothing():
    for orders in (None, ORDERS):
        values = record(orders=orders).scores().as_dict().values()
        assert all(math.isnan(value) for value in values)


# -- spread over devices ---------------------------------------------------------------------------


def test_final_accuracy_by_device():
    found = record(START, *ROWS, END)
    assert found.final_by_device() == pytest.approx([18 / 30, 23 / 30])
    assert found.device_accuracy().worst == pytest.approx(0.6)
    assert found.device_accuracy().mean == pytest.approx(41 / 60)
    assert found.device_accuracy().num_devices == 2
    assert record().device_accuracy().num_devices == 0


def test_a_device_without_test_samples_is_left_out():
    rows = devices(0, [[8, 1, 0], [0, 0, 0]], count=[[10, 10, 10], [0, 0, 0]])
    found = record(rows)
    np.testing.assert_allclose(found.final_by_device(), [0.3, nan])
    assert found.device_accuracy().num_devices == 1


def test_forgetting_by_device():
    shared = record(*ROWS).device_forgetting()
    first = ((0.8 - 0.4) + (0.7 - 0.5)) / 2
    second = ((1.0 - 0.7) + (0.8 - 0.8)) / 2
    assert (shared.worst, shared.best) == (pytest.approx(first), pytest.approx(second))
    assert shared.worst > shared.best
    own = record(*ROWS, orders=ORDERS).device_forgetting()
    assert own.best == pytest.approx(((0.1 - 0.9) + (0.6 - 0.4)) / 2)


# -- over rounds and costs -------------------------------------------------------------------------


def round_line(number, position, served, *, up=10, energy_j=0.5):
    accuracy = served and {"served": served, "float": [2 * n for n in served], "count": [20] * T}
    return {
        "kind": "round",
        "round": number,
        "position": position,
        "accuracy": accuracy,
        "bytes_up": up,
        "bytes_down": 30,
        "energy_j": energy_j,
        "clock_s": 4.0 * number,
    }


ROUNDS = (
    round_line(1, 0, [8, 2, 0]),
    round_line(2, 1, [2, 6, 0]),
    round_line(3, 1, None),
    round_line(4, 2, [4, 4, 10]),
)


def test_scores_over_rounds():
    found = record(START, *ROUNDS).round_scores()
    assert found.online_accuracy == pytest.approx((8 + 6 + 10) / 60)
    assert found.min_accuracy == pytest.approx((2 + 4) / 40)
    assert found.worst_case_accuracy == pytest.approx(0.5 / 3 + 2 / 3 * 0.15)
    assert record(START, *ROUNDS).round_scores("float").min_accuracy == pytest.approx(0.3)


def test_rounds_say_nothing_where_devices_differ_in_order():
    orders = [[0, 1, 2], [2, 1, 0]]
    assert math.isnan(record(START, *ROUNDS, orders=orders).round_scores().online_accuracy)
    assert math.isnan(record(START).round_scores().online_accuracy)


def test_what_was_spent():
    found = record(START, *ROUNDS)
    assert found.spent("bytes") == pytest.approx([40, 80, 120, 160])
    assert found.spent("energy") == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found.spent("time") == pytest.approx([4, 8, 12, 16])
    assert len(record(START).spent("bytes")) == 0


def test_energy_that_nobody_modelled():
    old = {key: value for key, value in ROUNDS[1].items() if key != "energy_j"}
    for line in (old, round_line(2, 1, [2, 6, 0], energy_j=None)):
        found = record(START, ROUNDS[0], line)
        assert found.spent("energy") == pytest.approx([0.5, nan], nan_ok=True)
        assert math.isnan(found.area("energy"))
        assert not math.isnan(found.area("bytes"))


def test_area_begins_with_the_untrained_model():
    # untrained on experience 0: 0.1; then 0.4, mean of 0.1 and 0.3, nothing, mean of all three
    found = record(START, *ROUNDS)
    area = (40 * (0.1 + 0.4) / 2 + 40 * (0.4 + 0.2) / 2 + 80 * (0.2 + 0.3) / 2) / 160
    assert found.area("bytes") == pytest.approx(area)
    assert found.area("time") == pytest.approx(area)  # in proportion here
    assert found.area("bytes", budget=320) == pytest.approx((area + 0.3) / 2)


def test_intransigence_against_a_joint_run():
    line = {**run_line(), "classes": [[0], [1], [2]], "num_devices": 2}
    own = RunRecord((line, START, *ROWS))
    joint = RunRecord((line, START, devices(0, [[9, 0, 0]] * 2), devices(1, [[9, 9, 0]] * 2),
                       devices(2, [[9, 9, 9]] * 2)))  # fmt: skip
    assert own.intransigence(joint) == pytest.approx(
        ((0.9 - 0.9) + (0.9 - 0.75) + (0.9 - 0.85)) / 3
    )
    other = RunRecord(({**line, "classes": [[1], [0], [2]]}, START))
    with pytest.raises(StateError, match="other classes"):
        own.intransigence(other)
    line = {**line, "orders": [[0, 1, 2], [2, 1, 0]]}
    with pytest.raises(StateError, match="one order"):
        RunRecord((line, START, *ROWS)).intransigence(RunRecord((line, START, *ROWS)))
