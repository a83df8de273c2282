"""Result files: one JSON per part, written after every turn, so that a part can be resumed."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelearn.files import write_atomic
from harness import machine
from harness.paths import QUICK_RESULTS, RESULTS, ROOT


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        quick: Prove that the scripts work; the numbers mean nothing.
        repetitions: Turns in which every engine runs once.
        fresh: Forget the turns of an earlier, interrupted invocation.
        peers: Whether to run other people's software, too.
    """

    quick: bool = False
    repetitions: int = 5
    fresh: bool = False
    peers: bool = True

    @property
    def folder(self) -> Path:
        """Where results go."""
        return QUICK_RESULTS if self.quick else RESULTS


Run = Callable[[], dict[str, Any]]


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def sentence(text: str) -> str:
    """Return a text that begins with a capital."""
    return text[:1].upper() + text[1:]


def read(part: str, folder: Path) -> dict[str, Any] | None:
    """Return the stored result of a part."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write(part: str, result: Mapping[str, Any], folder: Path) -> None:
    """Store a result."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _portable(json.dumps(result, indent=1))
    write_atomic(folder / f"{part}.json", f"{text}\n".encode())


def _portable(text: str) -> str:
    """Leave out where the checkout lies on this machine."""
    return text.replace(f"{ROOT}/", "")


def repeat(
    part: str,
    runs: Mapping[str, Run] | Callable[[int], Mapping[str, Run]],
    options: Options,
    *,
    config: Mapping[str, Any],
    repetitions: int | None = None,
    backwards: bool = True,
) -> dict[str, Any]:
    """Let all runs take turns, and store what they return after each turn.

    Every other turn goes backwards, so that a drift of the machine favours nobody. A run that
    fails is not asked again; its error is kept. Turns of an interrupted invocation with the same
    configuration on the same machine and commit are kept.

    Args:
        part: Name of the result.
        runs: What takes turns, by name; or that as a function of the turn, from 0.
        options: How to measure.
        config: What defines the measurement.
        repetitions: Turns, if not those of the options.
        backwards: Whether every other turn goes backwards; not where a run needs another's files.
    """
    count = repetitions or options.repetitions
    head = {"part": part, "quick": options.quick, **machine.describe(), "config": dict(config)}
    head = json.loads(_portable(json.dumps(head)))
    stored = None if options.fresh else read(part, options.folder)
    result: dict[str, Any] = {**head, "turns": [], "skipped": {}}
    if stored is not None and {k: stored.get(k) for k in head} == head:
        result = stored
    for turn in range(len(result["turns"]), count):
        found: dict[str, Any] = {}
        before = machine.load()
        these = runs(turn) if callable(runs) else runs
        for name in reversed(these) if backwards and turn % 2 else these:
            if name in result["skipped"]:
                continue
            answer = these[name]()
            if "error" in answer:
                result["skipped"][name] = answer["error"]
                say(f"{part}: {name} failed and is left out: {answer['error']}")
                continue
            found[name] = answer
            say(f"{part} {turn + 1}/{count}: {name}: {_brief(answer)}")
        result["turns"].append({"load": [before, machine.load()], "runs": found})
        write(part, result, options.folder)
    return result


def _brief(answer: Mapping[str, Any]) -> str:
    pairs = [(k, v) for k, v in answer.items() if isinstance(v, int | float)]
    return ", ".join(f"{k} {v:.4g}" for k, v in pairs)


def runs_of(result: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return what a run measured, turn by turn."""
    return [turn["runs"][name] for turn in result["turns"] if name in turn["runs"]]


def values(result: Mapping[str, Any], name: str, field: str) -> list[float]:
    """Return one figure of a run, turn by turn."""
    return [run[field] for run in runs_of(result, name) if run.get(field) is not None]


def median(numbers: Iterable[float]) -> float | None:
    """Return the median, or None of nothing."""
    found = list(numbers)
    return statistics.median(found) if found else None


def spread(numbers: list[float]) -> str:
    """Return mean and sample standard deviation, with one decimal."""
    mean = f"{statistics.mean(numbers):.1f}".replace("-", "\N{MINUS SIGN}")
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.1f}"


def ratio(
    result: Mapping[str, Any], field: str, above: str, below: str
) -> tuple[float, float, float] | None:
    """Return median, smallest and largest ratio of two runs, each taken within one turn."""
    found = [
        turn["runs"][above][field] / turn["runs"][below][field]
        for turn in result["turns"]
        if turn["runs"].get(above, {}).get(field) and turn["runs"].get(below, {}).get(field)
    ]
    return (statistics.median(found), min(found), max(found)) if found else None
