"""`edgelearn fit-check`: does a scenario's learning fit the devices, and what would make it fit?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgelearn.device.footprint import COMPONENTS, Needs, needs
from edgelearn.device.learner import make_learner
from edgelearn.device.profile import Profile, folder, load_profile
from edgelearn.device.runtimes import runtime_of
from edgelearn.device.training import decoded_at_once
from edgelearn.errors import Fault, ScenarioError
from edgelearn.report.formats import size
from edgelearn.scenario.kinds import Kind, kinds_with
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import ALL, ClientSpec, Scenario
from edgelearn.scenario.world import World, build

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Way:
    """A way of training, and what it needs.

    Attributes:
        changes: Keys of `[client]` that are set for it; none is the scenario as it is.
        needs: What a device needs.
    """

    changes: Mapping[str, Any]
    needs: Needs

    @property
    def text(self) -> str:
        """The changes as options of a command line."""
        return " ".join(f"--set client.{key}={_written(v)}" for key, v in self.changes.items())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a kind of device can do with a scenario.

    Attributes:
        profile: The profile.
        kind: What such a device holds and serves; of several networks the one that needs most.
        planned: What it needs with the scenario as it is.
        can_answer: Whether the served model fits.
        can_train: Whether training fits as the scenario has it.
        remedy: The first way of training that fits where that does not; None if none does.
        least_bytes: What training takes with the way that needs least, where none fits.
    """

    profile: Profile
    kind: Kind
    planned: Way
    can_answer: bool
    can_train: bool
    remedy: Way | None = None
    least_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether everything fits as it is."""
        return self.can_answer and self.can_train


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
        return max((verdict.planned for verdict in self.verdicts), key=_training_bytes)

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


def memory_bytes(profile: Profile) -> int:
    """Return the RAM that learning may use."""
    return int(profile.memory_mib * _MIB)


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
    known = _Known(scenario, overhead_bytes)
    return FitCheck(scenario.name, [_verdict(known, profile) for profile in profiles])


def _verdict(known: _Known, profile: Profile) -> Verdict:
    limit, scenario = memory_bytes(profile), known.scenario
    kinds = kinds_with(scenario, _reference(scenario, profile))
    plans = {place: known.way(kind, {}) for place, kind in enumerate(kinds)}
    most = max(plans, key=lambda place: _training_bytes(plans[place]))
    planned = plans[most]
    can_answer = all(way.needs.answering.total <= limit for way in plans.values())
    can_train = _training_bytes(planned) <= limit
    remedy = least = None
    if can_answer and not can_train:
        remedy = next((w for w in known.others(kinds) if _training_bytes(w) <= limit), None)
        if remedy is None:
            least = min(map(_training_bytes, (planned, *known.others(kinds))))
    return Verdict(profile, kinds[most], planned, can_answer, can_train, remedy, least)


def _reference(scenario: Scenario, profile: Profile) -> str:
    """Return how a scenario names a profile: by its name, or by the path of a file."""
    names = (name for name in scenario.fleet.profiles if Path(name).stem == profile.name)
    return next(names, profile.name)


def _training_bytes(way: Way) -> int:
    return way.needs.training.total


class _Known:
    """Ways of training a scenario; each is computed once, and only if it is asked for."""

    def __init__(self, scenario: Scenario, overhead_bytes: int) -> None:
        self.scenario, self._overhead_bytes = scenario, overhead_bytes
        self._world = build(scenario)
        self._samples = _samples(self._world, scenario.client)
        self._ways: dict[str, Way | ScenarioError] = {}

    def way(self, kind: Kind, changes: Mapping[str, Any]) -> Way:
        """Return what devices of a kind need with some changes.

        Raises:
            ScenarioError: If the scenario can't be trained so.
        """
        key = repr((kind.network, dict(kind.runtime_args), dict(changes)))
        if key not in self._ways:
            try:
                self._ways[key] = self._computed(kind, changes)
            except ScenarioError as error:
                self._ways[key] = error
        found = self._ways[key]
        if isinstance(found, ScenarioError):
            raise found
        return found

    def others(self, kinds: Sequence[Kind]) -> Iterator[Way]:
        """Yield what is possible beside the plan, from what costs least.

        Each is that of those kinds of devices that need most.
        """
        for changes in candidates(self.scenario.client):
            try:
                most = max((self.way(kind, changes) for kind in kinds), key=_training_bytes)
            except ScenarioError:  # the strategy or a network rules it out
                continue
            yield most

    def _computed(self, kind: Kind, changes: Mapping[str, Any]) -> Way:
        spec = replace(self.scenario.client, **changes)
        scenario = replace(self.scenario, client=spec)
        world = replace(self._world, scenario=scenario)
        found = needs(
            make_learner(world, variant=kind.variant, width=kind.width),
            runtime_of(scenario, kind),
            self._samples,
            overhead_bytes=self._overhead_bytes,
            proximal_mu=float(scenario.server.args.get("proximal_mu", 0.0)),
        )
        return Way(changes, found)


def candidates(spec: ClientSpec) -> Iterator[dict[str, Any]]:
    """Yield changes of `[client]` that need less memory, from what costs least.

    First those with the same result (within rounding): a batch in parts, which costs next to no
    time; blocks computed again, about a third more; both. Then those that train less: the last two
    layers, the last, biases; each alone, and with what has the same result.
    """
    sizes = [2**i for i in range(1, spec.batch_size.bit_length()) if 2**i < spec.batch_size]
    parts = [n for n in (*sizes, spec.batch_size) if n > spec.accumulate]
    most = {"accumulate": parts[-1]} if parts else {}
    again = {} if spec.checkpoint else {"checkpoint": True}
    same: list[dict[str, Any]] = [{"accumulate": n} for n in parts]
    same += [again, {**again, **most}]
    less = [{"train": train} for train in ("last:2", "last:1", "bias")] if spec.train == ALL else []
    yield from _distinct(
        [*same, *({**a, **b} for a in less for b in ({}, most, {**again, **most}))]
    )


def _distinct(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [x for i, x in enumerate(found) if x and x not in found[:i]]


def _samples(world: World, spec: ClientSpec) -> Samples:
    """Return samples of the device that has most, as many as are decoded at once."""
    devices = np.arange(world.scenario.fleet.num_devices)
    for position in range(world.stream.num_experiences):
        sizes = world.train_sizes(devices, position, server_round=None)
        if sizes.max():
            most = max(decoded_at_once(world.train, spec.batch_size), 1)
            samples = world.train_samples(int(sizes.argmax()), position)
            return Samples(samples.store, samples.ids[:most])
    fault = Fault("labels", "missing", "no device ever has a sample to train on")
    raise ScenarioError(world.scenario.name, [fault])


def fit_check(
    scenario: Scenario, profile: str | None, *, overhead_mib: float, as_json: bool
) -> bool:
    """Run the command; return whether everything fits.

    Args:
        scenario: What is learned, and how.
        profile: Name or path of a profile; None is all built-in ones.
        overhead_mib: What interpreter, libraries and system take.
        as_json: Whether JSON is printed instead of tables.
    """
    names = [profile] if profile else sorted(path.stem for path in folder().glob("*.toml"))
    profiles = [load_profile(name) for name in names]
    check = check_fit(scenario, profiles, overhead_bytes=int(overhead_mib * _MIB))
    if as_json:
        print(json.dumps(check.as_dict(), indent=1))
    else:
        show(check)
    return check.fits


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
    return answers, trains, f"{verdict.remedy.text} ({size(verdict.remedy.needs.training.total)})"


def _plain(found: Needs) -> dict[str, Any]:
    parts = {"step": found.step, "sending": found.sending, "answering": found.answering}
    return {n: {**footprint.parts, "total": footprint.total} for n, footprint in parts.items()}


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
