from __future__ import annotations

from dataclasses import replace

import pytest

from edgelearn import plugins
from edgelearn.errors import PluginError
from edgelearn.reproduce.results import Results
from edgelearn.reproduce.table import TABLES, Row, digest, find, judge, write_number
from edgelearn.significance import estimate

INF = float("inf")


def run(*, seed: int) -> dict[str, float]:
    return {"acc": float(seed)}


ROW = Row(
    method="m", setting="s", run=run, arguments={"a": 1, "b": [2]}, metric="acc",
    reference=80.0, tolerance=3.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected", "text"),
    [
        ([81.0, 82.0], True, "reproduced (+1.5)"),
        ([77.0], True, "reproduced (\N{MINUS SIGN}3.0)"),
        ([76.9], False, "**not reproduced** (\N{MINUS SIGN}3.1)"),
        ([90.0], False, "**not reproduced** (+10.0)"),
        ([INF, 80.0], False, "**not reproduced** (never reached)"),
        ([], None, "not run"),
        ([float("nan")], None, "not run"),
    ],
)
def test_verdicts(values, expected, text):
    verdict = judge(ROW, estimate(values))
    assert (verdict.is_reproduced, verdict.text) == (expected, text)


def test_how_a_number_is_written():
    written = [write_number(estimate(v), digits=1) for v in ([], [1.0], [1.0, 2.0], [INF, 2.0])]
    assert written == ["-", "1.0 (spread not known)", "1.5 ± 0.7", "not reached in every seed"]


def test_without_a_comparable_reference_there_is_no_verdict():
    found = estimate([80.0])
    assert judge(replace(ROW, reference=None), found).text == "no reference"
    other = judge(replace(ROW, tolerance=None), found)
    assert other.is_reproduced is None
    assert other.text == "not comparable (+0.0)"


def test_the_digest_is_of_what_decides_the_outcome():
    setup = ROW.setup({})
    assert setup["run"] == f"{run.__module__}:run"
    assert digest(setup) == digest(replace(ROW, method="other", reference=1.0).setup({}))
    assert digest(setup) == digest({"arguments": {"b": [2], "a": 1}, "run": setup["run"]})
    assert digest(setup) != digest(ROW.setup({"a": 2}))
    assert digest(setup) != digest({**setup, "run": "elsewhere:run"})


@pytest.mark.parametrize("name", plugins.names(TABLES))
def test_every_installed_table_is_complete(name):
    table = find(name)
    assert table.name == name
    assert table.rows
    assert table.minutes > 0
    labels = [(row.method, row.setting, row.metric) for row in table.rows]
    assert len(set(labels)) == len(labels), "two rows look the same"
    for row in table.rows:
        assert row.reference is not None or not row.bound
        assert "seed" not in row.arguments
        assert len(digest(row.setup(table.quick))) == 16  # plain values only


def test_what_is_no_table(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("TABLE = 3\n")
    with pytest.raises(PluginError, match="is no table"):
        find(f"{path}:TABLE")
    with pytest.raises(PluginError, match="did you mean 'fashion-oracle'"):
        find("fashion-orakle")


def test_a_direction_is_decided_where_the_interval_is_on_one_side():
    row = replace(ROW, reference=0.0, tolerance=None, bound="at least")
    assert judge(row, estimate([1.0, 1.1, 0.9])).is_reproduced is True
    assert judge(row, estimate([-1.0, -1.1, -0.9])).is_reproduced is False
    undecided = judge(row, estimate([1.0, -0.5, 0.6]))
    assert undecided.is_reproduced is None
    assert "undecided" in undecided.text
    assert judge(row, estimate([2.0])).is_reproduced is True  # nothing is known of its spread


def test_a_difference_is_taken_seed_by_seed(tmp_path):
    results = Results.open(tmp_path / "results.json")
    row = replace(ROW, arguments={"method": "a"}, versus={"method": "b"})
    for seed, (one, other) in enumerate([(5.0, 1.0), (7.0, 2.0), (9.0, None)]):
        results.add(row.setup({}), seed, {row.metric: one}, 0.0)
        if other is not None:
            results.add(row.baseline.setup({}), seed, {row.metric: other}, 0.0)
    found = results.estimate(row, {})
    assert (found.n, found.mean) == (2, 4.5)


@pytest.mark.parametrize("name", plugins.names(TABLES))
def test_what_a_row_is_compared_with_is_run_too(name):
    table = find(name)
    settings = [row.setup({}) for row in table.rows if row.versus is None]
    for row in table.rows:
        if row.baseline is not None:
            assert row.baseline.setup({}) in settings
