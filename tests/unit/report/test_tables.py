import io

import pytest
from rich.console import Console

from edgelearn.report.tables import summary_table


def printed(table, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def words(table) -> list[list[str]]:
    return [line.split() for line in printed(table).splitlines() if line.strip()]


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
