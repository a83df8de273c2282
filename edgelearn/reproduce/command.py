"""`edgelearn reproduce TABLE`: run what is missing, write the page, show the section."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from edgelearn.reproduce import page
from edgelearn.reproduce.results import Results, default_folder
from edgelearn.reproduce.runner import Outcome, chosen, reproduce
from edgelearn.reproduce.table import Table, find, judge, write_number

PAGE = "reproduction.md"


def reproduce_table(
    reference: str,
    *,
    folder: Path | None,
    num_seeds: int | None,
    num_jobs: int,
    only: str,
    is_quick: bool,
    renders_only: bool,
) -> bool:
    """Reproduce a table.

    Args:
        reference: The table, as `table.find` takes it.
        folder: Where page and results lie; None is `docs/` beside a source checkout.
        num_seeds: Seeds, from 0; None is what the table says.
        num_jobs: Processes.
        only: Only rows with this text.
        is_quick: Whether only to see that it runs; nothing is kept.
        renders_only: Whether only to write the page.

    Returns:
        Whether nothing failed but for want of data.
    """
    table = find(reference)
    if is_quick:
        with tempfile.TemporaryDirectory(prefix="edgelearn-") as scratch:
            results = Results.open(Path(scratch) / "quick.json")
            seeds = range(num_seeds or 1)
            failed = _run(reference, results, seeds, num_jobs, only, is_quick=True)
            _show(table, results, only, is_quick=True)
        return not any(not outcome.is_unavailable for outcome in failed)
    place = default_folder() if folder is None else folder
    results = Results.open(place / "results" / f"{table.name}.json")
    failed = []
    try:
        if not renders_only:
            seeds = range(num_seeds or table.num_seeds)
            failed = _run(reference, results, seeds, num_jobs, only, is_quick=False)
    finally:  # what there is by then is on the page
        page.write(place / PAGE, table, results)
    _show(table, results, only, is_quick=False)
    print(f"page: {place / PAGE}")
    return not any(not outcome.is_unavailable for outcome in failed)


def _run(
    reference: str, results: Results, seeds: range, num_jobs: int, only: str, *, is_quick: bool
) -> list[Outcome]:
    return reproduce(
        reference,
        results,
        seeds=seeds,
        num_jobs=num_jobs,
        is_quick=is_quick,
        only=only,
        on_outcome=_tell,
    )


def _tell(outcome: Outcome, count: int, total: int) -> None:
    row = outcome.row
    what = f"[{count}/{total}] {row.method}, {row.setting}, seed {outcome.seed}"
    if outcome.numbers is None:
        first = outcome.problem.partition("\n")[0]
        said = f"not run here: {first}" if outcome.is_unavailable else f"FAILED: {outcome.problem}"
    else:
        said = f"{row.metric} {outcome.numbers.get(row.metric, float('nan')):.4g}"
    print(f"{what}: {said} ({outcome.cpu_s:.0f} s of one core)", file=sys.stderr)


def _show(table: Table, results: Results, only: str, *, is_quick: bool) -> None:
    overrides = table.quick if is_quick else {}
    title = f"{table.title} ({table.unit})"
    if is_quick:
        title += "\non little data: shows that it runs, not what it reaches"
    grid = Grid(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for header, justify in (
        ("method", "left"), ("setting", "left"), ("ours", "right"), ("n", "right"),
        ("reference", "right"), ("verdict", "left"),
    ):  # fmt: skip
        grid.add_column(header, justify="right" if justify == "right" else "left")
    for row in chosen(table, only):
        found = results.estimate(row, overrides)
        ours = write_number(found, digits=table.digits)
        reference = "-" if row.reference is None else f"{row.reference:.{table.digits}f}"
        verdict = "" if is_quick else judge(row, found, digits=table.digits).text.replace("*", "")
        cells = (row.method, row.setting, ours, str(found.n), reference, verdict)
        grid.add_row(*map(Text, cells))
    Console().print(grid)
