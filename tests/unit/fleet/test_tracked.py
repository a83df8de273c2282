"""Ranges of a cohort trained in one go: a failure is its device's, not the cohort's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgelearn.device.fleet_store import UNWRITTEN, FleetStore
from edgelearn.device.learners import make_learner
from edgelearn.device.runtimes import RANGES
from edgelearn.device.state import DeviceState
from edgelearn.errors import StateError
from edgelearn.fleet.jobs import CohortDone, CohortFit
from edgelearn.fleet.tracked import track
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import build
from edgelearn.testing.toy import toy_scenario


class Stub:
    """Widens ranges of devices with even numbers to their number; device 3 breaks it."""

    def after(
        self, device: int, state: DeviceState, params: Tensor, update: Tensor, samples: Samples
    ) -> DeviceState:
        assert torch.equal(update, torch.full_like(update, device))
        assert len(samples)
        if device == 3:
            raise StateError("its network takes no such input")
        if device % 2:
            return state
        ranges = torch.full_like(state.memory[RANGES], device)
        return replace(state, memory=state.memory.replace(**{RANGES: ranges}))


def test_only_what_has_widened_is_new(tmp_path: Path) -> None:
    world = build(
        toy_scenario(fleet={"num_devices": 6, "cohort": 6}, runtime={"recalibrate": "tracked"})
    )
    learner = make_learner(world)
    store = FleetStore(tmp_path / "devices.bin", learner.declaration, 6)
    devices, zeros = np.array([4, 1, 3, 2, 0]), np.zeros(5, np.int64)
    memory = learner.initial_state(world.train).memory
    for device in (0, 1, 3, 4):
        store.file.write(device, 0, memory)
    slots = np.array([0, 0, 0, UNWRITTEN, 0])
    cohort = CohortFit(devices, 1, 0, zeros, zeros, slots, 1 - np.minimum(slots, 1), 1)
    done = CohortDone.empty(cohort)
    done.errors[4] = "it has failed already"
    size = learner.layout.size
    updates = torch.from_numpy(devices).float().view(-1, 1).repeat(1, size)
    rows = np.arange(5)
    found = track(
        Stub(),  # type: ignore[arg-type]
        cohort,
        torch.zeros(size),
        updates,
        rows,
        world,
        store.file,
        done,
    )
    assert list(found) == [0]
    assert torch.equal(found[0][RANGES], torch.full_like(memory[RANGES], 4))
    assert sorted(done.errors) == [2, 4]
    assert "StateError" in done.errors[2]
    assert not updates[2].any()
    assert updates[0].all()
