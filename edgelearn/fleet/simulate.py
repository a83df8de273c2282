"""A whole simulated run: world, engine, grid, round loop, run directory."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.device.fleet_store import FleetStore
from edgelearn.errors import RunError, nearest
from edgelearn.federated import rundir
from edgelearn.federated.by_cohort import AVERAGING, ByCohort, averages
from edgelearn.federated.by_message import ByMessage
from edgelearn.federated.checkpoint import Checkpoint
from edgelearn.federated.exchange import Exchange, Run
from edgelearn.federated.journal import FileJournal, Journal, MemoryJournal
from edgelearn.federated.loop import Progress, RoundLoop
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.engines import open_engine
from edgelearn.fleet.plan import Plan, forward_flops, make_plan
from edgelearn.fleet.prepare import Parts, prepare
from edgelearn.fleet.reference import one_thread
from edgelearn.fleet.simulated import SimulatedFleet, tables_of
from edgelearn.scenario.spec import FEDERATIONS, Scenario

from flwr.serverapp.strategy import Strategy  # isort: skip

OnRound = Callable[[Progress], None]


def simulate(
    scenario: Scenario,
    *,
    out: str | Path | None = None,
    engine: str = "auto",
    federation: str = "auto",
    num_workers: int | None = None,
    on_round: OnRound | None = None,
    checkpoint_every_s: float = 1.0,
) -> RunRecord:
    """Run a scenario on a simulated fleet.

    Args:
        scenario: What to run.
        out: Run directory to create; None keeps the record in memory only.
        engine: "auto" or one of `edgelearn.scenario.spec.ENGINES`; no effect on the result beyond
            rounding.
        federation: "faithful" sends a Flower message to each device, "fused" hands the server
            strategy one reply with the cohort's mean, "auto" takes the latter where the strategy
            does nothing but average; no effect on the result beyond rounding.
        num_workers: Worker processes; None lets the planner choose. No effect on the result.
        on_round: Called after every round.
        checkpoint_every_s: Least wall time between checkpoints; 0 makes one after every round.

    Returns:
        The record of the run.

    Raises:
        ScenarioError: If the scenario does not fit together.
        RunError: If the run can't go on, or `out` holds a run already.
    """
    options = _Options(engine, federation, num_workers, on_round, checkpoint_every_s)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="edgelearn-") as scratch:
            return _run(_prepare(scenario, options), MemoryJournal(), Path(scratch), None)[1]
    directory = Path(out)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunError(f"{directory} is not empty; to go on with the run in it, resume it")
    setup = _prepare(scenario, options)  # before anything is written: faults leave nothing behind
    directory.mkdir(parents=True, exist_ok=True)
    with rundir.locked(directory):
        rundir.begin(directory, scenario)
        return _run_in(directory, setup, None)


def resume(
    directory: str | Path,
    *,
    engine: str = "auto",
    federation: str = "auto",
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
    with rundir.locked(directory):
        journal = FileJournal(directory)
        checkpoint = journal.resume()
        if checkpoint is not None:  # go on as it began: other ways agree to rounding, no further
            began = journal.record().run["engine"]
            if engine == "auto":
                tier = began["tier"]
                engine = "pool" if tier == "reference" and (num_workers or 1) > 1 else tier
            if federation not in ("auto", began["federation"]):
                raise RunError(
                    f"{directory}: the run is federated {began['federation']}, and can't go on "
                    f"{federation}: the server strategy's state differs"
                )
            federation = began["federation"]
        options = _Options(engine, federation, num_workers, on_round, checkpoint_every_s)
        return _run_in(directory, _prepare(scenario, options), checkpoint)


@dataclass(frozen=True, slots=True)
class _Options:
    """How to run, without effect on the result."""

    engine: str
    federation: str
    num_workers: int | None
    on_round: OnRound | None
    checkpoint_every_s: float


@dataclass(frozen=True, slots=True)
class _Setup:
    """What is run, and how."""

    parts: Parts
    plan: Plan
    is_fused: bool
    options: _Options


def _prepare(scenario: Scenario, options: _Options) -> _Setup:
    parts = prepare(scenario)
    whole, asked = parts.learners.whole, options.engine
    plan = make_plan(parts.world, whole, engine=asked, num_workers=options.num_workers)
    return _Setup(parts, plan, _is_fused(parts.strategy, options.federation), options)


def _is_fused(strategy: Strategy, asked: str) -> bool:
    if asked not in FEDERATIONS:
        raise RunError(
            f"unknown federation {asked!r}{nearest(asked, FEDERATIONS)}; allowed: "
            f"{', '.join(FEDERATIONS)}"
        )
    if asked == "fused" and not averages(strategy):
        raise RunError(
            f"fused federation needs a server strategy that only averages "
            f"({', '.join(kind.__name__ for kind in AVERAGING)}), not {type(strategy).__name__}; "
            "use faithful"
        )
    return asked != "faithful" and averages(strategy)


def _run_in(directory: Path, setup: _Setup, checkpoint: Checkpoint | None) -> RunRecord:
    params, record = _run(setup, FileJournal(directory), directory, checkpoint)
    rundir.write_model(directory, setup.parts.learners.whole.layout, params)
    return record


def _run(
    setup: _Setup, journal: Journal, directory: Path, checkpoint: Checkpoint | None
) -> tuple[Tensor, RunRecord]:
    with one_thread():
        return _run_on_one_thread(setup, journal, directory, checkpoint)


def _run_on_one_thread(
    setup: _Setup, journal: Journal, directory: Path, checkpoint: Checkpoint | None
) -> tuple[Tensor, RunRecord]:
    started, cpu = time.perf_counter(), rundir.cpu_s()
    parts, plan = setup.parts, setup.plan
    world, learners = parts.world, parts.learners
    learner = learners.whole
    scenario = world.scenario
    store = FleetStore(
        directory / "devices.bin",
        learner.declaration,
        scenario.fleet.num_devices,
        None if checkpoint is None else tables_of(checkpoint.tensors),
        record_bytes=learners.record_bytes,
    )
    with contextlib.closing(open_engine(world, store.path, plan)) as engine:
        if checkpoint is None:
            journal.append(rundir.run_line(scenario, world, learners, _engine_line(setup)))
        fleet = SimulatedFleet(
            world,
            engine,
            store,
            parts.profiles,
            learner.layout,
            flops_per_sample=_flops(parts),
            holdings=parts.holdings,
        )
        whole = Run(
            scenario,
            world.stream,
            learner.layout,
            parts.strategy,
            learner.codec,
            parts.holdings,
        )
        exchange: Exchange = ByMessage(whole, fleet.grid, fleet)
        if setup.is_fused:
            exchange = ByCohort(whole, fleet)
        loop = RoundLoop(
            scenario=scenario,
            stream=world.stream,
            exchange=exchange,
            fleet=fleet,
            journal=journal,
            on_round=setup.options.on_round,
            checkpoint_every_s=setup.options.checkpoint_every_s,
        )
        params = loop.run(learner.initial(), checkpoint)
    wall_s, used_s = time.perf_counter() - started, rundir.cpu_s() - cpu
    journal.append(rundir.end_line(scenario, loop, wall_s=wall_s, cpu_s=used_s))
    return params, journal.record()


def _engine_line(setup: _Setup) -> dict[str, Any]:
    """Return the record's description of an engine."""
    plan = setup.plan
    return {
        "tier": plan.tier,
        "workers": plan.num_workers,
        "reason": plan.reason,
        "federation": "fused" if setup.is_fused else "faithful",
    }


def _flops(parts: Parts) -> NDArray[np.float64]:
    """Return the floating-point operations of a forward pass on each device [D]."""
    world, learners, kinds = parts.world, parts.learners, parts.world.kinds
    of_kind = [forward_flops(world, learners.of_kind(kind).model) for kind in kinds.kinds]
    return np.array(of_kind)[kinds.places_of(len(parts.profiles))]
