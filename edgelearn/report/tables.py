"""Tables: what a run prints at its end, and strategies side by side over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgelearn.continual.exposure import mean_exposure
from edgelearn.continual.metrics import spread
from edgelearn.errors import StateError
from edgelearn.report import formats, results

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelearn.continual.boundaries import Detections
    from edgelearn.continual.exposure import Exposure
    from edgelearn.federated.record import RunRecord


def summary_table(record: RunRecord) -> Table:
    """Return a run at a glance: a row per experience, the fleet's scores, and what it cost."""
    run = record.run
    served, exact = record.scores("served"), record.scores("float")
    learned, forgotten = results.when_learned(record), results.forgotten(record)
    final = record.matrix("served")[-1], record.matrix("float")[-1]
    table = Table(
        title=Text(f"{run['scenario']}: {run['client']} with {run['server']}, seed {run['seed']}"),
        caption=Text(_costs(record)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_footer=True,
    )
    table.add_column("experience", "fleet")
    table.add_column("classes")
    for header, total in (
        ("when learned", formats.percent(served.learning_accuracy)),
        (f"final ({run['runtime']})", formats.percent(served.average_accuracy)),
        ("final (float)", formats.percent(exact.average_accuracy)),
        ("forgotten", formats.points(served.forgetting, signed=False)),
    ):
        table.add_column(Text(header), Text(total, "bold"), justify="right", no_wrap=True)
    for e in range(record.num_experiences):
        table.add_row(
            str(e),
            Text(formats.classes(run["classes"][e])),
            formats.percent(learned[e]),
            formats.percent(final[0][e]),
            formats.percent(final[1][e]),
            formats.points(forgotten[e], signed=False),
        )
    return table


def _costs(record: RunRecord) -> str:
    run, served = record.run, record.scores("served")
    worst = spread(results.final_by_device(record)).worst_decile
    rounds = f"{len(record.rounds)} rounds"
    if not record.is_complete:
        total = record.num_experiences * run["rounds_per_experience"]
        rounds = f"NOT COMPLETE: {len(record.rounds)} of {total} rounds"
    num_bytes = run["model_bytes"]
    lines: tuple[tuple[str, ...], ...] = (
        (
            f"worst-decile device {formats.percent(worst)}",
            f"AIA {formats.percent(served.average_incremental_accuracy)}",
            f"BWT {formats.points(served.backward_transfer)}",
            f"FWT {formats.points(served.forward_transfer)}",
        ),
        (
            rounds,
            f"up {formats.size(results.total_bytes(record, 'up'))}",
            f"down {formats.size(results.total_bytes(record, 'down'))}",
        ),
        (
            f"model {formats.size(num_bytes['served'])} (float {formats.size(num_bytes['float'])})",
            f"memory {formats.size(run['memory_bytes_per_device'])} per device",
        ),
    )
    if known := record.exposure("served"):
        lines = (*lines, *_exposure(known))
    if (found := record.detections()) is not None:
        lines = (*lines, _detections(found))
    return "\n".join(" · ".join(line) for line in lines)


def _detections(found: Detections) -> tuple[str, ...]:
    """Return how well devices found boundaries that they were not told of."""
    delay = formats.UNKNOWN
    if found.num_found:
        delay = f"{found.delay:.1f} rounds after ({found.delay_visits:.1f} of the device's own)"
    return (
        f"boundaries: {found.num_found:,} of {found.num_changes:,} found",
        delay,
        f"{found.num_false:,} false alarms in {found.num_visits:,} visits",
    )


def _exposure(known: Sequence[Exposure]) -> tuple[tuple[str, ...], ...]:
    """Return what devices know of what they have met or not, where they differ in that."""
    mean = mean_exposure(known)
    ever = f"{formats.percent(mean.others)} on what only others have met"
    return (
        (
            f"devices {formats.percent(known[-1].own)} on what each has met",
            f"{formats.percent(known[-1].fleet)} on what any has",
        ),
        (f"{ever}, {formats.points(mean.gain)} to the untrained model (mean over experiences)",),
    )


# -- strategies side by side -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metric:
    """A number by which runs are compared.

    Attributes:
        name: Its name in CSV and JSON.
        header: Its name in the table.
        write: How its mean is written.
        write_std: How its standard deviation is written.
        of: The number of a run.
    """

    name: str
    header: str
    write: Callable[[float], str]
    write_std: Callable[[float], str]
    of: Callable[[RunRecord], float]


def _bare(value: float) -> str:
    return formats.percent(value).rstrip("%")


def _signed(value: float) -> str:
    return formats.points(value).removesuffix(" pp")


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
        "worst_decile_accuracy", "worst\ntenth", _bare, _bare,
        lambda record: record.device_accuracy("served").worst_decile,
    ),
    Metric(
        "bytes_up", "bytes\nup", formats.size, formats.size,
        lambda record: float(results.total_bytes(record, "up")),
    ),
    Metric(
        "memory_bytes_per_device", "device\nmemory", formats.size, formats.size,
        lambda record: float(record.run["memory_bytes_per_device"]),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one strategy over its seeds.

    Attributes:
        strategy: The strategy.
        metric: The metric's name.
        mean: Mean over the runs where the metric is defined; NaN if there are none.
        std: Sample standard deviation (n - 1) over these runs; NaN if there are fewer than two.
        n: Number of these runs.
    """

    strategy: str
    metric: str
    mean: float
    std: float
    n: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Strategies compared over seeds.

    Attributes:
        rows: One per strategy and metric, in the order of the strategies and of `METRICS`.
    """

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[RunRecord]]) -> Comparison:
        """Compare finished runs.

        Args:
            runs: The runs of each strategy, one per seed.

        Raises:
            StateError: If a strategy has no run, a run is not complete, or a seed occurs twice.
        """
        rows: list[Row] = []
        for strategy, records in runs.items():
            _check(strategy, records)
            for metric in METRICS:
                values = [value for value in map(metric.of, records) if not math.isnan(value)]
                mean = statistics.fmean(values) if values else math.nan
                std = statistics.stdev(values) if len(values) > 1 else math.nan
                rows.append(Row(strategy, metric.name, mean, std, len(values)))
        return cls(tuple(rows))

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies, in order."""
        return tuple(dict.fromkeys(row.strategy for row in self.rows))

    def to_table(self) -> Table:
        """Return a table for the terminal: a row per strategy, mean ± std over its seeds."""
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 0, 0, 1),
            caption=(
                "mean ± sample standard deviation over n seeds. Of the served model, but float "
                "ACC: average accuracy (ACC), average incremental accuracy (AIA) and worst tenth "
                "of devices in %; forgetting (F), backward (BWT) and forward transfer (FWT) in "
                "percentage points."
            ),
            caption_justify="left",
        )
        table.add_column("strategy", overflow="fold", min_width=8)
        table.add_column("n", justify="right")
        for metric in METRICS:
            table.add_column(metric.header, justify="right", no_wrap=True)
        for strategy in self.strategies:
            rows = {row.metric: row for row in self.rows if row.strategy == strategy}
            cells = [_cell(metric, rows[metric.name]) for metric in METRICS]
            table.add_row(Text(strategy), str(max(row.n for row in rows.values())), *cells)
        return table

    def to_csv(self) -> str:
        """Return `strategy,metric,mean,std,n` in full precision; empty where not defined."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["strategy", "metric", "mean", "std", "n"])
        for row in self.rows:
            numbers = ["" if math.isnan(v) else repr(v) for v in (row.mean, row.std)]
            writer.writerow([row.strategy, row.metric, *numbers, row.n])
        return out.getvalue()

    def to_json(self) -> str:
        """Return a list of rows as JSON, in full precision; null where not defined."""
        rows = [
            {
                "strategy": row.strategy,
                "metric": row.metric,
                "mean": _or_null(row.mean),
                "std": _or_null(row.std),
                "n": row.n,
            }
            for row in self.rows
        ]
        return json.dumps(rows, indent=2, allow_nan=False) + "\n"


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


def _cell(metric: Metric, row: Row) -> Text:
    text = Text(metric.write(row.mean))
    if row.n > 1:
        text.append(f"\n±{metric.write_std(row.std)}", "dim")
    return text


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
