"""What the devices of a fleet serve with, and the activation ranges that they keep for it."""

from __future__ import annotations

import torch

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.errors import Fault, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import Runtime, make_runtime
from edgelearn.runtime.ranges import COLUMNS, Kept, Places
from edgelearn.scenario.kinds import Kind
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
    """
    if not world.scenario.runtime.keeps_ranges:
        return 0
    kinds = (kind for kind in world.kinds.kinds if kind.network == network)
    found = [places_of(world, runtime_of(world.scenario, kind), model) for kind in kinds]
    return max((len(places.names) for places in found if places is not None), default=0)


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
