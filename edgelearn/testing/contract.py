"""The contract of client strategies, checked: what `edgelearn check` runs.

Example:
    >>> from edgelearn.continual.naive import Naive
    >>> findings = check_strategy(Naive)
    >>> all(finding.passed for finding in findings)
    True
"""

from __future__ import annotations

import inspect
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgelearn.continual.strategy import ClientStrategy
from edgelearn.testing.calls import global_seed
from edgelearn.testing.checks import CHECKS, Check
from edgelearn.testing.subject import ANYTHING, Broken, Skipped, Subject

_MARKS = {True: "✓", False: "✗", None: "–"}  # noqa: RUF001
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: Its name.
        passed: Whether the contract is kept; None if there is no telling, or nothing wrong with it.
        message: What was expected, what happened, and what to do.
    """

    check: str
    passed: bool | None
    message: str


def check_strategy(make: Callable[..., Any], /, **arguments: Any) -> list[Finding]:
    """Check a client strategy against its contract, on toy data.

    Args:
        make: The class, or a function that returns a strategy.
        **arguments: What it is built with; its defaults where nothing is given.

    Returns:
        One finding for each check, in the order of `CHECKS`. Whatever the strategy raises is a
        finding too, with the file and line: nothing but KeyboardInterrupt leaves this function.
    """
    subject = Subject(make, arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as devices do; more would change the order of sums
    try:
        return _all_findings(subject)
    finally:
        torch.set_num_threads(threads)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return findings as plain text: a mark, the check, and what was found."""
    column = 4 + max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        head = f"{_MARKS[finding.passed]} {finding.check}".ljust(column)
        lines += textwrap.wrap(
            finding.message,
            _WIDTH,
            initial_indent=head,
            subsequent_indent=" " * column,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [head.rstrip()]
    counts = [sum(finding.passed is verdict for finding in findings) for verdict in _MARKS]
    passed, failed, untold = counts
    total = f"{passed} passed, {failed} failed" + (f", {untold} without a verdict" * bool(untold))
    return "\n".join([*lines, total])


def _all_findings(subject: Subject) -> list[Finding]:
    findings: list[Finding] = []
    in_the_way: set[str] = set()
    for check in CHECKS:
        first = next((name for name in check.needs if name in in_the_way), None)
        if first is None:
            finding = _run(check, subject)
            if finding.passed is False:
                in_the_way.add(check.name)
        else:
            finding = Finding(check.name, None, f"not checked until {first!r} passes")
        findings.append(finding)
    return findings


def _run(check: Check, subject: Subject) -> Finding:
    try:
        with global_seed(0):  # a strategy that draws from it must not disturb its caller
            return Finding(check.name, True, check.run(subject))
    except Broken as verdict:
        return Finding(check.name, False, str(verdict))
    except Skipped as verdict:
        return Finding(check.name, None, str(verdict))
    except ANYTHING as error:
        wanted = (inspect.getdoc(check.run) or "").partition("\n")[0].rstrip(".")
        expected = wanted[:1].lower() + wanted[1:]
        return Finding(
            check.name, False, f"expected: {expected}; instead {describe(error, subject)}"
        )


def describe(error: BaseException, subject: Subject) -> str:
    """Return an error in one line, with the last place in the plug-in's own file."""
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename in _files(subject.make)]
    if not own:
        package = str(Path(__file__).resolve().parents[1])
        own = [frame for frame in frames if not frame.filename.startswith(package)]
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    if not own:
        return text + notes
    last = own[-1]
    return f"{text} ({last.filename}:{last.lineno}, in {last.name}){notes}"


def _files(make: Callable[..., Any]) -> set[str]:
    """Return the files that a strategy is written in."""
    kinds = (
        [k for k in make.__mro__ if k is not ClientStrategy] if isinstance(make, type) else [make]
    )
    files = set()
    for kind in kinds:
        try:
            files.add(inspect.getsourcefile(kind) or "")
        except (TypeError, OSError):
            continue
    return files - {""}
