"""What the devices of a fleet serve with, and the activation ranges that they keep for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.errors import Fault, RunError, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import Runtime, make_runtime
from edgelearn.runtime.ranges import COLUMNS, Kept, Places
from edgelearn.scenario.kinds import BASE, Kind
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import World

# Names in the memory of a device that keeps ranges: `Kept.table` and `Kept.num_observed`.
RANGES, NUM_OBSERVED = "kept-ranges", "kept-ranges-observed"


def runtime_of(scenario: Scenario, kind: Kind) -> Runtime:
    """Build the runtime that devices of a kind serve with.

    Raises:
        PluginError: If its name leads nowhere.
        ScenarioError: If it does not take the arguments; it says in which table they stand.
    """
    name = scenario.runtime.name
    try:
        return make_runtime(name, kind.runtime_args)
    except ScenarioError as error:
        if kind.runtime_args == scenario.runtime.args:
            raise
        make_runtime(name, scenario.runtime.args)  # tells of what is wrong in these already
        table, kinds = "fleet.runtime_args", kind.name
        faults = [
            Fault(table, kinds, f.message if f.table == "runtime" else f"{f.key}: {f.message}")
            for f in error.faults
        ]
        raise ScenarioError(scenario.name, faults) from error


def answer_faults(world: World, kind: Kind, model: FlatModel, runtime: Runtime) -> Iterator[Fault]:
    """Yield why a network can't answer a sample, or can't be served by the runtime."""
    x = Samples(world.train, torch.zeros(1, dtype=torch.int32)).batch().x
    model.module.eval()
    with torch.no_grad():
        try:
            model.module(x)
        except (RuntimeError, ValueError, TypeError) as error:
            shape = tuple(world.sample_shape)
            yield Fault(*network_place(kind), f"the network can't take samples {shape}: {error}")
            return
        try:
            runtime.prepare(model, model.initial()).calibrated(x)
        except RunError as error:
            name = world.scenario.runtime.name
            yield Fault("runtime", "name", f"{name!r} can't serve the network{_of(kind)}: {error}")


def network_place(kind: Kind) -> tuple[str, str]:
    """Return where the network of a kind of device is named: table and key."""
    table = "model" if kind.variant == BASE else f"model.variants.{kind.variant}"
    return table, "name"


def _of(kind: Kind) -> str:
    return "" if kind.variant == BASE else f" of [model.variants.{kind.variant}]"


# -- ranges ----------------------------------------------------------------------------------------


def places_of(world: World, runtime: Runtime, model: FlatModel) -> Places | None:
    """Return where a device keeps ranges; None if it keeps none."""
    if not world.scenario.runtime.keeps_ranges:
        return None
    places = Places.of(runtime, model, world.sample_shape)
    return places if places.names else None


def num_ranges(world: World, model: FlatModel, network: tuple[str, float]) -> int:
    """Return how many ranges devices with a network keep: the most that any kind of them needs.

    Args:
        world: The scenario's world.
        model: The network.
        network: Variant and width.

    Raises:
        ScenarioError: If it can't answer a sample, or can't be served.
    """
    if not world.scenario.runtime.keeps_ranges:
        return 0
    kinds = (kind for kind in world.kinds.kinds if kind.network == network)
    return max((_num_ranges(world, model, kind) for kind in kinds), default=0)


def _num_ranges(world: World, model: FlatModel, kind: Kind) -> int:
    runtime = runtime_of(world.scenario, kind)
    try:
        places = places_of(world, runtime, model)
    except (RunError, RuntimeError, ValueError, TypeError) as error:
        if faults := list(answer_faults(world, kind, model, runtime)):
            raise ScenarioError(world.scenario.name, faults) from error
        raise
    return 0 if places is None else len(places.names)


def declaration(count: int) -> Declaration:
    """Return what a device with so many ranges has in its memory for them."""
    if not count:
        return {}
    return {RANGES: TensorSpec((count, COLUMNS)), NUM_OBSERVED: TensorSpec((1,), torch.int64)}


def kept_in(memory: Memory, places: Places | None) -> Kept | None:
    """Return the ranges that a device keeps; None if it keeps none."""
    if places is None:
        return None
    return Kept(places, memory[RANGES], int(memory[NUM_OBSERVED]))


def remembered(memory: Memory, kept: Kept) -> Memory:
    """Return a memory with other ranges."""
    count = torch.tensor([kept.num_observed])
    return memory.replace(**{RANGES: kept.table, NUM_OBSERVED: count})
