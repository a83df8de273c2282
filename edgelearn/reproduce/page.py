"""The page of reproductions: one section for each table, written without touching the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelearn.files import write_atomic
from edgelearn.reproduce.results import Results
from edgelearn.reproduce.table import Row, Table, Verdict, judge, write_number
from edgelearn.significance import Estimate

INTRO = """# Reproduction

Published and reference numbers, run again with edgelearn. Each section is written by `edgelearn
reproduce TABLE` from the results in `results/`, which hold every seed with its versions; `--render`
writes it again without running anything. Ours is the mean over seeds ± the sample standard
deviation. A row is *reproduced* if that mean lies within the tolerance that the table states.
"""


def section(table: Table, results: Results, *, rows: Sequence[Row] | None = None) -> str:
    """Return the section of a table as Markdown."""
    rows = table.rows if rows is None else rows
    entries = [entry for row in table.rows for entry in results.of(row, {}).values()]
    lines = [f"## {table.title}", "", table.about, "", f"Hyperparameters: {table.rule}", ""]
    lines += _provenance(table, entries)
    lines += [
        f"| method | setting | ours ({table.unit}) | n | reference | tolerance | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        found = results.estimate(row, {})
        verdict = judge(row, found, digits=table.digits)
        lines.append(_line(table, row, found, verdict))
        if row.note:
            notes.setdefault(row.note, []).append(_name(row))
        if verdict.is_reproduced is False:
            reasons.setdefault(row.reason or "not known", []).append(_name(row))
    counted = [judge(row, results.estimate(row, {})).is_reproduced for row in rows]
    summary = f"{counted.count(True)} reproduced, {counted.count(False)} not"
    lines += ["", f"{summary}, {counted.count(None)} without a verdict.", ""]
    lines += [f"- Not as in the source: {text} ({'; '.join(who)})." for text, who in notes.items()]
    lines += [
        f"- Not reproduced, likely reason: {text} ({'; '.join(who)})."
        for text, who in reasons.items()
    ]
    return "\n".join(lines) + "\n"


def write(page: Path, table: Table, results: Results) -> None:
    """Write a table's section into the page: in its old place, or at the end."""
    begin, end = _marks(table.name)
    text = page.read_text(encoding="utf-8") if page.is_file() else INTRO
    block = f"{begin}\n{section(table, results)}{end}"
    before, is_there, rest = text.partition(begin)
    if is_there:
        _, _, after = rest.partition(end)
        text = before + block + after
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    write_atomic(page, text.encode())


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- table: {name} -->", f"<!-- end of table: {name} -->"


def _provenance(table: Table, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return [f"Not run yet: `edgelearn reproduce {table.name}`.", ""]
    seeds = sorted({int(entry["seed"]) for entry in entries})
    made = list(dict.fromkeys(_made_with(entry["made_with"]) for entry in entries))
    minutes = sum(entry["cpu_s"] for entry in entries) / 60
    count = max(seeds) + 1
    command = f"edgelearn reproduce {table.name} --seeds {count}"
    which = ", ".join(map(str, seeds))
    return [
        f"Command: `{command}` (seeds {which}; {minutes:.0f} min of one core in all).",
        f"Made with: {'; '.join(made)}.",
        "",
    ]


def _made_with(made: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in made.items() if name != "machine")
    return f"{versions} ({made['machine']})"


def _line(table: Table, row: Row, found: Estimate, verdict: Verdict) -> str:
    digits = table.digits
    ours = write_number(found, digits=digits)
    reference = "-" if row.reference is None else f"{row.reference:.{digits}f}"
    reference = row.published or f"{row.bound} {reference}".strip()
    if row.source:
        reference += f" ({row.source})"
    tolerance = "-" if row.tolerance is None else f"±{row.tolerance:g}"
    cells = [row.method, row.setting, ours, str(found.n), reference, tolerance, verdict.text]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _name(row: Row) -> str:
    return f"{row.method}, {row.setting}"
