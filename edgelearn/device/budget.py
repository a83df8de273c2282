"""Does learning fit a device's memory, and what would make it fit?

`edgelearn fit-check` and the start of a run ask the same: what a device's own training code needs,
component by component (`device.footprint`). A run asks only where the answer is in doubt, since it
takes a few steps of training to find: a rough sum with a wide margin tells first (`at_most`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from edgelearn.continual.memory import SampleSpec
from edgelearn.device.counting import Count
from edgelearn.device.footprint import Needs, needs
from edgelearn.device.learner import Learner
from edgelearn.device.learners import FleetLearners, make_learner
from edgelearn.device.profile import Profile, load_profile
from edgelearn.device.runtimes import runtime_of
from edgelearn.device.training import decoded_at_once
from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.kinds import Kind
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import ALL, ClientSpec, Scenario
from edgelearn.scenario.world import World

_log = logging.getLogger(__name__)
_MIB = 2**20
# Times a rough sum, and times the samples that are kept; what is built in needs a half at most.
_MARGIN, _MARGIN_KEPT = 16, 4


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

    @property
    def training_bytes(self) -> int:
        """What training takes."""
        return self.needs.training.total


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


def memory_bytes(profile: Profile) -> int:
    """Return the RAM that learning may use."""
    return int(profile.memory_mib * _MIB)


@final
class Ways:
    """Ways of training a scenario; each is computed once, and only if it is asked for.

    Args:
        world: The scenario's world.
        overhead_bytes: What interpreter, libraries and system take of a device's memory.

    Raises:
        ScenarioError: If no device ever has a sample.
    """

    def __init__(self, world: World, *, overhead_bytes: int = 0) -> None:
        self._world, self._overhead_bytes = world, overhead_bytes
        self._samples = _samples(world)
        self._ways: dict[str, Way | ScenarioError] = {}

    def verdict(self, profile: Profile, kinds: Sequence[Kind]) -> Verdict:
        """Compare what a device needs with what it has.

        Args:
            profile: What it has.
            kinds: What it may hold and serve, at least one.

        Raises:
            ScenarioError: If the scenario can't be trained.
        """
        limit = memory_bytes(profile)
        plans = [self.way(kind, {}) for kind in kinds]
        most = max(range(len(kinds)), key=lambda place: plans[place].training_bytes)
        planned = plans[most]
        can_answer = all(way.needs.answering.total <= limit for way in plans)
        can_train = planned.training_bytes <= limit
        remedy = least = None
        if can_answer and not can_train:
            remedy = next((way for way in self.others(kinds) if way.training_bytes <= limit), None)
            if remedy is None:
                least = min(way.training_bytes for way in (planned, *self.others(kinds)))
        return Verdict(profile, kinds[most], planned, can_answer, can_train, remedy, least)

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
        for changes in candidates(self._world.scenario.client):
            try:
                most = max((self.way(kind, changes) for kind in kinds), key=_training_bytes)
            except ScenarioError:  # the strategy or a network rules it out
                continue
            yield most

    def _computed(self, kind: Kind, changes: Mapping[str, Any]) -> Way:
        spec = replace(self._world.scenario.client, **changes)
        scenario = replace(self._world.scenario, client=spec)
        world = replace(self._world, scenario=scenario)
        found = needs(
            make_learner(world, variant=kind.variant, width=kind.width),
            runtime_of(scenario, kind),
            self._samples,
            overhead_bytes=self._overhead_bytes,
            proximal_mu=_proximal_mu(scenario),
        )
        return Way(changes, found)


def _proximal_mu(scenario: Scenario) -> float:
    """Return FedProx's mu; a strategy of somebody's own may mean something else by the name."""
    mu = scenario.server.args.get("proximal_mu", 0.0)
    return float(mu) if isinstance(mu, int | float) else 0.0


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


def _samples(world: World) -> Samples:
    """Return samples of the device that has most, as many as are decoded at once."""
    devices = np.arange(world.scenario.fleet.num_devices)
    for position in range(world.stream.num_experiences):
        sizes = world.train_sizes(devices, position, server_round=None)
        if sizes.max():
            most = max(decoded_at_once(world.train, world.scenario.client.batch_size), 1)
            samples = world.train_samples(int(sizes.argmax()), position)
            return Samples(samples.store, samples.ids[:most])
    fault = Fault("labels", "missing", "no device ever has a sample to train on")
    raise ScenarioError(world.scenario.name, [fault])


# -- the budgets of a fleet ------------------------------------------------------------------------


def budget_faults(
    world: World, learners: FleetLearners, profiles: Sequence[Profile]
) -> Iterator[Fault]:
    """Yield a fault for each profile whose memory learning does not fit.

    A device is asked for what it holds itself, and each combination once.

    Args:
        world: The scenario's world.
        learners: How its devices learn.
        profiles: Of each device.
    """
    held: dict[tuple[str, float], tuple[Profile, dict[int, Kind]]] = {}
    places = world.kinds.places_of(len(profiles)).tolist()
    for place, profile in zip(places, profiles, strict=True):
        key = profile.name, profile.memory_mib  # files in two folders may have one name
        held.setdefault(key, (profile, {}))[1][place] = world.kinds.kinds[place]
    at_most_of: dict[tuple[str, float], int] = {}
    ways: Ways | None = None
    for profile, kinds in held.values():
        for kind in kinds.values():
            if kind.network not in at_most_of:
                at_most_of[kind.network] = at_most(learners.of_kind(kind), world.sample_shape)
        limit = memory_bytes(profile)
        if max(at_most_of[kind.network] for kind in kinds.values()) <= limit:
            continue
        try:
            ways = ways or Ways(world)
            verdict = ways.verdict(profile, tuple(kinds.values()))
            message = None if verdict.fits else _why_not(verdict)
        except Exception as error:
            # A strategy or network of somebody's own that can't be counted may still run; what it
            # does wrong is its devices' failure.
            reason = f"{type(error).__name__}: {error}"
            _log.warning("what learning takes on %s was not counted: %s", profile.name, reason)
            least = max(at_least(learners.of_kind(kind)) for kind in kinds.values())
            message = None if least <= limit else _why_not_even(least, profile)
        if message is not None:
            reference = reference_of(world.scenario, profile)
            see = f"see `edgelearn fit-check SCENARIO --profile {reference}`"
            yield Fault("fleet.profiles", reference, f"{message}; {see}")


def at_least(learner: Learner) -> int:
    """Return a lower bound of what learning takes.

    Parameters as they came, the device's copy and the network's own, and what the strategy
    remembers: no way of training does without.
    """
    return 3 * 4 * learner.model.layout.size + learner.memory_bytes


def at_most(learner: Learner, sample_shape: tuple[int, ...]) -> int:
    """Return what learning takes at most, without a step taken: a rough sum with a wide margin.

    The sum: the lower bound, and for each sample of a batch its input and all that a forward pass
    makes of it; of samples that the strategy keeps, which a step may take up all at once, the same
    with a margin of its own. There is room for derivatives, moments, a former network's answers and
    what the device serves. It is a rule of thumb: what hooks hold is not known before they run.
    """
    x, count = torch.zeros(1, *sample_shape), Count()
    learner.model.module.eval()
    with torch.no_grad(), count:
        learner.model.module(x)
    sample = x.nbytes + count.made
    specs = learner.declaration.values()
    num_kept = sum(spec.capacity for spec in specs if isinstance(spec, SampleSpec))
    rough = at_least(learner) + learner.spec.batch_size * sample
    return _MIB + _MARGIN * rough + _MARGIN_KEPT * num_kept * sample


def reference_of(scenario: Scenario, profile: Profile) -> str:
    """Return how a scenario names a profile: by its name, or by the path of a file."""
    named = [name for name in scenario.fleet.profiles if Path(name).stem == profile.name]
    if len(named) > 1:  # files in several folders
        named = [name for name in named if load_profile(name) == profile]
    return next(iter(named), profile.name)


def _why_not(verdict: Verdict) -> str:
    profile, needed = verdict.profile, verdict.planned.needs
    if verdict.can_answer:
        what, found, cure = "learning", needed.training, "no option of [client] makes it fit"
        if verdict.remedy is not None:
            cure = f"it fits with {verdict.remedy.text} ({_mib(verdict.remedy.training_bytes)})"
        elif verdict.least_bytes is not None:
            cure += f" ({_mib(verdict.least_bytes)} at least): a smaller network or buffer"
    else:
        what, found, cure = "answering", needed.answering, "a smaller network is needed"
    shares = {name: round(100 * part / found.total) for name, part in found.parts.items()}
    largest = sorted(filter(shares.get, shares), key=lambda name: -shares[name])
    parts = ", ".join(f"{name} {shares[name]} %" for name in largest)
    return (
        f"{what} needs {_mib(found.total)} ({parts}), {profile.name} has "
        f"{_mib(memory_bytes(profile))}; {cure}"
    )


def _why_not_even(least: int, profile: Profile) -> str:
    return (
        f"learning needs more than {_mib(least)} (parameters three times, and what the strategy "
        f"remembers), {profile.name} has {_mib(memory_bytes(profile))}"
    )


def _mib(num_bytes: int) -> str:
    mib = num_bytes / _MIB
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"


def _training_bytes(way: Way) -> int:
    return way.training_bytes


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
