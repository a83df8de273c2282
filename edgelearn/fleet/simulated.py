"""A simulated fleet as the round loop sees it: a grid, who can be reached, durable state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.compress.submodel import Holdings
from edgelearn.device.fleet_store import FleetStore, Tables
from edgelearn.device.profile import Profile
from edgelearn.errors import RunError
from edgelearn.federated.by_cohort import Asked, CohortUpdates, Failures
from edgelearn.fleet.cohort import CohortExecutor
from edgelearn.fleet.grid import FleetGrid
from edgelearn.fleet.jobs import Engine, Phase
from edgelearn.params import Layout
from edgelearn.scenario.world import World
from edgelearn.seeds import numpy_generator

from flwr.app import Message  # isort: skip
from flwr.serverapp import Grid  # isort: skip

_MAX_WAITS = 1000
_WAIT_S = 60.0


class SimulatedFleet:
    """The fleet as the round loop sees it: a grid, who can be reached, and durable state."""

    def __init__(
        self,
        world: World,
        engine: Engine,
        store: FleetStore,
        profiles: Sequence[Profile],
        layout: Layout,
        *,
        flops_per_sample: NDArray[np.float64],
        holdings: Holdings,
    ) -> None:
        self._scenario, self._store, self._engine = world.scenario, store, engine
        self._stream, self._presence = world.stream, world.presence
        self._availability = np.array([profile.availability for profile in profiles])
        never_away = bool((self._availability >= 1).all())
        self._is_always_there = never_away and self._presence is None
        self._executor = executor = CohortExecutor(
            world,
            engine,
            store,
            profiles,
            layout,
            flops_per_sample=flops_per_sample,
            holdings=holdings,
        )
        self.grid = FleetGrid(executor, num_devices=len(profiles), seed=world.scenario.seed)

    @property
    def clock_s(self) -> float:
        """Virtual time."""
        return self.grid.clock_s

    @property
    def energy_j(self) -> float:
        """Modelled energy of all devices since the round began."""
        return self._executor.energy_j

    def roster(self) -> Mapping[int, int]:
        """Return node id -> device, for the devices that can be reached now."""
        return {device + 1: device for device in self.grid.available}

    def begin_round(self, server_round: int, *, min_devices: int) -> None:
        """Draw who can be reached; while they are too few, let virtual time pass.

        Raises:
            RunError: If they stay too few.
        """
        self._executor.energy_j = 0.0
        if self._is_always_there and min_devices <= len(self._availability):
            return
        chance = self._availability
        if self._presence is not None:
            chance = chance * self._presence.at(self._stream.position(max(server_round, 1)))
        for attempt in range(_MAX_WAITS):
            generator = numpy_generator(self._scenario.seed, "availability", server_round, attempt)
            reachable = generator.random(len(chance)) < chance
            if reachable.sum() >= min_devices:
                self.grid.available = np.flatnonzero(reachable).tolist()
                return
            self.grid.clock_s += _WAIT_S
        raise RunError(
            f"round {server_round}: {min_devices} devices are needed but only about "
            f"{chance.sum():.0f} of {len(chance)} can be reached at a time"
        )

    def collect(self, grid: Grid, message_ids: Sequence[str]) -> Iterable[Message]:  # noqa: ARG002
        """Let virtual time pass until the replies are here."""
        self.grid.advance(message_ids)
        return self.grid.pull_messages(message_ids)

    # -- asked as one ------------------------------------------------------------------------------

    def reachable(self) -> NDArray[np.int64]:
        """Return the devices that can be reached now."""
        return np.array([*self.grid.available], np.int64)

    def fit(self, asked: Asked) -> Iterator[CohortUpdates]:
        """Let devices train in waves; then virtual time has passed."""
        longest = 0.0
        for found, seconds in self._executor.fit(asked):
            yield found
            longest = max(longest, seconds)
        self.grid.pass_time(longest)

    def consolidate(self, asked: Asked) -> Failures:
        """Let devices consolidate, and virtual time pass."""
        _, failures, seconds = self._executor.ask(asked, Phase.CONSOLIDATE)
        self.grid.pass_time(seconds)
        return failures

    def evaluate(self, asked: Asked) -> tuple[Sequence[Mapping[str, Any]], Failures]:
        """Let devices evaluate, and virtual time pass."""
        metrics, failures, seconds = self._executor.ask(asked, Phase.EVALUATE)
        self.grid.pass_time(seconds)
        return metrics, failures

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return the weighted sum of updates, added up in the order of the cohort."""
        return self._engine.mean(updates, weights)

    # -- durable state -----------------------------------------------------------------------------

    def commit(self) -> Mapping[str, Tensor]:
        """Make the devices' new states durable; return the tables of the store."""
        live, checksums, progress = self._store.commit()
        return {
            "fleet.live": torch.from_numpy(live),
            "fleet.checksums": torch.from_numpy(checksums.astype(np.int64)),
            "fleet.progress": torch.from_numpy(progress),
        }

    def restore(self, tensors: Mapping[str, Tensor], clock_s: float) -> None:  # noqa: ARG002
        """Set the clock; the store was opened with its tables."""
        self.grid.clock_s = clock_s


def tables_of(tensors: Mapping[str, Tensor]) -> Tables:
    """Return the tables of the store from what `SimulatedFleet.commit` returned."""
    return Tables(
        tensors["fleet.live"].numpy(),
        tensors["fleet.checksums"].numpy().astype(np.uint32),
        tensors["fleet.progress"].numpy(),
    )
