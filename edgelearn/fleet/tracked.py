"""Ranges of a cohort that was trained in one go: each device looks at what it has learned."""

from __future__ import annotations

from torch import Tensor

from edgelearn.device.fleet_store import UNWRITTEN, RecordFile
from edgelearn.device.runtimes import RANGES
from edgelearn.device.state import DeviceState
from edgelearn.device.tracking import Trackers
from edgelearn.fleet.jobs import CohortDone, CohortFit, Integers
from edgelearn.scenario.world import World


def track(
    trackers: Trackers,
    cohort: CohortFit,
    params: Tensor,
    updates: Tensor,
    rows: Integers,
    world: World,
    memories: RecordFile,
    done: CohortDone,
) -> dict[int, dict[str, Tensor]]:
    """Return what is new in the memories of devices whose ranges have widened, by index.

    One device after another: no two have the same weights.

    Args:
        trackers: Look at them.
        cohort: Devices that have trained [k].
        params: Global parameters [P].
        updates: What they made of them [k, P]; zeros for a device that fails here.
        rows: Their rows in the whole cohort [k].
        world: The scenario's world.
        memories: What the devices remember.
        done: Of the whole cohort; takes failures.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for index, row in enumerate(rows.tolist()):
        device, slot = int(cohort.devices[index]), int(cohort.read_slots[index])
        if slot == UNWRITTEN or row in done.errors:  # without a memory, nothing was observed yet
            continue
        try:
            memory = memories.read(device, slot, world.train)
            state = DeviceState(memory, cohort.position + 1, int(cohort.consolidated[index]))
            samples = world.train_samples(device, cohort.position, server_round=cohort.server_round)
            new = trackers.after(device, state, params, updates[index], samples).memory
        except Exception as error:
            done.fail(row, device, error)
            updates[index] = 0
            continue
        if new is not memory:
            found[index] = {RANGES: new[RANGES]}
    return found
