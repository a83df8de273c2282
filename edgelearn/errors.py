"""Every error that edgelearn raises on purpose.

The tree::

    EdgelearnError
    ├── ScenarioError      a scenario (or an override of it) has faults; holds all of them
    ├── PluginError        a name, file or entry point cannot be resolved to a plug-in
    ├── DatasetError       a data set is missing or its files are damaged
    │   └── DatasetMissingError  it is nowhere to be found; says what can be done about it
    ├── StrategyError      a client strategy broke its contract
    ├── DivergenceError    a loss or an update is not finite
    ├── EgressError        something that is not declared was about to leave a device
    ├── StateError         stored state (device store, checkpoint, record) is missing or damaged
    ├── ExtraMissingError  an optional dependency is not installed
    └── RunError           a run cannot go on

A message says what failed, the value seen, what is allowed, and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class EdgelearnError(Exception):
    """Base class: catching it catches everything that edgelearn raises on purpose."""


class PluginError(EdgelearnError):
    """A name, file or entry point cannot be resolved to a plug-in."""


class DatasetError(EdgelearnError):
    """A data set is missing or its files are damaged."""


class DatasetMissingError(DatasetError):
    """A data set is nowhere to be found.

    What can be done about it depends on where it was named, so whoever knows can say it anew.

    Attributes:
        what: Which data set, and where it was looked for.
        remedy: What helps in any place, such as a package of the system; "" is nothing.
        is_fetched: Whether it can be downloaded.
    """

    def __init__(self, what: str, *, remedy: str = "", is_fetched: bool = False) -> None:
        self.what, self.remedy, self.is_fetched = what, remedy, is_fetched
        super().__init__(self.told(root="[data] root", download="--set data.download=true"))

    def told(self, *, root: str, download: str = "") -> str:
        """Return the message for a place.

        Args:
            root: How the folder is named there.
            download: How the download is allowed there; "" where it can't be.
        """
        ways = [self.remedy, f"name its folder: {root}"]
        if self.is_fetched and download:
            ways.append(f"allow the download: {download}")
        return f"{self.what}\n{'; or '.join(filter(None, ways))}"

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return _dataset_missing, (self.what, self.remedy, self.is_fetched)


def _dataset_missing(what: str, remedy: str, is_fetched: bool) -> DatasetMissingError:
    return DatasetMissingError(what, remedy=remedy, is_fetched=is_fetched)


class StrategyError(EdgelearnError):
    """A client strategy broke its contract."""


class DivergenceError(EdgelearnError):
    """A loss or an update is not finite."""


class EgressError(EdgelearnError):
    """Something that is not declared was about to leave a device; it was not sent."""


class StateError(EdgelearnError):
    """Stored state (device store, checkpoint, record) is missing or damaged."""


class RunError(EdgelearnError):
    """A run cannot go on."""


class ExtraMissingError(EdgelearnError):
    """An optional dependency is not installed."""

    def __init__(self, *, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}: pip install 'edgelearn[{extra}]'"
        )
        self.package, self.extra, self.needed_for = package, extra, needed_for

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return _extra_missing, (self.package, self.extra, self.needed_for)


def _extra_missing(package: str, extra: str, needed_for: str) -> ExtraMissingError:
    return ExtraMissingError(package=package, extra=extra, needed_for=needed_for)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a scenario."""

    table: str
    key: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"[{self.table}] {self.key}".strip() if self.table else self.key
        at = f"line {self.line}: " if self.line is not None else ""
        return f"{at}{where}: {self.message}"


class ScenarioError(EdgelearnError):
    """A scenario has faults; `faults` holds all of them, not only the first."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(faults)
        count = f"{len(faults)} fault" + ("" if len(faults) == 1 else "s")
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, faults)]))

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return type(self), (self.source, self.faults)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed name, or an empty string.

    Example:
        >>> nearest("replya", ["naive", "replay", "ewc"])
        " (did you mean 'replay'?)"
        >>> nearest("zzz", ["naive"])
        ''
    """
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
