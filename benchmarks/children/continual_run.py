"""A whole continual run of edgelearn: CPU from the second round on, accuracy of the final model."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from clock import Clock, argument, finish
from safetensors.torch import load_file

import edgelearn
from edgelearn.scenario.load import load
from edgelearn.scenario.world import build


def main() -> None:
    asked = argument()
    scenario = load(asked["scenario"], asked["overrides"])
    clock, used, seen = Clock(), 0.0, 0

    def on_round(_progress: object) -> None:
        nonlocal used, seen
        clock.round_done()
        seen += 1
        if seen == scenario.num_rounds:
            used = clock.cpu_s()

    options: dict[str, Any] = {"engine": asked["engine"], "on_round": on_round}
    if "federation" in inspect.signature(edgelearn.simulate).parameters:
        options["federation"] = asked["federation"]
    elif asked["federation"] != "faithful":
        raise SystemExit(f"this edgelearn can't federate {asked['federation']}")
    with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
        out = Path(folder) / "run"
        clock.start()
        record = edgelearn.simulate(scenario, out=out, **options)
        weights = load_file(out / "model.safetensors")
    world = build(scenario)
    module = world.model().module.eval()
    module.load_state_dict(weights)
    test = world.test.batch(torch.arange(len(world.test.y), dtype=torch.int32))
    with torch.no_grad():
        hits = float((module(test.x).argmax(1) == test.y).float().mean())
    finish(
        {
            "cpu_s": used,
            "wall_s": sum(clock.walls),
            "accuracy": hits,
            "first_round_s": clock.first_round_s,
            "engine": record.run["engine"],
        }
    )


if __name__ == "__main__":
    main()
