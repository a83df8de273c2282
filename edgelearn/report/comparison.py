"""Strategies side by side over seeds: means with intervals, and tests of the differences."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from edgelearn.errors import StateError
from edgelearn.report import formats, results
from edgelearn.significance import Estimate, estimate, holm, paired_t_p, sign_flip_p

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import RenderableType

    from edgelearn.federated.record import Cost, RunRecord

CONFIDENCE = 0.95
_COSTS: tuple[Cost, ...] = ("bytes", "energy", "time")


@dataclass(frozen=True, slots=True)
class Metric:
    """A number by which runs are compared.

    Attributes:
        name: Its name in CSV and JSON.
        header: Its name in the table; none leaves it out there.
        write: How its mean is written.
        write_margin: How half of its interval is written.
        of: The number of a run.
        block: Which of the tables it stands in.
        is_tested: Whether its differences are tested: what is decided by chance, not by size.
    """

    name: str
    header: str
    write: Callable[[float], str]
    write_margin: Callable[[float], str]
    of: Callable[[RunRecord], float]
    block: str = "learning"
    is_tested: bool = True


def _bare(value: float) -> str:
    return formats.percent(value).rstrip("%")


def _signed(value: float) -> str:
    return formats.points(value).removesuffix(" pp")


def _index(value: float) -> str:
    return formats.UNKNOWN if math.isnan(value) else f"{value:.3f}"


METRICS: tuple[Metric, ...] = (
    Metric(
        "average_accuracy_served", "ACC", _bare, _bare,
        lambda record: record.scores("served").average_accuracy,
    ),
    Metric(
        "average_accuracy_float", "float\nACC", _bare, _bare,
        lambda record: record.scores("float").average_accuracy,
    ),
    Metric(
        "average_incremental_accuracy", "AIA", _bare, _bare,
        lambda record: record.scores("served").average_incremental_accuracy,
    ),
    Metric(
        "forgetting", "F", _bare, _bare,
        lambda record: record.scores("served").forgetting,
    ),
    Metric(
        "backward_transfer", "BWT", _signed, _bare,
        lambda record: record.scores("served").backward_transfer,
    ),
    Metric(
        "forward_transfer", "FWT", _signed, _bare,
        lambda record: record.scores("served").forward_transfer,
    ),
    Metric(
        "learning_accuracy", "LA", _bare, _bare,
        lambda record: record.scores("served").learning_accuracy,
    ),
    Metric(
        "online_accuracy", "online\nACC", _bare, _bare,
        lambda record: record.round_scores("served").online_accuracy,
    ),
    Metric(
        "min_accuracy", "min\nACC", _bare, _bare,
        lambda record: record.round_scores("served").min_accuracy,
    ),
    Metric(
        "worst_case_accuracy", "", _bare, _bare,
        lambda record: record.round_scores("served").worst_case_accuracy,
    ),
    Metric(
        "worst_decile_accuracy", "worst\ntenth", _bare, _bare,
        lambda record: record.device_accuracy("served").worst_decile, "devices",
    ),
    Metric(
        "worst_device_accuracy", "worst", _bare, _bare,
        lambda record: record.device_accuracy("served").worst, "devices",
    ),
    Metric(
        "device_gap", "gap", _bare, _bare,
        lambda record: record.device_accuracy("served").gap, "devices",
    ),
    Metric(
        "device_variance", "", _index, _index,
        lambda record: record.device_accuracy("served").variance, "devices",
    ),
    Metric(
        "jain_index", "Jain", _index, _index,
        lambda record: record.device_accuracy("served").jain, "devices",
    ),
    Metric(
        "bytes_up", "bytes\nup", formats.size, formats.size,
        lambda record: float(results.total_bytes(record, "up")), "costs", is_tested=False,
    ),
    Metric(
        "bytes_down", "", formats.size, formats.size,
        lambda record: float(results.total_bytes(record, "down")), "costs", is_tested=False,
    ),
    Metric(
        "memory_bytes_per_device", "device\nmemory", formats.size, formats.size,
        lambda record: float(record.run["memory_bytes_per_device"]), "costs", is_tested=False,
    ),
    Metric(
        "energy_j", "energy", formats.energy, formats.energy,
        lambda record: _last(record, "energy"), "costs", is_tested=False,
    ),
    Metric(
        "clock_s", "time", formats.duration, formats.duration,
        lambda record: _last(record, "time"), "costs", is_tested=False,
    ),
)  # fmt: skip

_TESTED_IN_TABLE = "average_accuracy_served"


def _last(record: RunRecord, cost: Cost) -> float:
    spent = record.spent(cost)
    return float(spent[-1]) if len(spent) else math.nan


def _areas(runs: Mapping[str, Sequence[RunRecord]]) -> tuple[Metric, ...]:
    """Return the areas under accuracy against cost, all over the largest cost of any run."""
    records = [record for group in runs.values() for record in group]
    budgets: dict[Cost, float] = {}
    for cost in _COSTS:
        spent = [_last(record, cost) for record in records]
        budgets[cost] = max((s for s in spent if not math.isnan(s)), default=math.nan)

    def metric(cost: Cost) -> Metric:
        return Metric(
            f"area_{cost}", f"area\n{cost}", _bare, _bare,
            lambda record: record.area(cost, budget=budgets[cost]), "costs",
        )  # fmt: skip

    return tuple(metric(cost) for cost in _COSTS)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one strategy over its seeds, or of the difference of two strategies.

    Attributes:
        strategy: The strategy.
        versus: The strategy that is taken away from it, within each seed; empty for none.
        metric: The metric's name.
        mean: Mean over the runs where the metric is defined; NaN if there are none.
        std: Sample standard deviation (n - 1) over these runs; NaN if there are fewer than two.
        low: Lower end of the 95 % interval of the mean (Student); NaN as for `std`.
        high: Upper end.
        n: Number of these runs, or of seeds that both strategies have.
        p_t: Of a difference, p of Student's paired test; else NaN.
        p_t_holm: The same, corrected (Holm) for all pairs of strategies on this metric.
        p_flip: p of the exact sign-flip test.
        p_flip_holm: The same, corrected.
    """

    strategy: str
    versus: str
    metric: str
    mean: float
    std: float
    low: float
    high: float
    n: int
    p_t: float = math.nan
    p_t_holm: float = math.nan
    p_flip: float = math.nan
    p_flip_holm: float = math.nan

    @classmethod
    def of(cls, strategy: str, versus: str, metric: str, found: Estimate, *p: float) -> Row:
        """Return the row of an estimate."""
        numbers = (found.mean, found.std, found.low, found.high, found.n)
        return cls(strategy, versus, metric, *numbers, *p)

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


