"""CPU time of a step by method and engine, in one process: methods take turns, pass by pass.

Devices hold what a consolidation would have left (a curvature above 0, an anchor, a path under
way), so that every penalty is at work. What a participation costs beside its steps drops out: the
cost of a step is the difference between two numbers of epochs.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import argument, finish

from edgelearn.continual.memory import Memory
from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.learners import make_learner
from edgelearn.fleet import batched, native
from edgelearn.fleet.batched import BatchedEngine
from edgelearn.fleet.jobs import CohortFit, Engine
from edgelearn.fleet.native import NativeEngine
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.scenario.load import load
from edgelearn.scenario.world import World, build

CURVATURES = ("fisher", "importance")


@dataclass(frozen=True)
class Way:
    """An engine, ready to train the same cohort again and again."""

    engine: Engine
    cohort: CohortFit
    params: torch.Tensor
    updates: torch.Tensor

    def cpu_s(self) -> tuple[float, int]:
        """Train the cohort; return CPU seconds of this process, and steps."""
        started = time.process_time()
        done = self.engine.fit(self.cohort, self.params, self.updates)
        used = time.process_time() - started
        if done.errors:
            raise SystemExit(f"training failed: {done.errors}")
        return used, int(done.num_steps.sum())


def make_engine(tier: str, world: World, path: Path) -> Engine | str:
    """Return an engine with one worker, or why there is none."""
    learner = make_learner(world)
    if tier == "reference":
        return ReferenceEngine(world, path)
    if tier == "batched":
        return batched.why_not(world, learner) or BatchedEngine(world, path)
    return native.why_not(world, learner) or NativeEngine(world, path, num_threads=1)


def make_way(asked: dict[str, Any], method: str, epochs: int, path: Path) -> Way | str:
    """Return what trains a cohort by a method, or why it can't be."""
    client = {"strategy": method, "args": asked["methods"][method], "epochs": epochs}
    overrides = {f"client.{key}": value for key, value in client.items()}
    world = build(load(asked["scenario"], {**asked["overrides"], **overrides}))
    learner, count = make_learner(world), world.scenario.fleet.num_devices
    store = FleetStore(path, learner.declaration, count)
    params, generator = learner.model.initial(), torch.Generator().manual_seed(0)
    memory = learner.initial_state(world.train).memory
    near = params[: learner.model.layout.num_trained]
    for name, value in memory.items():
        noise = torch.rand(value.shape, generator=generator)
        if name in CURVATURES:
            memory = memory.replace(**{name: 0.01 * noise})
        elif name == "anchor":
            memory = memory.replace(anchor=near + 0.01 * noise)
    for device in range(count):
        store.file.write(device, 0, Memory(dict(memory)))
    engine = make_engine(asked["tier"], world, path)
    if isinstance(engine, str):
        return engine
    devices = np.arange(world.scenario.fleet.cohort)
    begun, slots = np.ones_like(devices), np.zeros_like(devices)
    cohort = CohortFit(devices, 1, 0, begun, slots, slots, 1 - slots, 0)
    return Way(engine, cohort, params, torch.zeros(len(devices), len(params)))


def main() -> None:
    asked = argument()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-steps-") as folder:
        ways: dict[tuple[str, int], Way] = {}
        for method in asked["methods"]:
            for epochs in asked["epochs"]:
                path = Path(folder) / f"{method}-{epochs}.bin"
                way = make_way(asked, method, epochs, path)
                if isinstance(way, str):
                    finish({"error": way})
                    return
                ways[method, epochs] = way
                way.cpu_s()
        turns: list[dict[str, float]] = []
        low, high = asked["epochs"]
        for turn in range(asked["turns"]):
            order = list(ways) if turn % 2 == 0 else list(reversed(ways))
            found = {key: ways[key].cpu_s() for key in order}
            step_us: dict[str, float] = {}
            for method in asked["methods"]:
                (least, few), (most, many) = found[method, low], found[method, high]
                step_us[method] = 1e6 * (most - least) / (many - few)
            turns.append(step_us)
        for way in ways.values():
            with closing(way.engine):
                pass
    finish({"turns": turns})


if __name__ == "__main__":
    main()
