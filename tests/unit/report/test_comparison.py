import copy
import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from edgelearn.errors import StateError
from edgelearn.report.comparison import COLUMNS, Comparison, Row
from edgelearn.significance import holm, student_p

MEANS = {  # by hand from `conftest`
    "average_accuracy_served": 0.6,
    "average_accuracy_float": 0.7,
    "average_incremental_accuracy": 0.75,
    "forgetting": 0.3,
    "backward_transfer": -0.3,
    "forward_transfer": 0.05,
    "learning_accuracy": 0.8,
    "online_accuracy": 0.8,
    "min_accuracy": (0.5 + 0.6) / 2,
    "worst_case_accuracy": 0.7 / 3 + 2 / 3 * 0.55,
    "worst_decile_accuracy": 0.5,
    "worst_device_accuracy": 0.5,
    "device_gap": 0.2,
    "device_variance": 0.01,
    "jain_index": 1.2**2 / (2 * (0.7**2 + 0.5**2)),
    "bytes_up": 1300.0,
    "bytes_down": 6200.0,
    "memory_bytes_per_device": 1400.0,
    "energy_j": math.nan,  # the record has none
    "clock_s": 75.0,
    "area_bytes": (0.55 + 0.825 + 0.675) / 3,
    "area_energy": math.nan,
    "area_time": (0.55 + 0.825 + 0.675) / 3,
}
UNKNOWN = {"energy_j", "area_energy"}


