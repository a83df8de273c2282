"""What small and large networks have from each other in the scenario mixed-digits.

Prints the accuracy of what the devices serve, pooled over those with the same network, in per cent:
with each way of exchanging answers, in a fleet of small networks alone, where these are averaged,
and where each device learns alone; and what a device sends in a round, as sent. A few minutes of
one core: python benchmarks/mixed_networks.py --seeds 3.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import edgelearn
from edgelearn.federated.record import RunRecord
from edgelearn.scenario.load import load

SCENARIO = "mixed-digits"
ROWS: Mapping[str, Mapping[str, Any]] = {
    "alone (`digest_epochs = 0`)": {"client.args.digest_epochs": 0},
    "small networks only": {"model.variants.small.share": 1.0},
    "small networks only, averaged (`naive`, no public images)": {
        "model.variants": {},
        "model.args": {"hidden": [8]},
        "client.strategy": "naive",
        "client.args": {},
    },
    "both": {},
    'both, `loss = "l1"`': {"client.args.loss": "l1"},
}
LARGE, SMALL = "", "small"


@dataclass(frozen=True)
class Row:
    """What one way came to.

    `accuracies` has those of each network's devices by seed, in [0, 1], with none where no device
    holds it; `sent_bytes` is what a device sends in a round.
    """

    name: str
    accuracies: Mapping[str, tuple[float, ...]]
    sent_bytes: float


def accuracy(record: RunRecord, variant: str) -> float | None:
    """Return the pooled accuracy at the end of devices that hold a network; None without any."""
    last, names = record.device_rows[-1], [kind["variant"] for kind in record.run["kinds"]]
    if names == [LARGE]:  # the row in which [model] itself is small
        names = [SMALL]
    kind_of = record.run["kind_of"] or [0] * record.run["num_devices"]
    rows = [r for r, device in enumerate(last["devices"]) if names[kind_of[device]] == variant]
    count = sum(sum(last["count"][row]) for row in rows)
    return sum(sum(last["served"][row]) for row in rows) / count if count else None


def measure(*, num_seeds: int, overrides: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows, as they are done."""
    for name, changed in ROWS.items():
        records = [
            edgelearn.simulate(load(SCENARIO, {"seed": seed, **overrides, **changed}))
            for seed in range(num_seeds)
        ]
        found = {
            variant: tuple(a for r in records if (a := accuracy(r, variant)) is not None)
            for variant in (SMALL, LARGE)
        }
        up = [sum(record.end["bytes_up"]) for record in records]
        asked = [sum(len(line["cohort"]) for line in record.rounds) for record in records]
        yield Row(name, found, sum(up) / sum(asked))


def format_row(row: Row) -> str:
    """Return a line of the table."""
    cells = [_cell(row.accuracies[variant]) for variant in (SMALL, LARGE)]
    return f"| {row.name} | {' | '.join(cells)} | {row.sent_bytes:,.0f} |"


def _cell(values: tuple[float, ...]) -> str:
    if not values:
        return ""
    each = " ".join(f"{100 * value:.1f}" for value in values)
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=None, help="in place of the scenario's")
    asked = parser.parse_args()
    overrides = {"evaluate.every_rounds": 1000}
    if asked.rounds is not None:
        overrides["stream.rounds_per_experience"] = asked.rounds
    print("| | small | large | sent in a round, bytes |")
    print("|---|---|---|---|")
    for row in measure(num_seeds=asked.seeds, overrides=overrides):
        print(format_row(row), flush=True)


if __name__ == "__main__":
    main()
