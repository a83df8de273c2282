"""The public functions, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgelearn.compress.codec import make_codec
from edgelearn.continual.strategy import make_strategy
from edgelearn.device.drift import make_detector
from edgelearn.device.profile import assign
from edgelearn.device.runtimes import runtime_of
from edgelearn.errors import Fault, ScenarioError
from edgelearn.federated.record import RunRecord
from edgelearn.federated.server import make_server_strategy
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.kinds import kinds_of
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.load import load as load_file
from edgelearn.scenario.presence import presence
from edgelearn.scenario.spec import Scenario

__all__ = ["compare", "load", "simulate"]


def load(source: str | Path, **tables: Any) -> Scenario:
    """Load a scenario, replacing values.

    Args:
        source: Path of a TOML file, or name of a built-in scenario.
        **tables: Values by table, such as `client={"strategy": "ewc"}` or `seed=1`.

    Raises:
        ScenarioError: With all faults at once.

    Example:
        >>> load("split-digits", client={"lr": 0.1}, seed=3).client.lr
        0.1
    """
    overrides: dict[str, Any] = {}
    for table, value in tables.items():
        if isinstance(value, Mapping):
            overrides.update({f"{table}.{key}": v for key, v in value.items()})
        else:
            overrides[table] = value
    return load_file(source, overrides)


def with_client(scenario: Scenario, strategy: str) -> Scenario:
    """Return the scenario with another client strategy; its arguments apply to its own only.

    Raises:
        ScenarioError: If there is no such strategy.
    """
    if strategy == scenario.client.strategy:
        return scenario
    raw = scenario.as_dict()
    raw["client"] |= {"strategy": strategy, "args": {}}
    return from_dict(raw, source=scenario.name)


def compare(
    scenario: Scenario, *, clients: Sequence[str], num_seeds: int = 1, **options: Any
) -> dict[str, list[RunRecord]]:
    """Run a scenario with several client strategies and seeds.

    Args:
        scenario: What to run; its own seed is the first.
        clients: Client strategies.
        num_seeds: Runs per strategy, with consecutive seeds.
        **options: Passed on to `simulate`.

    Returns:
        Client strategy -> its records, one per seed.
    """
    if num_seeds < 1:
        fault = Fault("", "seeds", f"got {num_seeds}; at least 1 is needed")
        raise ScenarioError(scenario.name, [fault])
    plan = [(client, with_client(scenario, client)) for client in clients]
    return {
        client: [
            simulate(replace(variant, seed=scenario.seed + s), **options) for s in range(num_seeds)
        ]
        for client, variant in plan
    }


def _make_runtimes(scenario: Scenario) -> None:
    for kind in kinds_of(scenario).kinds:
        runtime_of(scenario, kind)


def check_plugins(scenario: Scenario) -> None:
    """Build every plug-in that a scenario names, so that faults in their arguments show.

    Raises:
        ScenarioError: With the faults of all plug-ins.
        PluginError: If a reference leads nowhere.
    """
    faults: list[Fault] = []
    for build in (
        lambda: make_strategy(scenario.client.strategy, scenario.client.args),
        lambda: make_server_strategy(scenario),
        lambda: _make_runtimes(scenario),
        lambda: make_codec(scenario.wire.codec, scenario.wire.args),
        lambda: assign(scenario.fleet.profiles, scenario.fleet.num_devices, scenario.seed),
        lambda: make_detector(scenario.stream.detector, scenario.stream.detector_args),
        lambda: presence(scenario.fleet, scenario.stream.num_experiences, scenario.seed),
    ):
        try:
            build()
        except ScenarioError as error:
            faults += error.faults
    if faults:
        raise ScenarioError(scenario.name, faults)
