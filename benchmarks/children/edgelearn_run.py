"""One run of edgelearn, timed by round: `edgelearn run` without its display and report."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

from clock import Clock, argument, figures, finish

import edgelearn
from edgelearn.federated.record import read_lines
from edgelearn.scenario.load import load


class Enough(Exception):  # noqa: N818 - not an error
    """Ends a run whose rounds have been counted."""


def main() -> None:
    asked = argument()
    scenario = load(asked["scenario"], asked.get("overrides"))
    clock = Clock(
        skip=asked.get("skip", 1),
        budget_s=asked["budget_s"],
        min_rounds=asked["min_rounds"],
    )
    used = 0.0

    def on_round(_progress: object) -> None:
        nonlocal used
        if clock.round_done():
            used = clock.cpu_s()
            raise Enough

    options: dict[str, Any] = {"engine": asked["engine"], "on_round": on_round}
    if "federation" in inspect.signature(edgelearn.simulate).parameters:
        options["federation"] = asked["federation"]
    elif asked["federation"] != "faithful":
        raise SystemExit(f"this edgelearn can't federate {asked['federation']}")
    if asked.get("num_workers"):
        options["num_workers"] = asked["num_workers"]
    with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
        out = Path(folder) / "run"
        clock.start()
        try:
            edgelearn.simulate(scenario, out=out, **options)
        except Enough:
            pass
        else:
            used = clock.cpu_s()
        lines = read_lines(out / "record.jsonl")
        state = out / "devices.bin"
        state_mib = state.stat().st_blocks * 512 / 2**20 if state.is_file() else 0.0
    rounds = [line for line in lines if line["kind"] == "round"]
    report(asked, clock, used, lines[0], rounds, state_mib)


def report(
    asked: dict[str, Any],
    clock: Clock,
    used: float,
    head: dict[str, Any],
    rounds: list[dict[str, Any]],
    state_mib: float,
) -> None:
    """Hand the figures to the parent; samples come from the record's own cohorts."""
    counted = rounds[clock.skip : clock.skip + len(clock.walls)]
    sizes, given = asked["sizes"], asked.get("cohorts")
    samples = [sum(sizes[d] for d in line["cohort"]) for line in counted]
    cohort = len(counted[0]["cohort"])
    found = figures(
        clock, used, samples, cohort, sum(sizes) / len(sizes), asked["flops_per_sample"]
    )
    failed = sum(n for r in rounds for k, n in r["outcomes"].items() if k not in ("ok", "idle"))
    if failed:
        raise SystemExit(f"{failed} devices failed: {rounds[-1]['problems'][:1]}")
    if given is not None:
        pairs = zip(rounds, given, strict=False)
        found["same_cohorts"] = all(sorted(r["cohort"]) == sorted(g) for r, g in pairs)
    finish(
        {
            **found,
            "first_loss": rounds[0]["loss"],
            "engine": head["engine"],
            "state_mib": state_mib,
        }
    )


if __name__ == "__main__":
    main()
