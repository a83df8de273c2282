"""What cheap storage of Fisher, importance, anchor and teacher saves, and costs in accuracy.

Runs the scenario permuted-digits (domain-incremental: 5 experiences, 20 devices) with each strategy
that keeps vectors of the network's size, each kind of storage and some seeds, and prints what a
device stores between rounds, what it needs in memory in a round, and the accuracy of the served
model over all experiences at the end; plain fine-tuning, which stores nothing, comes first. Little
more than a minute on an idle core: python benchmarks/storage.py --seeds 3.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import edgelearn
from edgelearn.continual.memory import kept
from edgelearn.continual.storage import KINDS
from edgelearn.device.learners import make_learner
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build

SCENARIO = "permuted-digits"
PLAIN, NOTHING = "naive", "none"
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "ewc": {"strength": 10.0},
    "si": {"c": 1.0},
    "mas": {"strength": 0.1},
    "lwf": {},
}


@dataclass(frozen=True)
class Row:
    """What one strategy with one kind of storage came to.

    `stored_bytes` lie on a device between rounds, `memory_bytes` are needed in a round;
    `accuracies` has the average accuracy at the end of each seed's run, in [0, 1].
    """

    strategy: str
    storage: str
    stored_bytes: int
    memory_bytes: int
    accuracies: tuple[float, ...]


def scenario(strategy: str, storage: str, *, seed: int) -> Scenario:
    """Return the scenario of a run."""
    args = {} if strategy == PLAIN else {**STRATEGIES[strategy], "storage": storage}
    rounds = {"rounds_per_experience": 3}
    return edgelearn.load(
        SCENARIO, client={"strategy": strategy, "args": args}, stream=rounds, seed=seed
    )


def measure(*, num_seeds: int) -> Iterator[Row]:
    """Yield a row for each strategy and kind of storage, as they are done."""
    for strategy, storage in [(PLAIN, NOTHING), *itertools.product(STRATEGIES, KINDS)]:
        runs = [scenario(strategy, storage, seed=seed) for seed in range(num_seeds)]
        learner = make_learner(build(runs[0]))
        scores = [edgelearn.simulate(run).scores() for run in runs]
        yield Row(
            strategy=strategy,
            storage=storage,
            stored_bytes=sum(spec.stored_bytes for spec in kept(learner.declaration).values()),
            memory_bytes=learner.memory_bytes,
            accuracies=tuple(score.average_accuracy for score in scores),
        )


def format_row(row: Row, of_float32: Row) -> str:
    """Return a line of the table; the difference is to float32 with the same seeds."""
    pairs = zip(row.accuracies, of_float32.accuracies, strict=True)
    lost = [100 * (cheap - full) for cheap, full in pairs]
    each = " ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies)
    return (
        f"| {row.strategy} | {row.storage} | {row.stored_bytes:,} | {row.memory_bytes:,} "
        f"| {100 * statistics.mean(row.accuracies):.1f} | {statistics.mean(lost):+.1f} | {each} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    print("| strategy | storage | bytes stored | in a round | accuracy % | to float32 | each |")
    print("|---|---|---|---|---|---|---|")
    full: Row | None = None
    for row in measure(num_seeds=asked.seeds):
        if row.storage in (NOTHING, KINDS[0]):
            full = row
        assert full is not None
        print(format_row(row, full), flush=True)


if __name__ == "__main__":
    main()
