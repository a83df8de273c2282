"""Live progress on stderr: one line that changes on a terminal, one line a round elsewhere."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgelearn.federated.loop import Progress as RoundProgress
from edgelearn.report.formats import size


@contextmanager
def live_display(title: str) -> Iterator[Callable[[RoundProgress], None]]:
    """Show the rounds of a run; yields what the round loop calls."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda seen: print(f"{title}  {describe(seen)}", file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, text="starting")

        def show(seen: RoundProgress) -> None:
            bar.update(
                task, total=seen.num_rounds, completed=seen.server_round, text=describe(seen)
            )

        yield show


def describe(seen: RoundProgress) -> str:
    """Return one line about a round."""
    parts = [
        f"round {seen.server_round:>{len(str(seen.num_rounds))}}/{seen.num_rounds}",
        f"experience {seen.position}",
        f"accuracy {_share(seen.accuracy)}",
        f"forgetting {_share(seen.forgetting)}",
        size(seen.num_bytes),
    ]
    bad = {k: n for k, n in seen.outcomes.items() if n and k not in ("ok", "idle")}
    parts += [f"{count} {outcome}" for outcome, count in bad.items()]
    return "  ".join(parts)


def _share(value: float) -> str:
    return "    -" if math.isnan(value) else f"{value:5.1%}"
