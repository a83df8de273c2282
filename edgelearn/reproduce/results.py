"""What was measured for a table: one JSON file, keyed by setting and seed, whole at any moment."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import edgelearn
from edgelearn.errors import RunError, StateError
from edgelearn.files import read_json, write_atomic
from edgelearn.reproduce.table import Row, digest
from edgelearn.significance import Estimate, estimate

Key = tuple[str, int]


@dataclass(slots=True)
class Results:
    """The outcomes of one table.

    Attributes:
        path: The file.
        entries: By fingerprint of the setting and seed, in the order in which they were measured.
    """

    path: Path
    entries: dict[Key, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Results:
        """Read a file, or begin with nothing.

        Raises:
            StateError: If the file is damaged.
        """
        if not path.exists():
            return cls(path)
        try:
            found = read_json(path)["results"]
            return cls(path, {(entry["digest"], int(entry["seed"])): entry for entry in found})
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{path}: not the results of a table: {error!r}") from error

    def add(
        self, setup: Mapping[str, Any], seed: int, numbers: Mapping[str, float], cpu_s: float
    ) -> None:
        """Keep an outcome, and write the file."""
        mark = digest(setup)
        plain = {name: float(v) if math.isfinite(v) else str(v) for name, v in numbers.items()}
        self.entries[mark, seed] = {
            "digest": mark,
            "seed": seed,
            **setup,
            "numbers": plain,
            "cpu_s": round(cpu_s, 1),
            "made_with": made_with(),
        }
        text = json.dumps({"results": list(self.entries.values())}, indent=1, allow_nan=False)
        write_atomic(self.path, f"{text}\n".encode())

    def has(self, setup: Mapping[str, Any], seed: int) -> bool:
        """Whether an outcome is there."""
        return (digest(setup), seed) in self.entries

    def of(self, row: Row, overrides: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Return a row's entries by seed, ascending."""
        mark = digest(row.setup(overrides))
        return {s: entry for (m, s), entry in sorted(self.entries.items()) if m == mark}

    def estimate(self, row: Row, overrides: Mapping[str, Any]) -> Estimate:
        """Return the mean of a row's number over its seeds; of a difference, over those of both.

        Raises:
            RunError: If the row's function does not return that number.
        """
        values = self._numbers(row, overrides)
        if (baseline := row.baseline) is not None:
            others = self._numbers(baseline, overrides)
            return estimate([values[seed] - others[seed] for seed in values if seed in others])
        return estimate(list(values.values()))

    def _numbers(self, row: Row, overrides: Mapping[str, Any]) -> dict[int, float]:
        """Return a row's number by seed."""
        values = {}
        for seed, entry in self.of(row, overrides).items():
            if row.metric not in entry["numbers"]:
                names = ", ".join(entry["numbers"])
                raise RunError(
                    f"{row.method}, {row.setting}, seed {seed}: no {row.metric!r} among {names}"
                )
            values[seed] = float(entry["numbers"][row.metric])
        return values


def made_with() -> dict[str, str]:
    """Return versions and machine."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "flwr", "numpy")}
    return {
        "edgelearn": edgelearn.__version__,
        "python": platform.python_version(),
        **versions,
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    return (name[1].strip() if name else platform.processor()) or "unknown processor"


def default_folder() -> Path:
    """Return the folder of the documentation beside a source checkout.

    Raises:
        RunError: If there is none, as in an installed package.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "docs").is_dir() and (root / "pyproject.toml").is_file():
        return root / "docs"
    raise RunError("there is no docs/ beside this installation; name a folder with --out DIR")