COLUMNS = tuple(Row.__slots__)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Strategies compared over seeds.

    Attributes:
        rows: One per strategy and metric, in the order of the strategies and of `metrics`; then
            one per pair of strategies and tested metric.
        metrics: What is compared.
    """

    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[RunRecord]]) -> Comparison:
        """Compare finished runs.

        Args:
            runs: The runs of each strategy, one per seed.

        Raises:
            StateError: If a strategy has no run, a run is not complete, or a seed occurs twice.
        """
        for strategy, records in runs.items():
            _check(strategy, records)
        metrics = (*METRICS, *_areas(runs))
        values = {
            strategy: {m.name: {r.run["seed"]: m.of(r) for r in records} for m in metrics}
            for strategy, records in runs.items()
        }
        rows = [
            Row.of(strategy, "", name, estimate([*by_seed.values()], confidence=CONFIDENCE))
            for strategy, by_metric in values.items()
            for name, by_seed in by_metric.items()
        ]
        pairs = list(itertools.combinations(runs, 2))
        for metric in metrics:
            if metric.is_tested:
                rows += _tests(pairs, metric.name, values)
        return cls(tuple(rows), metrics)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies, in order."""
        return tuple(dict.fromkeys(row.strategy for row in self.rows if not row.versus))

    def to_table(self, *, everything: bool = False) -> RenderableType:
        """Return tables for the terminal, and tests of ACC.

        Args:
            everything: Learning, devices and costs in a table each, instead of a few of all.
        """
        parts: list[RenderableType] = []
        notes = _NOTES if everything else {_SUMMARY: _SUMMARY_NOTE}
        for block, note in notes.items():
            parts += [self._block(block), Text(note + "\n", "dim")]
        tests = [row for row in self.rows if row.versus and row.metric == _TESTED_IN_TABLE]
        if any(row.n > 1 for row in tests):
            parts += [_test_table(tests), Text(_TEST_NOTE + "\n", "dim")]
        parts.append(Text(self._note(tests)))
        return Group(*parts)

    def _block(self, block: str) -> Table:
        metrics = [
            m
            for m in self.metrics
            if m.header and (m.name in _IN_SUMMARY if block == _SUMMARY else m.block == block)
        ]
        table = _table()
        table.add_column("strategy", overflow="fold", min_width=8)
        table.add_column("n", justify="right")
        for metric in metrics:
            table.add_column(metric.header, justify="right", no_wrap=True)
        for strategy in self.strategies:
            rows = {r.metric: r for r in self.rows if r.strategy == strategy and not r.versus}
            cells = [_cell(metric, rows[metric.name]) for metric in metrics]
            table.add_row(Text(strategy), str(max(row.n for row in rows.values())), *cells)
        return table

    def _note(self, tests: Sequence[Row]) -> str:
        n = max(row.n for row in self.rows)
        if n < 2:
            return "One seed: nothing is known of the spread. --seeds 5 gives intervals and tests."
        text = f"± is half of the {CONFIDENCE:.0%} interval of the mean over n seeds (Student)."
        if tests:
            text += (
                f" With n = {n} the exact p can't be below {2.0 ** (1 - n):.3g}."
                " --all shows more metrics, --format csv and json hold the tests of all."
            )
        return text

    def to_csv(self) -> str:
        """Return all rows in full precision, one column per field; empty where not defined."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            writer.writerow(["" if v is None else v for v in _plain(row).values()])
        return out.getvalue()

    def to_json(self) -> str:
        """Return a list of rows as JSON, in full precision; null where not defined."""
        return json.dumps([_plain(row) for row in self.rows], indent=2, allow_nan=False) + "\n"


_NOTES = {
    "learning": (
        "Of the served model, but float ACC, in %: average accuracy at the end (ACC), over all "
        "experiences (AIA), when learned (LA), while learning (online ACC), at its lowest since it "
        "was learned (min ACC); forgetting (F), backward and forward transfer in points."
    ),
    "devices": "Final accuracy of devices in %: worst tenth, worst, gap to the best; Jain's index.",
    "costs": (
        "Energy and time are modelled. Areas in %: accuracy on what was met so far, averaged over "
        "an axis that is as long as the costs of the run that spent most."
    ),
}
_SUMMARY = "summary"
_SUMMARY_NOTE = (
    "Of the served model, but float ACC, in %: average accuracy at the end (ACC), over all "
    "experiences (AIA), of the worst tenth of devices; forgetting (F) in points."
)
_IN_SUMMARY = (
    "average_accuracy_served",
    "average_accuracy_float",
    "average_incremental_accuracy",
    "forgetting",
    "worst_decile_accuracy",
    "bytes_up",
    "memory_bytes_per_device",
    "energy_j",
)
_TEST_NOTE = "p is two-sided: Student's paired and the exact sign-flip test; Holm: all pairs."


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), title_justify="left")


def _check(strategy: str, records: Sequence[RunRecord]) -> None:
    if not records:
        raise StateError(f"{strategy}: there is no run to compare")
    seeds: set[Any] = set()
    for record in records:
        seed = record.run["seed"]
        if not record.is_complete:
            where = record.path or f"{strategy}, seed {seed}"
            raise StateError(f"{where}: the run is not complete; resume it before comparing")
        if seed in seeds:
            raise StateError(f"{strategy}: seed {seed} occurs twice; a run counts once")
        seeds.add(seed)


Values = dict[str, dict[str, dict[int, float]]]


def _tests(pairs: Sequence[tuple[str, str]], metric: str, values: Values) -> list[Row]:
    """Test the differences of all pairs within the seeds that both have."""
    found = []
    for one, other in pairs:
        first, second = values[one][metric], values[other][metric]
        differences = [first[seed] - second[seed] for seed in first if seed in second]
        found.append([value for value in differences if not math.isnan(value)])
    by_t, by_flip = [paired_t_p(d) for d in found], [sign_flip_p(d) for d in found]
    columns = zip(pairs, found, by_t, holm(by_t), by_flip, holm(by_flip), strict=True)
    return [
        Row.of(one, other, metric, estimate(differences, confidence=CONFIDENCE), *p)
        for (one, other), differences, *p in columns
    ]


def _test_table(tests: Sequence[Row]) -> Table:
    table = _table()
    table.title = "differences in ACC within seeds, percentage points"
    table.add_column("strategy - versus", overflow="fold", min_width=17)
    for header in ("n", "mean ±", "p (t)", "Holm", "p (flip)", "Holm"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in tests:
        difference = _signed(row.mean)
        if row.n > 1:
            difference += f" ± {_bare(row.margin)}"
        p = [_probability(v) for v in (row.p_t, row.p_t_holm, row.p_flip, row.p_flip_holm)]
        table.add_row(Text(f"{row.strategy} - {row.versus}"), str(row.n), difference, *p)
    return table


def _probability(p: float) -> str:
    if math.isnan(p):
        return formats.UNKNOWN
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _cell(metric: Metric, row: Row) -> Text:
    text = Text(metric.write(row.mean))
    if row.n > 1:
        text.append(f"\n±{metric.write_margin(row.margin)}", "dim")
    return text


def _plain(row: Row) -> dict[str, str | int | float | None]:
    values = {name: getattr(row, name) for name in COLUMNS}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
