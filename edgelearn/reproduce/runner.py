"""Runs what a table lacks, one setting and seed after another or in several processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from edgelearn.errors import DatasetError, PluginError, RunError
from edgelearn.reproduce.results import Results
from edgelearn.reproduce.table import Row, Table, find


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one setting and seed.

    Attributes:
        row: The first row that asked for it.
        seed: The seed.
        numbers: What it returned; None if it failed.
        cpu_s: Processor seconds that it took.
        problem: Why it failed.
        is_unavailable: Whether it failed for want of data or a plug-in, not by itself.
    """

    row: Row
    seed: int
    numbers: dict[str, float] | None
    cpu_s: float
    problem: str = ""
    is_unavailable: bool = False


def reproduce(
    reference: str,
    results: Results,
    *,
    seeds: Sequence[int],
    num_jobs: int = 1,
    is_quick: bool = False,
    only: str = "",
    on_outcome: Callable[[Outcome, int, int], None] | None = None,
) -> list[Outcome]:
    """Run what is not among the results yet; each outcome is kept as soon as it is there.

    Args:
        reference: The table, as `table.find` takes it.
        results: Where outcomes are kept.
        seeds: Seeds.
        num_jobs: Processes, of one torch thread each.
        is_quick: Whether to take the table's quick arguments.
        only: Only rows with this text in their method or setting.
        on_outcome: Called with each outcome, how many there are by then, and of how many.

    Returns:
        What failed.

    Raises:
        RunError: If a process died.
    """
    table = find(reference)
    overrides = table.quick if is_quick else {}
    todo = [*_missing(table, results, overrides, seeds, only)]
    failed = []
    for count, (index, outcome) in enumerate(_outcomes(reference, todo, is_quick, num_jobs), 1):
        setup = table.rows[index].setup(overrides)
        if outcome.numbers is None:
            failed.append(outcome)
        else:
            results.add(setup, outcome.seed, outcome.numbers, outcome.cpu_s)
        if on_outcome is not None:
            on_outcome(outcome, count, len(todo))
    return failed


def chosen(table: Table, only: str) -> tuple[Row, ...]:
    """Return the rows with a text in their method or setting."""
    return tuple(row for row in table.rows if only.lower() in f"{row.method} {row.setting}".lower())


def _missing(
    table: Table, results: Results, overrides: Any, seeds: Sequence[int], only: str
) -> Iterator[tuple[int, int]]:
    """Yield row and seed of what is to be run; rows that share a setting share a run."""
    wanted, seen = chosen(table, only), []
    for seed in seeds:
        for index, row in enumerate(table.rows):
            setup = row.setup(overrides)
            if row in wanted and (setup, seed) not in seen and not results.has(setup, seed):
                seen.append((setup, seed))
                yield index, seed


def _outcomes(
    reference: str, todo: Sequence[tuple[int, int]], is_quick: bool, num_jobs: int
) -> Iterator[tuple[int, Outcome]]:
    if num_jobs == 1:
        for index, seed in todo:
            yield index, _run(reference, index, seed, is_quick)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(num_jobs, context, initializer=_use_one_thread)
    try:
        waiting: dict[Future[Outcome], int] = {
            pool.submit(_run, reference, index, seed, is_quick): index for index, seed in todo
        }
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool as error:
        raise RunError(
            f"a process that ran a row died, maybe for want of memory: {error}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(reference: str, index: int, seed: int, is_quick: bool) -> Outcome:
    """Run one row; what it raises is told, so that the others go on."""
    table = find(reference)
    row, started = table.rows[index], time.process_time()
    arguments = row.setup(table.quick if is_quick else {})["arguments"]
    try:
        numbers = {name: float(v) for name, v in row.run(**arguments, seed=seed).items()}
    except Exception as error:
        is_unavailable = isinstance(error, DatasetError | PluginError)
        problem = f"{type(error).__name__}: {error}"
        return Outcome(row, seed, None, time.process_time() - started, problem, is_unavailable)
    return Outcome(row, seed, numbers, time.process_time() - started)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
