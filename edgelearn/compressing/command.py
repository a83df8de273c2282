"""`edgelearn compress`: a table that grows by a row with each stage."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from edgelearn.compressing.rows import NUM_RUNS, Row
from edgelearn.compressing.run import REPORT, Report, compress
from edgelearn.compressing.subject import Subject, find
from edgelearn.errors import Fault, ScenarioError
from edgelearn.report import formats
from edgelearn.scenario.stages import parse

_WIDTH = 120  # where the output is no terminal
_COLUMNS = ("parameters", "non-zero", "MACs", "memory", "disk", "accuracy", "p50 ms", "p99 ms")


def run_command(options: argparse.Namespace) -> Report:
    """Compress what the options say, and print a row after each stage.

    Raises:
        ScenarioError: If an option, the pipeline, the model or the data set is wrong.
    """
    for name, value, least in (
        ("--runs", options.runs, 1),
        ("--max-train", options.max_train, 0),
        ("--max-test", options.max_test, 0),
        ("--seed", options.seed or 0, 0),
    ):
        if value < least:
            fault = Fault("", name, f"got {value}; at least {least} is allowed")
            raise ScenarioError("compress", [fault])
    if options.pipeline:
        parse(options.pipeline, source="--pipeline")  # before anything is loaded
    subject = find(
        options.target,
        dataset=options.data,
        root=options.root,
        args=_arguments(options.args),
        max_train=options.max_train,
        max_test=options.max_test,
        seed=options.seed,
    )
    out = None if options.out is None else Path(options.out)
    return compress_subject(
        subject, pipeline=options.pipeline or subject.pipeline, out=out, num_runs=options.runs
    )


def _arguments(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = tomllib.loads(f"given = {{{text}}}")["given"]
    except tomllib.TOMLDecodeError as error:
        fault = Fault("", "--args", f"got {text!r}; expected name=value, ... as in TOML: {error}")
        raise ScenarioError("compress", [fault]) from error
    return found


def compress_subject(
    subject: Subject, *, pipeline: str, out: Path | None, num_runs: int = NUM_RUNS
) -> Report:
    """Compress, and print a row after each stage.

    Args:
        subject: The network and its samples.
        pipeline: Stages.
        out: New folder for files; None writes none.
        num_runs: Calls that count for a time.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = empty_table(
        f"{subject.facts['model']} on {subject.facts['dataset']}", num_runs=num_runs
    )
    with Live(table, console=console, auto_refresh=False, transient=True) as live:

        def show(row: Row) -> None:
            add_row(table, row)
            live.refresh()

        report = compress(
            subject.module,
            train=subject.train,
            test=subject.test,
            pipeline=pipeline,
            seed=subject.seed,
            factory=subject.factory,
            facts=subject.facts,
            out=out,
            num_runs=num_runs,
            on_row=show,
        )
    console.print(table)
    if out is not None:
        print(f"files: {out}\nreport: {out / REPORT}")
    return report


def empty_table(title: str, *, num_runs: int) -> Table:
    """Return the table without rows."""
    table = Table(
        title=escape(title),
        caption=f"times of {num_runs} answers to one input, one thread; disk: bytes of the file",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("stage", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("executed by")
    return table


def add_row(table: Table, row: Row) -> None:
    """Add a row."""
    table.add_row(
        escape(row.stage),
        f"{row.parameters:,}",
        f"{row.nonzero:,}",
        escape(f"not counted: {row.uncounted}") if row.macs is None else f"{row.macs:,}",
        formats.size(row.memory_bytes),
        formats.size(row.disk_bytes),
        formats.percent(row.accuracy),
        f"{row.p50_ms:.3f}",
        f"{row.p99_ms:.3f}",
        escape(row.runtime),
    )
