"""The public functions, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgelearn.errors import DatasetMissingError, Fault, ScenarioError
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.prepare import prepare
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.load import load as load_file
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


def validate(scenario: Scenario) -> DatasetMissingError | None:
    """Build all that a run of a scenario would be built from, so that its faults show.

    Nothing is downloaded for it. Where the data is not on this machine, only what needs none is
    checked.

    Returns:
        Why the data could not be had; None if everything was checked.

    Raises:
        ScenarioError: With all faults, those that a run would be refused for.
        DatasetError: If the data is here and damaged, or less than the scenario asks for.
        ExtraMissingError: If a package is not installed that the scenario needs.
    """
    local = replace(scenario, data=replace(scenario.data, download=False))
    try:
        prepare(local)
    except DatasetMissingError as error:
        return error
    return None
