from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MADE_UP = Path(__file__).with_name("made_up.py")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where each call of a row leaves a line."""
    return tmp_path / "calls.txt"


@pytest.fixture
def make_table(tmp_path: Path, log: Path) -> Callable[..., str]:
    """Write a table file of values; return its reference."""

    def make(*values: float) -> str:
        path = tmp_path / "tables.py"
        lines = [MADE_UP.read_text(), f"TABLE = table(Path({str(log)!r}), *{values!r})\n"]
        path.write_text("\n".join(lines))
        return f"{path}:TABLE"

    return make
