"""A whole simulated run: world, engine, grid, round loop, run directory."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edgelearn.federated._flwr_compat as compat
from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.learner import Learner, make_learner
from edgelearn.device.profile import Profile, assign
from edgelearn.errors import Fault, RunError, ScenarioError
from edgelearn.federated import rundir
from edgelearn.federated.checkpoint import Checkpoint
from edgelearn.federated.journal import FileJournal, Journal, MemoryJournal
from edgelearn.federated.loop import Progress, RoundLoop
from edgelearn.federated.record import RunRecord
from edgelearn.federated.server import make_server_strategy
from edgelearn.fleet.cohort import CohortExecutor
from edgelearn.fleet.grid import FleetGrid
from edgelearn.fleet.jobs import Engine
from edgelearn.fleet.plan import Plan, make_plan
from edgelearn.fleet.pool import PoolEngine
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.params import Layout
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import World, build
from edgelearn.seeds import numpy_generator

from flwr.app import Message  # isort: skip
from flwr.serverapp import Grid  # isort: skip

OnRound = Callable[[Progress], None]
_MAX_WAITS = 1000
_WAIT_S = 60.0


def simulate(
    scenario: Scenario,
    *,
    out: str | Path | None = None,
    engine: str = "auto",
    num_workers: int | None = None,
    on_round: OnRound | None = None,
    checkpoint_every_s: float = 1.0,
) -> RunRecord:
    """Run a scenario on a simulated fleet.

    Args:
        scenario: What to run.
        out: Run directory to create; None keeps the record in memory only.
        engine: "auto", "reference" or "pool"; no effect on the result.
        num_workers: Worker processes; None lets the planner choose. No effect on the result.
        on_round: Called after every round.
        checkpoint_every_s: Least wall time between checkpoints; 0 makes one after every round.

    Returns:
        The record of the run.

    Raises:
        ScenarioError: If the scenario does not fit together.
        RunError: If the run can't go on, or `out` holds a run already.
    """
    options = _Options(engine, num_workers, on_round, checkpoint_every_s)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="edgelearn-") as scratch:
            return _run(scenario, MemoryJournal(), Path(scratch), options, None)[1]
    directory = Path(out)
    if directory.exists() and any(directory.iterdir()):
        raise RunError(f"{directory} is not empty; to go on with the run in it, resume it")
    world = build(scenario)  # before anything is written: faults leave nothing behind
    rundir.begin(directory, scenario)
    return _run_in(directory, scenario, world, options, None)


def resume(
    directory: str | Path,
    *,
    engine: str = "auto",
    num_workers: int | None = None,
    on_round: OnRound | None = None,
    checkpoint_every_s: float = 1.0,
) -> RunRecord:
    """Go on with a run that was interrupted; the result has the same bits as without.

    Raises:
        StateError: If something in the directory is missing or damaged; the file is named.
        RunError: If the run can't go on.
    """
    directory = Path(directory)
    scenario = rundir.scenario_of(directory)
    if (record := rundir.finished(directory)) is not None:
        return record
    options = _Options(engine, num_workers, on_round, checkpoint_every_s)
    checkpoint = FileJournal(directory).resume()
    return _run_in(directory, scenario, build(scenario), options, checkpoint)


class _Options:
    """How to run, without effect on the result."""

    def __init__(
        self,
        engine: str,
        num_workers: int | None,
        on_round: OnRound | None,
        checkpoint_every_s: float,
    ) -> None:
        self.engine = engine
        self.num_workers = num_workers
        self.on_round = on_round
        self.checkpoint_every_s = checkpoint_every_s


def _run_in(
    directory: Path,
    scenario: Scenario,
    world: World,
    options: _Options,
    checkpoint: Checkpoint | None,
) -> RunRecord:
    journal = FileJournal(directory)
    params, record = _run(scenario, journal, directory, options, checkpoint, world)
    rundir.write_model(directory, world.model().layout, params)
    return record


def _run(
    scenario: Scenario,
    journal: Journal,
    directory: Path,
    options: _Options,
    checkpoint: Checkpoint | None,
    world: World | None = None,
) -> tuple[Tensor, RunRecord]:
    started, cpu = time.perf_counter(), rundir.cpu_s()
    compat.quieten()
    world = world or build(scenario)
    learner = make_learner(world)
    strategy = make_server_strategy(scenario)
    profiles = assign(scenario.fleet.profiles, scenario.fleet.num_devices, scenario.seed)
    _check_budgets(learner, profiles, scenario)
    plan = make_plan(world, engine=options.engine, num_workers=options.num_workers)
    tables = None
    if checkpoint is not None:
        tables = _tables(checkpoint.tensors)
    store = FleetStore(
        directory / "devices.bin", learner.declaration, scenario.fleet.num_devices, tables
    )
    with _engine(world, store, plan) as engine:
        if checkpoint is None:
            journal.append(rundir.run_line(scenario, world, learner, engine_of(plan)))
        fleet = SimulatedFleet(world, engine, store, profiles, learner.model.layout, plan)
        loop = RoundLoop(
            scenario=scenario,
            stream=world.stream,
            layout=learner.model.layout,
            strategy=strategy,
            grid=fleet.grid,
            fleet=fleet,
            journal=journal,
            on_round=options.on_round,
            checkpoint_every_s=options.checkpoint_every_s,
        )
        params = loop.run(learner.model.initial(), checkpoint)
    wall_s, used_s = time.perf_counter() - started, rundir.cpu_s() - cpu
    journal.append(rundir.end_line(scenario, loop.totals(), wall_s=wall_s, cpu_s=used_s))
    return params, journal.record()


class SimulatedFleet:
    """The fleet as the round loop sees it: a grid, who can be reached, and durable state."""

    def __init__(
        self,
        world: World,
        engine: Engine,
        store: FleetStore,
        profiles: Sequence[Profile],
        layout: Layout,
        plan: Plan,
    ) -> None:
        self._scenario, self._store = world.scenario, store
        self._availability = np.array([profile.availability for profile in profiles])
        executor = CohortExecutor(
            world, engine, store, profiles, layout, flops_per_sample=plan.flops_per_sample
        )
        self.grid = FleetGrid(executor, num_devices=len(profiles), seed=world.scenario.seed)

    @property
    def clock_s(self) -> float:
        """Virtual time."""
        return self.grid.clock_s

    def roster(self) -> Mapping[int, int]:
        """Return node id -> device, for the devices that can be reached now."""
        return {device + 1: device for device in self.grid.available}

    def begin_round(self, server_round: int, *, min_devices: int) -> None:
        """Draw who can be reached; while they are too few, let virtual time pass.

        Raises:
            RunError: If they stay too few.
        """
        for attempt in range(_MAX_WAITS):
            generator = numpy_generator(self._scenario.seed, "availability", server_round, attempt)
            reachable = generator.random(len(self._availability)) < self._availability
            if reachable.sum() >= min_devices:
                self.grid.available = [int(d) for d in np.flatnonzero(reachable)]
                return
            self.grid.clock_s += _WAIT_S
        raise RunError(
            f"round {server_round}: {min_devices} devices are needed but only about "
            f"{self._availability.sum():.0f} of {len(self._availability)} can be reached at a time"
        )

    def collect(self, grid: Grid, message_ids: Sequence[str]) -> Iterable[Message]:  # noqa: ARG002
        """Let virtual time pass until the replies are here."""
        self.grid.advance(message_ids)
        return self.grid.pull_messages(message_ids)

    def commit(self) -> Mapping[str, Tensor]:
        """Make the devices' new states durable; return the tables of the store."""
        live, checksums = self._store.commit()
        return {
            "fleet.live": torch.from_numpy(live),
            "fleet.checksums": torch.from_numpy(checksums.astype(np.int64)),
        }

    def restore(self, tensors: Mapping[str, Tensor], clock_s: float) -> None:  # noqa: ARG002
        """Set the clock; the store was opened with its tables."""
        self.grid.clock_s = clock_s