def printed(table, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def words(table) -> list[list[str]]:
    return [line.split() for line in printed(table).splitlines() if line.strip()]


@pytest.fixture
def comparison(make_record):
    other = make_record(seed=8, memory_bytes_per_device=1600)
    end = {**other.end, "bytes_up": [800, 700]}
    runs = [make_record(), replace(other, lines=(*other.lines[:-1], end))]
    return Comparison.of({"replay": runs, "naive, [bold]": [make_record()]})


def rows_of(comparison, strategy, versus="") -> dict[str, Row]:
    return {
        row.metric: row
        for row in comparison.rows
        if row.strategy == strategy and row.versus == versus
    }


def shifted(record, hits: int):
    """The same run with more right answers on the last experience, at the end."""
    lines = copy.deepcopy(list(record.lines))
    for line in lines:
        if line["kind"] == "devices" and line["position"] == 2:
            line["served"][1][2] += hits  # of 20: each is 1/60 of ACC
    return replace(record, lines=tuple(lines))


def test_means_and_sample_deviations(comparison):
    assert comparison.strategies == ("replay", "naive, [bold]")
    rows = rows_of(comparison, "replay")
    expected = {**MEANS, "bytes_up": 1400.0, "memory_bytes_per_device": 1500.0}
    found = {name: row.mean for name, row in rows.items()}
    assert found == pytest.approx(expected, nan_ok=True)
    assert rows["bytes_up"].std == pytest.approx(math.sqrt(2) * 100)
    assert rows["forgetting"].std == 0
    assert {name for name, row in rows.items() if row.n != 2} == UNKNOWN


def test_the_interval_is_student_s(comparison):
    row = rows_of(comparison, "replay")["bytes_up"]  # 1300 and 1500, one degree of freedom
    assert row.margin == pytest.approx(12.7062 * 100, rel=1e-5)
    assert (row.low + row.high) / 2 == pytest.approx(row.mean)


def test_one_run_has_no_deviation(comparison):
    rows = rows_of(comparison, "naive, [bold]")
    found = {name: row.mean for name, row in rows.items()}
    assert found == pytest.approx(MEANS, nan_ok=True)
    assert all(math.isnan(row.std) and math.isnan(row.low) for row in rows.values())
    assert {name for name, row in rows.items() if row.n != 1} == UNKNOWN


def test_differences_are_taken_within_seeds(make_record):
    better = [shifted(make_record(seed=s), hits) for s, hits in ((2, 3), (0, 1), (1, 2))]
    runs = {"better": better, "plain": [make_record(seed=s) for s in range(3)]}
    row = rows_of(Comparison.of(runs), "better", "plain")["average_accuracy_served"]
    assert (row.mean, row.std) == pytest.approx((2 / 60, 1 / 60))
    assert row.n == 3
    t = 2 / (1 / math.sqrt(3))
    assert row.p_t == row.p_t_holm == pytest.approx(student_p(t, 2))
    assert row.p_flip == row.p_flip_holm == 0.25  # the least that three seeds can give


def test_holm_counts_the_pairs(make_record):
    runs = {
        name: [shifted(make_record(seed=s), step * s) for s in range(3)]
        for name, step in (("a", 0), ("b", 1), ("c", 2))
    }
    comparison = Comparison.of(runs)
    tests = [r for r in comparison.rows if r.versus and r.metric == "average_accuracy_served"]
    assert [(r.strategy, r.versus) for r in tests] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [r.p_t_holm for r in tests] == pytest.approx(holm([r.p_t for r in tests]))
    assert min(r.p_t_holm for r in tests) == pytest.approx(3 * min(r.p_t for r in tests))
    sizes = {r.metric for r in comparison.rows if r.versus}
    assert "bytes_up" not in sizes  # what chance does not decide is not tested
    assert "area_bytes" in sizes


def test_costs_are_compared_over_the_same_budget(make_record):
    dear = make_record()
    lines = [{**line, "bytes_up": 1400} if line["kind"] == "round" else line for line in dear.lines]
    dear = replace(dear, lines=tuple(lines))  # 2400 bytes a round instead of 1200
    comparison = Comparison.of({"dear": [dear], "cheap": [make_record()]})
    cheap = rows_of(comparison, "cheap")["area_bytes"].mean
    assert cheap == pytest.approx((MEANS["area_bytes"] + 0.6) / 2)  # it keeps its last accuracy
    assert rows_of(comparison, "dear")["area_bytes"].mean == pytest.approx(MEANS["area_bytes"])


def parsed(row: dict) -> Row:
    texts = {name: row[name] for name in ("strategy", "versus", "metric")}
    numbers = {
        name: math.nan if row[name] in ("", None) else float(row[name])
        for name in COLUMNS
        if name not in (*texts, "n")
    }
    return Row(**texts, n=int(row["n"]), **numbers)


def same(a: Row, b: Row) -> bool:
    return repr(a) == repr(b)  # exact, and NaN equals NaN


def test_csv_holds_every_digit(comparison):
    read = [parsed(row) for row in csv.DictReader(io.StringIO(comparison.to_csv()))]
    assert len(read) == len(comparison.rows)
    assert all(map(same, read, comparison.rows))


def test_json_holds_every_digit(comparison):
    read = json.loads(comparison.to_json(), parse_constant=pytest.fail)
    assert read[len(MEANS)]["std"] is None  # the strategy with one run
    assert all(map(same, [parsed(row) for row in read], comparison.rows))


@pytest.mark.parametrize("width", [80, 120])
def test_comparison_fits_a_terminal(comparison, width):
    text = printed(comparison.to_table(everything=True), width)
    assert "…" not in text
    assert "[bold]" in text
    for part in ("memory", "1.5 KiB", "60.0", "1.4 KiB", "±1.2 KiB", "\N{MINUS SIGN}30.0"):
        assert part in text, part
    assert all(len(line) <= width for line in text.splitlines())


def test_the_table_shows_tests_only_where_there_are_some(make_record, comparison):
    assert "sign-flip" not in printed(comparison.to_table())
    one = printed(Comparison.of({"a": [make_record()]}).to_table())
    assert "nothing is known of the spread" in one
    assert "±" not in one
    runs = {
        n: [shifted(make_record(seed=s), k * s) for s in range(3)] for n, k in (("a", 0), ("b", 1))
    }
    text = printed(Comparison.of(runs).to_table(everything=True), 80)
    assert "a - b" in text
    assert "can't be below 0.25" in text


def test_a_metric_that_no_run_defines(make_record):
    record = make_record()
    lines = tuple(line for line in record.lines if line["kind"] != "start")
    comparison = Comparison.of({"a": [replace(record, lines=lines)]})
    row = next(row for row in comparison.rows if row.metric == "forward_transfer")
    assert math.isnan(row.mean)
    assert row.n == 0
    assert "a,,forward_transfer,,,,,0,,,," in comparison.to_csv().splitlines()


def test_what_cannot_be_compared(make_record):
    with pytest.raises(StateError, match="a: there is no run"):
        Comparison.of({"a": []})
    with pytest.raises(StateError, match="not complete"):
        Comparison.of({"a": [make_record(), make_record(seed=8, rounds=4)]})
    with pytest.raises(StateError, match="seed 7 occurs twice"):
        Comparison.of({"a": [make_record(), make_record()]})


def test_a_few_metrics_of_all_kinds_are_shown_unless_more_are_asked_for(comparison):
    short = printed(comparison.to_table(), 80)
    assert "worst" in short
    assert "memory" in short
    assert "Jain" not in short
    assert all(len(line) <= 80 for line in short.splitlines())
    assert "Jain" in printed(comparison.to_table(everything=True))
