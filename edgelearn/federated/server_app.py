"""The Flower ServerApp: edgelearn's round loop on a real SuperLink, with a run directory.

Run configuration (`flwr run -c`), beside `scenario` and `overrides` (see `client_app`):

- `out`: the run directory, an absolute path on the server's host; a run in it that was interrupted
  is resumed;
- `wait-s`: longest wait for the devices to come;
- `round-timeout-s`: longest wait for the replies of a phase.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import edgelearn.federated._flwr_compat  # noqa: F401 - before flwr
from edgelearn.device.learners import FleetLearners
from edgelearn.errors import RunError
from edgelearn.federated import rundir
from edgelearn.federated.by_message import ByMessage
from edgelearn.federated.checkpoint import Checkpoint
from edgelearn.federated.client_app import scenario_from
from edgelearn.federated.exchange import Run
from edgelearn.federated.journal import FileJournal
from edgelearn.federated.loop import Progress, RoundLoop
from edgelearn.federated.network import NetworkFleet
from edgelearn.federated.record import RunRecord
from edgelearn.federated.server import make_server_strategy, refuse_to_step
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build

from flwr.app import Context  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip

WAIT_S = 120.0
ROUND_TIMEOUT_S = 600.0

# Below Flower's logger, since that is what `flwr log` shows.
_log = logging.getLogger("flwr.edgelearn")


def server_app() -> ServerApp:
    """Make the app that runs in the middle. Flower wants it as a plain `app = ...` in a module."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        serve(
            grid,
            scenario_from(config),
            out=_directory(config),
            wait_s=_seconds(config, "wait-s", WAIT_S),
            round_timeout_s=_seconds(config, "round-timeout-s", ROUND_TIMEOUT_S),
            on_round=_log_progress,
        )

    return app


def serve(
    grid: Grid,
    scenario: Scenario,
    *,
    out: Path,
    wait_s: float = WAIT_S,
    round_timeout_s: float = ROUND_TIMEOUT_S,
    on_round: Callable[[Progress], None] | None = None,
) -> RunRecord:
    """Run a scenario on the nodes of a grid, or go on with the run in `out`.

    Args:
        grid: Flower's grid.
        scenario: What to run; the nodes must have the same.
        out: Run directory; new, or of an interrupted run of this scenario.
        wait_s: Longest wait for devices to come.
        round_timeout_s: Longest wait for the replies of a phase.
        on_round: Called after every round.

    Returns:
        The record of the run.

    Raises:
        RunError: If the run can't go on, or `out` holds something else.
        StateError: If something in `out` is damaged; the file is named.
    """
    _check_directory(out, scenario)
    world = build(scenario)
    learners, strategy = FleetLearners(world), make_server_strategy(scenario)
    learner, holdings = learners.whole, learners.holdings()
    refuse_to_step(strategy, learner.layout, scenario)
    with rundir.locked(out):  # nothing is written before the scenario has proved to be whole
        if (record := rundir.finished(out)) is not None:
            _log.info("the run in %s is complete", out)
            return record
        if not rundir.holds_a_run(out):
            rundir.begin(out, scenario)
        started, cpu = time.perf_counter(), rundir.cpu_s()
        journal = FileJournal(out)
        checkpoint = journal.resume()
        run = _name(journal, checkpoint)
        if checkpoint is None:
            engine = {
                "tier": "network",
                "workers": scenario.fleet.num_devices,
                "reason": "real devices behind a Flower SuperLink",
                "run": run,
            }
            journal.append(rundir.run_line(scenario, world, learners, engine))
        else:
            _log.info("resuming %s after round %d", out, checkpoint.server_round)
        fleet = NetworkFleet(
            grid, scenario, run=run, wait_s=wait_s, round_timeout_s=round_timeout_s
        )
        layout = learner.layout
        whole = Run(scenario, world.stream, layout, strategy, learner.codec, holdings)
        loop = RoundLoop(
            scenario=scenario,
            stream=world.stream,
            exchange=ByMessage(whole, fleet.grid, fleet),
            fleet=fleet,
            journal=journal,
            on_round=on_round,
            checkpoint_every_s=0.0,  # devices can repeat their last round, and no more
        )
        params = loop.run(learner.initial(), checkpoint)
        wall_s, used_s = time.perf_counter() - started, rundir.cpu_s() - cpu
        journal.append(rundir.end_line(scenario, loop, wall_s=wall_s, cpu_s=used_s))
        rundir.write_model(out, layout, params)
        return journal.record()


def _check_directory(out: Path, scenario: Scenario) -> None:
    if rundir.holds_a_run(out):
        held = rundir.scenario_of(out)
        if held.digest != scenario.digest:
            raise RunError(
                f"{out} holds a run of the scenario {held.name!r} ({held.digest}), not of "
                f"{scenario.name!r} ({scenario.digest}); name another directory"
            )
    elif out.exists() and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
        raise RunError(f"{out} is not empty and holds no run; name another directory")


def _name(journal: FileJournal, checkpoint: Checkpoint | None) -> str:
    """Return the name of the run: kept when it is resumed, and later ones sort after it."""
    if checkpoint is None:
        return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}"
    name = journal.record().run["engine"].get("run")
    if not isinstance(name, str):
        raise RunError(
            f"{journal.directory} holds a simulated run, whose devices are not the nodes of a "
            "SuperLink; name another directory"
        )
    return name


def _directory(config: Mapping[str, Any]) -> Path:
    out = config.get("out")
    if not isinstance(out, str) or not out or not Path(out).is_absolute():
        raise RunError(
            f"out is {out!r} in the run's configuration; expected the absolute path of the run "
            "directory on the server: flwr run -c 'out=\"/var/lib/edgelearn/runs/first\"'"
        )
    return Path(out)


def _seconds(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise RunError(f"{key} is {value!r} in the run's configuration; expected a number above 0")
    return float(value)


def _log_progress(progress: Progress) -> None:
    _log.info(
        "round %d/%d  experience %d  accuracy %.4f  %s",
        progress.server_round,
        progress.num_rounds,
        progress.position,
        progress.accuracy,
        ", ".join(f"{count} {name}" for name, count in progress.outcomes.items() if count),
    )