def _tables(tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    live = tensors["fleet.live"].numpy()
    return live, tensors["fleet.checksums"].numpy().astype(np.uint32)


@contextlib.contextmanager
def _engine(world: World, store: FleetStore, plan: Plan) -> Iterator[Engine]:
    engine: Engine
    if plan.tier == "pool":
        engine = PoolEngine(
            world,
            store.path,
            num_workers=plan.num_workers,
            cohort=world.scenario.fleet.cohort,
        )
    else:
        engine = ReferenceEngine(world, store.path)
    try:
        yield engine
    finally:
        engine.close()


def engine_of(plan: Plan) -> dict[str, Any]:
    """Return the record's description of an engine."""
    return {"tier": plan.tier, "workers": plan.num_workers, "reason": plan.reason}


def _check_budgets(learner: Learner, profiles: Sequence[Profile], scenario: Scenario) -> None:
    """Refuse a scenario whose learning does not fit a device's memory."""
    # Parameters, gradients and the float copy in service; the strategy's memory; one batch.
    needed = 3 * 4 * learner.model.layout.size + learner.memory_bytes
    needed += scenario.client.batch_size * 4 * learner.facts.sample_bytes
    for profile in {p.name: p for p in profiles}.values():
        if needed > profile.memory_mib * 2**20:
            message = (
                f"learning needs {needed / 2**20:.1f} MiB (parameters, gradients, memory of "
                f"{scenario.client.strategy!r}), {profile.name} has {profile.memory_mib:g} MiB"
            )
            raise ScenarioError(scenario.name, [Fault("fleet.profiles", profile.name, message)])
