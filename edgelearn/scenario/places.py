"""Where faults of a scenario stand: the line of its file, or the option that replaced a value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgelearn.errors import Fault, ScenarioError

_PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_PATH = rf"{_PART}(?:\s*\.\s*{_PART})*"


@contextmanager
def located(path: Path, origins: Mapping[str, str]) -> Iterator[None]:
    """Say of faults that show after a scenario was loaded where they stand.

    Args:
        path: The scenario's file.
        origins: "table.key" -> the option that replaced its value, such as "--set client.lr".

    Raises:
        ScenarioError: With the lines; as it was, if it is about another file.
    """
    try:
        yield
    except ScenarioError as error:
        if not any(fault.table for fault in error.faults):
            raise
        faults = locate(error.faults, path.read_text(encoding="utf-8"), origins)
        raise ScenarioError(str(path), faults) from error


def locate(faults: Sequence[Fault], text: str, origins: Mapping[str, str]) -> list[Fault]:
    """Say for each fault which line of the file, or which option, it comes from.

    Args:
        faults: What was found.
        text: The file; "" where there is none.
        origins: As `located` takes them.
    """
    lines = lines_of(text)
    found = []
    for fault in faults:
        path = f"{fault.table}.{fault.key}".strip(".")
        # An option for the key or for what holds it; else for something in an unknown table.
        origin = next((o for o in origins if f"{path}.".startswith(f"{o}.")), None)
        if origin is None and path not in lines:
            origin = next((o for o in origins if o.startswith(f"{path}.")), None)
        if origin is not None:
            message = f"{fault.message} (from {origins[origin]})"
            found.append(dataclasses.replace(fault, message=message))
            continue
        while path and path not in lines:  # what is missing is reported at its table
            path = path.rpartition(".")[0]
        found.append(dataclasses.replace(fault, line=lines.get(path)))
    return found


def lines_of(text: str) -> dict[str, int]:
    """Return the line of each table and key of a TOML file, by dotted path; close enough.

    Example:
        >>> lines_of("[fleet.width]")
        {'fleet.width': 1, 'fleet': 1}
    """
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(rf"\s*\[\[?\s*({_PATH})\s*\]\]?\s*(?:#.*)?$", line):
            table = ".".join(_parts(match[1]))
            lines.setdefault(table, number)
        elif match := re.match(rf"\s*({_PATH})\s*=", line):
            parts = ([table] if table else []) + _parts(match[1])
            for count in range(1, len(parts) + 1):  # `args.lr = 1` is the line of `args` too
                lines.setdefault(".".join(parts[:count]), number)
    for path, number in list(lines.items()):  # a table that has only tables has their first line
        while path := path.rpartition(".")[0]:
            lines.setdefault(path, number)
    return lines


def _parts(path: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_PART, path)]
