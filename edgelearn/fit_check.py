"""`edgelearn fit-check`: does a scenario's learning fit the devices, and what would make it fit?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgelearn.device.budget import Verdict, Way, Ways, memory_bytes, reference_of
from edgelearn.device.footprint import COMPONENTS, Needs
from edgelearn.device.profile import Profile, folder, load_profile
from edgelearn.report.formats import size
from edgelearn.scenario.kinds import kinds_with
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build


@dataclass(frozen=True, slots=True)
class FitCheck:
    """What was found.

    Attributes:
        scenario: Its name.
        verdicts: One for each profile, at least one.
    """

    scenario: str
    verdicts: Sequence[Verdict]

    @property
    def planned(self) -> Way:
        """The scenario as it is, on those devices that need most."""
        plans = [verdict.planned for verdict in self.verdicts]
        return max(plans, key=lambda way: way.training_bytes)

    @property
    def fits(self) -> bool:
        """Whether the scenario fits all of them as it is."""
        return all(verdict.fits for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "scenario": self.scenario,
            "fits": self.fits,
            "needs": _plain(self.planned.needs),
            "profiles": {
                verdict.profile.name: {
                    "memory_bytes": memory_bytes(verdict.profile),
                    "can_answer": verdict.can_answer,
                    "can_train": verdict.can_train,
                    "variant": verdict.kind.variant,
                    "width": verdict.kind.width,
                    "needs": _plain(verdict.planned.needs),
                    "least_bytes": verdict.least_bytes,
                    "remedy": None
                    if verdict.remedy is None
                    else {
                        "client": {k: _listed(v) for k, v in verdict.remedy.changes.items()},
                        "needs": _plain(verdict.remedy.needs),
                    },
                }
                for verdict in self.verdicts
            },
        }


def check_fit(
    scenario: Scenario, profiles: Sequence[Profile], *, overhead_bytes: int = 0
) -> FitCheck:
    """Compare what a scenario needs with what devices have.

    A device needs what the network takes that it holds: a sub-model, or a variant, where the
    scenario gives its profile one. Of variants that are dealt out it may get any.

    Args:
        scenario: What is learned, and how.
        profiles: Kinds of devices, at least one.
        overhead_bytes: What interpreter, libraries and system take of a device's memory.

    Raises:
        ScenarioError: If the scenario is faulty, or no device has samples to begin with.
    """
    ways = Ways(build(scenario), overhead_bytes=overhead_bytes)
    return FitCheck(
        scenario.name,
        [
            ways.verdict(profile, kinds_with(scenario, reference_of(scenario, profile)))
            for profile in profiles
        ],
    )


def profiles_of(reference: str | None) -> list[Profile]:
    """Return a profile by name or path, or all built-in ones.

    Raises:
        ScenarioError: If it is missing or has faults.
    """
    names = [reference] if reference else sorted(path.stem for path in folder().glob("*.toml"))
    return [load_profile(name) for name in names]


def print_check(check: FitCheck, *, as_json: bool) -> None:
    """Print what was found, as JSON or as tables."""
    if as_json:
        print(json.dumps(check.as_dict(), indent=1))
    else:
        show(check)


def show(check: FitCheck) -> None:
    """Print what was found as tables."""
    console = Console()
    held: dict[tuple[str, float], list[Verdict]] = {}
    for verdict in check.verdicts:
        held.setdefault(verdict.kind.network, []).append(verdict)
    for verdicts in held.values():
        names = ", ".join(verdict.profile.name for verdict in verdicts)
        whose = f"memory of a device: {names}" if len(held) > 1 else "memory of a device"
        console.print(_parts(f"{check.scenario}: {whose}", verdicts[0].planned.needs))
    fits = Table(title="training takes the larger of step and sending", title_justify="left")
    fits.add_column("profile")
    fits.add_column("has", justify="right", no_wrap=True)
    for column in ("answering", "training", "what would fit"):
        fits.add_column(column)
    for verdict in check.verdicts:
        has = size(memory_bytes(verdict.profile))
        fits.add_row(verdict.profile.name, has, *map(escape, _words(verdict)))
    console.print(fits)


def _parts(title: str, found: Needs) -> Table:
    columns = {"a step": found.step, "sending": found.sending, "answering": found.answering}
    parts = Table(title=escape(title), title_justify="left")
    parts.add_column("")
    for name in columns:
        parts.add_column(name, justify="right", no_wrap=True)
    for component in COMPONENTS:
        if any(component in footprint.parts for footprint in columns.values()):
            sizes = [footprint.parts.get(component) for footprint in columns.values()]
            parts.add_row(component, *("" if b is None else size(b) for b in sizes))
    parts.add_section()
    parts.add_row("sum", *(size(footprint.total) for footprint in columns.values()))
    return parts


def _words(verdict: Verdict) -> tuple[str, str, str]:
    answers = "fits" if verdict.can_answer else "does not fit"
    trains = "fits" if verdict.can_train else "does not fit"
    if verdict.fits:
        return answers, trains, ""
    if not verdict.can_answer:
        return answers, trains, "a smaller network"
    if verdict.remedy is None:
        least = size(verdict.least_bytes or 0)
        return answers, trains, f"no option ({least} at least); a smaller network or buffer"
    return answers, trains, f"{verdict.remedy.text} ({size(verdict.remedy.training_bytes)})"


def _plain(found: Needs) -> dict[str, Any]:
    parts = {"step": found.step, "sending": found.sending, "answering": found.answering}
    return {n: {**footprint.parts, "total": footprint.total} for n, footprint in parts.items()}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
