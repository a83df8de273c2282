import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from edgelearn.errors import StateError
from edgelearn.report.tables import METRICS, Comparison, Row, summary_table

MEANS = {
    "average_accuracy_served": 0.6,
    "average_accuracy_float": 0.7,
    "average_incremental_accuracy": 0.75,
    "forgetting": 0.3,
    "backward_transfer": -0.3,
    "forward_transfer": 0.05,
    "worst_decile_accuracy": 0.5,
    "bytes_up": 1300.0,
    "memory_bytes_per_device": 1400.0,
}


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


def test_summary_of_a_run(record):
    rows = words(summary_table(record))
    assert rows[0][:2] == ["tiny:", "replay"]
    assert ["0", "0,", "1", "90.0%", "50.0%", "60.0%", "40.0", "pp"] in rows
    assert ["1", "2,", "3", "80.0%", "60.0%", "70.0%", "20.0", "pp"] in rows
    assert ["2", "4,", "5", "70.0%", "70.0%", "80.0%", "\N{EN DASH}"] in rows
    assert ["fleet", "80.0%", "60.0%", "70.0%", "30.0", "pp"] in rows
    text = printed(summary_table(record))
    assert "worst-decile device 50.0%" in text
    assert "up 1.3 KiB" in text
    assert "COMPLETE" not in text


@pytest.mark.parametrize("rounds", [0, 3, 5])
def test_summary_of_an_unfinished_run(make_record, rounds):
    text = printed(summary_table(make_record(rounds=rounds)))
    assert f"NOT COMPLETE: {rounds} of 6 rounds" in text
    assert "nan" not in text


def test_names_are_not_markup(make_record):
    record = make_record(scenario="[red]x[/red]", classes=[["[a]"], ["[b]"], ["[/c]"]])
    text = printed(summary_table(record))
    assert "[red]x[/red]" in text
    assert "[/c]" in text


def test_means_and_sample_deviations(comparison):
    assert comparison.strategies == ("replay", "naive, [bold]")
    rows = {row.metric: row for row in comparison.rows if row.strategy == "replay"}
    assert list(rows) == [metric.name for metric in METRICS]
    expected = {**MEANS, "bytes_up": 1400.0, "memory_bytes_per_device": 1500.0}
    assert {name: row.mean for name, row in rows.items()} == pytest.approx(expected)
    assert rows["bytes_up"].std == pytest.approx(math.sqrt(2) * 100)
    assert rows["forgetting"].std == 0
    assert {row.n for row in rows.values()} == {2}


def test_one_run_has_no_deviation(comparison):
    rows = [row for row in comparison.rows if row.strategy != "replay"]
    assert {row.metric: row.mean for row in rows} == pytest.approx(MEANS)
    assert all(math.isnan(row.std) and row.n == 1 for row in rows)


def parsed(strategy, metric, mean, std, n) -> Row:
    nothing = ("", None)
    mean, std = (math.nan if v in nothing else float(v) for v in (mean, std))
    return Row(strategy, metric, mean, std, int(n))


def same(a: Row, b: Row) -> bool:
    return repr(a) == repr(b)  # exact, and NaN equals NaN


def test_csv_holds_every_digit(comparison):
    read = [parsed(**row) for row in csv.DictReader(io.StringIO(comparison.to_csv()))]
    assert len(read) == 2 * len(METRICS)
    assert all(map(same, read, comparison.rows))


def test_json_holds_every_digit(comparison):
    read = json.loads(comparison.to_json(), parse_constant=pytest.fail)
    assert read[-1]["std"] is None
    assert all(map(same, [parsed(**row) for row in read], comparison.rows))


@pytest.mark.parametrize("width", [80, 120])
def test_comparison_fits_a_terminal(comparison, width):
    text = printed(comparison.to_table(), width)
    assert "…" not in text
    assert "[bold]" in text
    for part in ("memory", "1.5 KiB", "60.0", "1.4 KiB", "±141 B", "\N{MINUS SIGN}30.0"):
        assert part in text, part


def test_a_metric_that_no_run_defines(make_record):
    record = make_record()
    lines = tuple(line for line in record.lines if line["kind"] != "start")
    comparison = Comparison.of({"a": [replace(record, lines=lines)]})
    row = next(row for row in comparison.rows if row.metric == "forward_transfer")
    assert math.isnan(row.mean)
    assert row.n == 0
    assert "a,forward_transfer,,,0" in comparison.to_csv().splitlines()


def test_what_cannot_be_compared(make_record):
    with pytest.raises(StateError, match="a: there is no run"):
        Comparison.of({"a": []})
    with pytest.raises(StateError, match="not complete"):
        Comparison.of({"a": [make_record(), make_record(seed=8, rounds=4)]})
    with pytest.raises(StateError, match="seed 7 occurs twice"):
        Comparison.of({"a": [make_record(), make_record()]})
