"""The empirical Fisher of a small CNN, beside one training epoch on the same samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from clock import argument, finish

from edgelearn.continual.fisher import empirical_fisher
from edgelearn.continual.memory import Memory
from edgelearn.continual.naive import Naive
from edgelearn.device.training import Training
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import build


def cpu_ms(function: Callable[[], object], repeats: int) -> float:
    """Return the median CPU milliseconds of a call, after one to warm up."""
    function()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(1e3 * (time.process_time() - started))
    return statistics.median(found)


def main() -> None:
    asked = argument()
    torch.set_num_threads(1)
    scenario = from_dict(
        {
            "name": "bench-fisher",
            "data": {"dataset": "fashion-mnist", "max_train": asked["samples"]},
            "model": {"name": "cnn"},
            "fleet": {"num_devices": 1, "cohort": 1},
            "stream": {
                "kind": "class-incremental",
                "num_experiences": 1,
                "rounds_per_experience": 1,
            },
            "client": {"strategy": "naive", "lr": 0.05},
        }
    )
    world = build(scenario)
    model = world.model()
    params = model.initial()
    data = Samples(world.train, torch.arange(asked["samples"], dtype=torch.int32))
    training = Training(model, Naive(), scenario.client)

    def fisher() -> object:
        model.module.eval()
        return empirical_fisher(model, params, data)

    def epoch() -> object:
        return training.run(params, Memory({}), data, seed=0)

    found = {f"{f.__name__}_ms": cpu_ms(f, asked["repeats"]) for f in (fisher, epoch)}
    finish({**found, "epochs": found["fisher_ms"] / found["epoch_ms"]})


if __name__ == "__main__":
    main()
