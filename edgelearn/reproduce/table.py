"""Tables of settings with reference values, and the verdict on a row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgelearn import plugins
from edgelearn.errors import PluginError
from edgelearn.significance import Estimate

TABLES = "edgelearn.reproductions"  # entry points

Run = Callable[..., Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of one setting, and what it should be.

    Attributes:
        method: Name of the method, with what tells it from others.
        setting: The setting, such as "class-incremental".
        run: Called with the arguments and `seed`; returns numbers by name. Found by its module and
            name in other processes.
        arguments: Plain values, as JSON has them.
        metric: Which of the numbers is compared.
        versus: Arguments of another setting of the same table, whose number with the same seed is
            taken off; None takes the number as it is.
        reference: What it should be; None if nothing comparable is known.
        tolerance: Largest difference of the mean that counts as reproduced; None gives no verdict,
            as where the reference is of other data.
        bound: "at least" or "at most" where a direction was published rather than a number: the
            reference is then the bound, and there is no tolerance.
        published: How the source writes the reference, if not as the bare number.
        source: Where the reference is from.
        note: How the setting differs from that of the source.
        reason: The likely reason, if it is not reproduced.
    """

    method: str
    setting: str
    run: Run
    arguments: Mapping[str, Any] = field(hash=False)
    metric: str
    versus: Mapping[str, Any] | None = field(default=None, hash=False)
    reference: float | None = None
    tolerance: float | None = None
    bound: str = ""
    published: str = ""
    source: str = ""
    note: str = ""
    reason: str = ""

    @property
    def baseline(self) -> Row | None:
        """The setting whose number is taken off."""
        return None if self.versus is None else replace(self, arguments=self.versus, versus=None)

    def setup(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return what decides the outcome but for the seed."""
        name = f"{self.run.__module__}:{self.run.__qualname__}"
        return {"run": name, "arguments": {**self.arguments, **overrides}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows that belong together.

    Attributes:
        name: Short name.
        title: Heading of its section.
        about: What is run, exactly, and where it differs from the source.
        rule: How hyperparameters were chosen; never on the test samples of what is reported.
        rows: The rows.
        minutes: Approximate processor minutes for one seed of all rows.
        unit: Unit of all numbers.
        digits: Digits behind the point.
        num_seeds: Seeds that the reference was taken over, or that make the spread known.
        quick: Arguments replaced by `--quick`, which shows that a table runs and nothing else.
    """

    name: str
    title: str
    about: str
    rule: str
    rows: tuple[Row, ...]
    minutes: float
    unit: str = "%"
    digits: int = 1
    num_seeds: int = 5
    quick: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a row was reproduced.

    Attributes:
        is_reproduced: None if nothing can be said.
        text: In words, with the difference.
    """

    is_reproduced: bool | None
    text: str


def judge(row: Row, found: Estimate, *, digits: int = 1) -> Verdict:
    """Compare the mean over seeds with the reference."""
    if found.n == 0:
        return Verdict(None, "not run")
    if row.reference is None:
        return Verdict(None, "no reference")
    difference = found.mean - row.reference
    if math.isinf(difference):
        return Verdict(False, "**not reproduced** (never reached)")
    by = f"{difference:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    if row.bound and found.low <= row.reference <= found.high:
        return Verdict(None, f"undecided: {by}, and the 95 % interval holds the bound")
    if row.bound:
        holds = difference >= 0 if row.bound == "at least" else difference <= 0
        return Verdict(holds, "reproduced" if holds else f"**not reproduced** ({by})")
    if row.tolerance is None:
        return Verdict(None, f"not comparable ({by})")
    if abs(difference) <= row.tolerance:
        return Verdict(True, f"reproduced ({by})")
    return Verdict(False, f"**not reproduced** ({by})")


def write_number(found: Estimate, *, digits: int) -> str:
    """Return a mean with its sample standard deviation, as far as these are known."""
    if found.n == 0 or math.isinf(found.mean):
        return "-" if found.n == 0 else "not reached in every seed"
    deviation = f" ± {found.std:.{digits}f}" if found.n > 1 else " (spread not known)"
    return f"{found.mean:.{digits}f}{deviation}"


def digest(setup: Mapping[str, Any]) -> str:
    """Return the fingerprint of what decides an outcome."""
    text = json.dumps(setup, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def find(reference: str) -> Table:
    """Return a table by name, `module:TABLE` or `file.py:TABLE`.

    Raises:
        PluginError: If there is none.
    """
    table = plugins.resolve(reference, TABLES)
    if not isinstance(table, Table):
        raise PluginError(f"{reference} is no table of edgelearn.reproduce, but {table!r}")
    return table
