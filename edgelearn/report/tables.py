"""The table that a run prints at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from edgelearn.continual.exposure import mean_exposure
from edgelearn.continual.metrics import spread
from edgelearn.report import formats, kinds, results

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    lines = (*lines, *kinds.lines(record))
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
