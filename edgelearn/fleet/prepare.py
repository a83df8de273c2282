"""What a run is built from: each part checked before anything is done, all faults at once.

`edgelearn run` and `edgelearn validate` both begin here, so that one refuses what the other does,
with the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import edgelearn.federated._flwr_compat as compat
from edgelearn.compress.codec import make_codec
from edgelearn.compress.submodel import Holdings
from edgelearn.continual.strategy import make_strategy
from edgelearn.device.budget import budget_faults
from edgelearn.device.drift import make_detector
from edgelearn.device.learners import FleetLearners
from edgelearn.device.profile import Profile, assign, load_profile
from edgelearn.device.runtimes import answer_faults, network_place, runtime_of
from edgelearn.errors import DatasetError, Fault, PluginError, RunError, ScenarioError
from edgelearn.federated.server import make_server_strategy, refuse_to_step
from edgelearn.fleet.reference import one_thread
from edgelearn.scenario.kinds import kinds_of, names_of
from edgelearn.scenario.presence import presence
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import World, build

from flwr.serverapp.strategy import Strategy  # isort: skip

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a run is built from, whatever engine runs it.

    Attributes:
        world: The scenario made concrete.
        learners: How its devices learn, and what they serve with.
        holdings: Who holds which part of the global parameters.
        strategy: The server strategy.
        profiles: Of each device.
    """

    world: World
    learners: FleetLearners
    holdings: Holdings
    strategy: Strategy
    profiles: tuple[Profile, ...]


class _Faults:
    """Faults found so far."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    def add(self, faults: Iterable[Fault]) -> None:
        """Take note of faults, each once: kinds of devices have many in common."""
        self.found += [fault for fault in dict.fromkeys(faults) if fault not in self.found]

    def attempt(self, build: Callable[[], T], table: str, key: str) -> T | None:
        """Build something; None if that failed.

        Args:
            build: Builds it.
            table: Where it is named, for errors that do not say so.
            key: Likewise.
        """
        try:
            return build()
        except ScenarioError as error:
            self.add(error.faults)
        except (PluginError, RunError) as error:
            # Of what is built upon it, it is the same fault again.
            if all(fault.message != str(error) for fault in self.found):
                self.add([Fault(table, key, str(error))])
        return None


def prepare(scenario: Scenario) -> Parts:
    """Build the parts of a run.

    Raises:
        ScenarioError: If they do not fit together; with all faults that were found.
        DatasetError: If the data is missing or damaged, and what needs no data has no faults.
        ExtraMissingError: If a package is not installed that a part needs.
    """
    compat.quieten()
    faults = _Faults()
    server = _checked_alone(scenario, faults)
    try:
        world = faults.attempt(lambda: build(scenario), "data", "dataset")
    except DatasetError:
        if faults.found:
            raise ScenarioError(scenario.name, faults.found) from None
        raise
    if world is None:
        raise ScenarioError(scenario.name, faults.found)
    learners = FleetLearners(world)
    with one_thread():
        _check_learners(world, learners, server, faults)
        holdings = None if faults.found else faults.attempt(learners.holdings, "fleet", "width")
        if holdings is None or server is None:
            raise ScenarioError(scenario.name, faults.found)
        profiles = assign(scenario.fleet.profiles, scenario.fleet.num_devices, scenario.seed)
        faults.add(budget_faults(world, learners, profiles))
    if faults.found:
        raise ScenarioError(scenario.name, faults.found)
    return Parts(world, learners, holdings, server, profiles)


def _checked_alone(scenario: Scenario, faults: _Faults) -> Strategy | None:
    """Build every plug-in by itself; return the server strategy, if it could be built."""
    client, stream, wire, fleet = scenario.client, scenario.stream, scenario.wire, scenario.fleet
    faults.attempt(lambda: make_strategy(client.strategy, client.args), "client", "strategy")
    server = faults.attempt(lambda: make_server_strategy(scenario), "server", "strategy")
    for kind in kinds_of(scenario).kinds:
        faults.attempt(partial(runtime_of, scenario, kind), "runtime", "name")
    faults.attempt(lambda: make_codec(wire.codec, wire.args), "wire", "codec")
    for name in names_of(fleet.profiles):
        faults.add(_profile_faults(name))
    detector = partial(make_detector, stream.detector, stream.detector_args)
    faults.attempt(detector, "stream", "detector")
    there = partial(presence, fleet, stream.num_experiences, scenario.seed)
    faults.attempt(there, "fleet", "cohort")
    return server


def _profile_faults(reference: str) -> Iterator[Fault]:
    """Yield what is wrong with a profile; it may have a file of its own, which is then named."""
    try:
        load_profile(reference)
    except ScenarioError as error:
        for fault in error.faults:
            own = f"{error.source}: {fault.key}: {fault.message}"
            yield fault if fault.table else Fault("fleet.profiles", reference, own)


def _check_learners(
    world: World, learners: FleetLearners, server: Strategy | None, faults: _Faults
) -> None:
    """Build what each kind of device learns and serves with, and let it answer a sample."""
    whole = faults.attempt(lambda: learners.whole, "model", "name")
    if whole is not None and server is not None:
        refuse = partial(refuse_to_step, server, whole.layout, world.scenario)
        faults.attempt(refuse, "server", "strategy")
    for kind in world.kinds.kinds:
        learner = faults.attempt(partial(learners.of_kind, kind), *network_place(kind))
        runtime = faults.attempt(partial(learners.runtime, kind), "runtime", "name")
        if learner is not None and runtime is not None:
            faults.add(answer_faults(world, kind, learner.model, runtime))
        if learner is not None and learner.codec is not None:
            faults.attempt(partial(learner.codec.pieces, learner.layout), "wire", "codec")
