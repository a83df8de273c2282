"""The run directory, alike in simulation and on a network: scenario, record's ends, final model."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor

import edgelearn
from edgelearn.device.learners import FleetLearners
from edgelearn.errors import StateError
from edgelearn.federated.loop import RoundLoop
from edgelearn.federated.record import Line, RunRecord
from edgelearn.files import exclusive, read_checked, write_atomic
from edgelearn.params import Layout
from edgelearn.scenario.kinds import Kind
from edgelearn.scenario.load import load, to_toml
from edgelearn.scenario.spec import Scenario, plain
from edgelearn.scenario.world import World

_SCENARIO, _MODEL = "scenario.toml", "model.safetensors"
_LOCK_WAIT_S = 30.0


def locked(directory: Path) -> AbstractContextManager[None]:
    """Keep other processes out of a run directory, such as a server of a run that was stopped."""
    return exclusive(directory / ".lock", wait_s=_LOCK_WAIT_S)


def begin(directory: Path, scenario: Scenario) -> None:
    """Create a run directory and write the scenario into it, complete with defaults."""
    directory.mkdir(parents=True, exist_ok=True)
    text = f"# edgelearn {edgelearn.__version__}, digest {scenario.digest}\n{to_toml(scenario)}"
    write_atomic(directory / _SCENARIO, text.encode())


def holds_a_run(directory: Path) -> bool:
    """Whether a run began in a directory."""
    return (directory / _SCENARIO).is_file()


def scenario_of(directory: Path) -> Scenario:
    """Return the scenario of the run in a directory.

    Raises:
        StateError: If there is no run, or the scenario was changed since it began.
    """
    path = directory / _SCENARIO
    if not holds_a_run(directory):
        raise StateError(f"{path}: there is no run here")
    scenario = load(path)
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    if not first.endswith(f"digest {scenario.digest}"):
        raise StateError(
            f"{path}, or a plug-in file that it names, was changed since the run began "
            f"({first.lstrip('# ')}; "
            f"its digest is now {scenario.digest})"
        )
    return scenario


def finished(directory: Path) -> RunRecord | None:
    """Return the record of a run that has reached its end, else None."""
    if not ((directory / _MODEL).is_file() and (directory / "record.jsonl").is_file()):
        return None
    record = RunRecord.read(directory)
    return record if record.is_complete else None


def write_model(directory: Path, layout: Layout, params: Tensor) -> None:
    """Write the final global parameters [P] as named tensors."""
    tensors = {name: view.contiguous() for name, view in layout.views(params).items()}
    write_atomic(directory / _MODEL, save(tensors))


def read_model(directory: Path, layout: Layout) -> Tensor:
    """Return the final global parameters [P] of a run.

    Raises:
        StateError: If the run is not finished, or the file is damaged or of another network.
    """
    path = directory / _MODEL
    if not path.is_file():
        raise StateError(f"{path}: the file is missing; a run writes it when it is finished")
    try:
        return layout.flatten(load_tensors(read_checked(path)))
    except (SafetensorError, StateError) as error:
        raise StateError(f"{path}: damaged or of another network: {error}") from error


def run_line(
    scenario: Scenario, world: World, learners: FleetLearners, engine: Mapping[str, Any]
) -> Line:
    """Return the first line of a record.

    Its sizes are those of the network that the server holds; where devices keep theirs, of the one
    that takes most memory.
    """
    stream, learner, kinds = world.stream, learners.whole, world.kinds
    largest = max(kinds.kinds, key=lambda kind: learners.of_kind(kind).memory_bytes)
    one = kinds.kinds[0].runtime_args if len(kinds.kinds) == 1 else scenario.runtime.args
    shown = largest if learner.strategy.keeps_network else Kind("", runtime_args=one)
    orders = None if world.orders is None else world.orders.tolist()
    return {
        "kind": "run",
        "edgelearn": edgelearn.__version__,
        "scenario": scenario.name,
        "title": scenario.title,
        "digest": scenario.digest,
        "seed": scenario.seed,
        "versions": versions(),
        "num_devices": scenario.fleet.num_devices,
        "num_experiences": stream.num_experiences,
        "rounds_per_experience": scenario.stream.rounds_per_experience,
        "classes": [list(stream.classes(e)) for e in range(stream.num_experiences)],
        "orders": orders,
        "first_met": world.first_met.tolist() if world.is_uneven else None,
        "changes": world.changes() if learner.detector is not None else None,
        **_size(world, learners, shown),
        "memory_bytes_per_device": learners.of_kind(largest).memory_bytes,
        "kinds": [
            {
                "name": kind.name,
                "variant": kind.variant,
                "width": kind.width,
                "runtime_args": plain(kind.runtime_args),
                **_size(world, learners, kind),
            }
            for kind in kinds.kinds
        ],
        "kind_of": None if kinds.places is None else kinds.places.tolist(),
        "client": scenario.client.strategy,
        "server": scenario.server.strategy,
        "runtime": scenario.runtime.name,
        "engine": dict(engine),
    }


def _size(world: World, learners: FleetLearners, kind: Kind) -> Line:
    """Return what a kind's model and learning with it take."""
    learner = learners.of_kind(kind)
    model = learner.model
    model.module.eval()
    prepared = learners.runtime(kind).prepare(model, model.initial())
    return {
        "num_parameters": model.layout.num_network,
        "model_bytes": {
            "float": 4 * model.layout.num_network,
            "served": prepared.calibrated(torch.empty(0, *world.sample_shape)).model_bytes,
        },
        "memory_bytes_per_device": learner.memory_bytes,
    }


def end_line(scenario: Scenario, loop: RoundLoop, *, wall_s: float, cpu_s: float) -> Line:
    """Return the last line of a record."""
    up, down = loop.totals()
    return {
        "kind": "end",
        "rounds": scenario.num_rounds,
        "bytes_up": list(up),
        "bytes_down": list(down),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "updates_per_s": loop.updates_per_s,
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "flwr", "numpy")}
    return {"python": platform.python_version(), **found}


def cpu_s() -> float:
    """Return the processor seconds that this process and its ended children have used."""
    used = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        used += usage.ru_utime + usage.ru_stime
    return used
