"""What devices serve that keep their activation ranges, and how often these are observed.

Runs a scenario with ranges observed for each model that is evaluated, kept until they drift, and
tracked in training besides. Prints the accuracy of the served model at the end and the largest
difference from the float model in any evaluation, in per cent, pooled over all devices and
experiences; and how many of the evaluations observed ranges on all calibration samples. Under a
minute on an idle core: python benchmarks/ranges.py --seeds 3.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import edgelearn
from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.learners import FleetLearners
from edgelearn.device.runtimes import NUM_OBSERVED
from edgelearn.federated.journal import FileJournal
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.simulated import tables_of
from edgelearn.scenario.load import load
from edgelearn.scenario.spec import RECALIBRATIONS, Scenario
from edgelearn.scenario.world import build

CLIENTS = ("naive", "replay", "ewc")


@dataclass(frozen=True)
class Row:
    """What one client strategy with one choice came to, by seed.

    `served` is the accuracy at the end and `gap` the largest difference from the float model's in
    any evaluation, both in [0, 1]; `observed` the share of evaluations that observed ranges.
    """

    client: str
    recalibrate: str
    served: tuple[float, ...]
    gap: tuple[float, ...]
    observed: tuple[float, ...]


def num_observed(scenario: Scenario, directory: Path) -> int:
    """Return how often devices observed the ranges that they keep in a finished run.

    All devices have to hold the same network.
    """
    learners, count = FleetLearners(build(scenario)), scenario.fleet.num_devices
    if NUM_OBSERVED not in learners.whole.declaration:  # the runtime has no ranges
        return 0
    checkpoint = FileJournal(directory).resume()
    assert checkpoint is not None
    store = FleetStore(
        directory / "devices.bin",
        learners.whole.declaration,
        count,
        tables_of(checkpoint.tensors),
        record_bytes=learners.record_bytes,
    )
    devices = np.arange(count)
    found = store.file.gather(NUM_OBSERVED, devices, store.slots_of(devices)[0], fill=0)
    return int(found.sum())


def accuracies(record: RunRecord) -> Iterator[tuple[float, float]]:
    """Yield the accuracy of the served and of the float model in each evaluation."""
    for line in record.lines:
        if seen := line.get("accuracy"):
            count = sum(seen["count"])
            yield sum(seen["served"]) / count, sum(seen["float"]) / count


def run(scenario: Scenario) -> tuple[float, float, float]:
    """Return what is served at the end, the largest gap, and the share of observations."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        record = edgelearn.simulate(scenario, out=directory)
        found = list(accuracies(record))
        share = 1.0
        if scenario.runtime.keeps_ranges:
            evaluated = len(found) * scenario.fleet.num_devices
            share = num_observed(scenario, directory) / evaluated
    return found[-1][0], max(abs(served - exact) for served, exact in found), share


def measure(source: str, *, num_seeds: int) -> Iterator[Row]:
    """Yield the rows, as they are done."""
    for client in CLIENTS:
        for choice in RECALIBRATIONS:
            changed = {
                "client.strategy": client,
                "client.args": {},
                "runtime.recalibrate": choice,
            }
            runs = [run(load(source, {"seed": seed, **changed})) for seed in range(num_seeds)]
            served, gap, observed = zip(*runs, strict=True)
            yield Row(client, choice, served, gap, observed)


def format_row(row: Row) -> str:
    """Return a line of the table."""
    cells = [f"{100 * statistics.mean(v):.2f}" for v in (row.served, row.gap, row.observed)]
    spread = f" ± {100 * statistics.stdev(row.served):.2f}" if len(row.served) > 1 else ""
    return f"| {row.client} | {row.recalibrate} | {cells[0]}{spread} | {cells[1]} | {cells[2]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenario", default="split-digits", help="name or path")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    print("| strategy | recalibrate | served % | most from float | observed, % of evaluations |")
    print("|---|---|---|---|---|")
    for row in measure(asked.scenario, num_seeds=asked.seeds):
        print(format_row(row), flush=True)


if __name__ == "__main__":
    main()
