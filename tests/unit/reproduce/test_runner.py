from __future__ import annotations

import json

import pytest

from edgelearn.errors import RunError, StateError
from edgelearn.reproduce.results import Results
from edgelearn.reproduce.runner import reproduce
from edgelearn.reproduce.table import find


def calls(log):
    return sorted(log.read_text().splitlines()) if log.exists() else []


def opened(tmp_path):
    return Results.open(tmp_path / "results" / "made-up.json")


def test_a_setting_runs_once_for_all_its_rows(make_table, log, tmp_path):
    reference = make_table(8.0, 12.0)
    failed = reproduce(reference, opened(tmp_path), seeds=range(2))
    assert failed == []
    assert calls(log) == ["12.0 0", "12.0 1", "8.0 0", "8.0 1"]
    results, rows = opened(tmp_path), find(reference).rows
    assert results.estimate(rows[0], {}).mean == 8.5
    assert results.estimate(rows[1], {}).std == pytest.approx(0.5**0.5)
    assert results.estimate(rows[2], {}).mean == 4.0  # the second row of the first setting
    entry = results.of(rows[0], {})[1]
    assert entry["numbers"] == {"score": 9.0, "half": 4.0, "unknown": "nan"}
    assert {"edgelearn", "python", "torch", "numpy", "machine"} <= set(entry["made_with"])


def test_an_interrupted_reproduction_goes_on(make_table, log, tmp_path):
    reference = make_table(8.0, 12.0, 9.0)

    def stop(_outcome, count, _total):
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(reference, opened(tmp_path), seeds=[0], on_outcome=stop)
    assert len(calls(log)) == 2
    seen = []
    reproduce(reference, opened(tmp_path), seeds=[0], on_outcome=lambda *a: seen.append(a[1:]))
    assert seen == [(1, 1)]
    assert len(calls(log)) == 3
    reproduce(reference, opened(tmp_path), seeds=[0])
    assert len(calls(log)) == 3, "nothing is run twice"
    reproduce(reference, opened(tmp_path), seeds=[0, 1])
    assert len(calls(log)) == 6, "more seeds are"


def test_what_fails_does_not_stop_the_rest(make_table, log, tmp_path):
    reference = make_table(-1.0, 0.0, 8.0)
    failed = reproduce(reference, opened(tmp_path), seeds=[0])
    assert [(f.row.method, f.is_unavailable) for f in failed] == [("value -1", False),
                                                                  ("value 0", True)]  # fmt: skip
    assert failed[0].problem == "ArithmeticError: -1.0 is below 0"
    assert len(opened(tmp_path).entries) == 1
    reproduce(reference, opened(tmp_path), seeds=[0])
    assert len(calls(log)) == 5, "failures are tried again"


def test_quick_arguments_are_another_setting(make_table, tmp_path):
    reference = make_table(8.0)
    reproduce(reference, opened(tmp_path), seeds=[4], is_quick=True)
    results, table = opened(tmp_path), find(reference)
    assert results.estimate(table.rows[0], {}).n == 0
    assert results.estimate(table.rows[0], table.quick).mean == 8.0


def test_only_some_rows(make_table, log, tmp_path):
    reproduce(make_table(8.0, 12.0), opened(tmp_path), seeds=[0], only="VALUE 12")
    assert calls(log) == ["12.0 0"]


@pytest.mark.slow
def test_processes_give_the_same(make_table, log, tmp_path):
    reference = make_table(8.0, -1.0, 12.0)
    failed = reproduce(reference, opened(tmp_path), seeds=range(2), num_jobs=2)
    assert len(failed) == 2
    assert {f.problem for f in failed} == {"ArithmeticError: -1.0 is below 0"}
    alone = Results.open(tmp_path / "alone.json")
    reproduce(reference, alone, seeds=range(2))
    both = [
        {key: entry["numbers"] for key, entry in results.entries.items()}
        for results in (opened(tmp_path), alone)
    ]
    assert both[0] == both[1]


def test_a_number_that_the_run_does_not_return(make_table, tmp_path):
    from dataclasses import replace

    reference = make_table(8.0)
    reproduce(reference, opened(tmp_path), seeds=[0])
    row = replace(find(reference).rows[0], metric="loss")
    with pytest.raises(RunError, match="no 'loss' among score, half, unknown"):
        opened(tmp_path).estimate(row, {})


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / "results" / "made-up.json"
    path.parent.mkdir()
    for text, match in (('{"results": [', "truncated"), (json.dumps([1]), "not the results")):
        path.write_text(text)
        with pytest.raises(StateError, match=match):
            Results.open(path)
