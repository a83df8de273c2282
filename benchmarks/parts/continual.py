"""Federated continual learning: edgelearn against Avalanche, a strategy object per device."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

from harness import peers, results, world
from harness.paths import CHILDREN, PEERS, WORKLOADS
from harness.processes import own_environment, peer_environment, run_child
from harness.results import Options

from edgelearn.scenario.spec import ENGINES
from parts import comparison

WORKLOAD = "continual"
AVALANCHE = "Avalanche per device"
CAPACITY = 200
SEEDS = 3
# Ours is (lambda / 2) F with per-example gradients; Avalanche's is lambda F with F from the mean
# gradient of a batch of 10, so about a tenth: its lambda for the same pull is five times ours.
STRENGTH, AVALANCHE_LAMBDA = 10.0, 50.0
METHODS: dict[str, dict[str, Any]] = {
    # Avalanche adds as many samples to the last, partial batch of an epoch as to any other.
    "replay": {"capacity": CAPACITY, "replay_batch": 10},
    "ewc": {"strength": STRENGTH},
}


def measure(options: Options) -> dict[str, Any]:
    """Measure both methods; each turn has a seed of its own."""
    way = comparison.federations()[-1]
    tiers = [tier for tier in comparison.TIERS if tier in ENGINES]

    def runs(turn: int) -> dict[str, results.Run]:
        found: dict[str, results.Run] = {}
        for method in METHODS:
            for tier in tiers:
                name = f"{method}: {comparison.name_of(tier, way)}"
                found[name] = partial(_ours, method, tier, way, turn)
            if options.peers:
                found[f"{method}: {AVALANCHE}"] = partial(_avalanche, method, turn)
        return found

    config = {
        "workload": world.scenario(WORKLOAD).as_dict(),
        "methods": METHODS,
        "avalanche_lambda": AVALANCHE_LAMBDA,
        "engines": [comparison.name_of(tier, way) for tier in tiers],
        "peers": {"avalanche": peers.versions("avalanche")} if options.peers else {},
        "command": "python benchmarks/engines.py --only continual",
    }
    count = 1 if options.quick else SEEDS
    return results.repeat(WORKLOAD, runs, options, config=config, repetitions=count)


def _ours(method: str, tier: str, federation: str, seed: int) -> dict[str, Any]:
    overrides = {"client.strategy": method, "client.args": METHODS[method], "seed": seed}
    asked = {
        "scenario": str(WORKLOADS / f"{WORKLOAD}.toml"),
        "overrides": overrides,
        "engine": tier,
        "federation": federation,
    }
    command = [sys.executable, str(CHILDREN / "continual_run.py")]
    return run_child(command, asked, environment=own_environment()).as_dict()


def _avalanche(method: str, seed: int) -> dict[str, Any]:
    asked = {
        "data": str(world.dump(WORKLOAD, {"seed": seed})),
        "strategy": method,
        "capacity": CAPACITY,
        "ewc_lambda": AVALANCHE_LAMBDA,
    }
    command = [str(peers.environment("avalanche") / "python"), str(PEERS / "avalanche_devices.py")]
    return run_child(command, asked, environment=peer_environment()).as_dict()


def agree(result: dict[str, Any], method: str, engine: str) -> bool | None:
    """Return whether mean accuracies differ by less than twice the larger spread over seeds."""
    ours = results.values(result, f"{method}: {engine}", "accuracy")
    theirs = results.values(result, f"{method}: {AVALANCHE}", "accuracy")
    if len(ours) < 2 or len(theirs) < 2:
        return None
    spread = max(statistics.stdev(ours), statistics.stdev(theirs), 0.005)
    return abs(statistics.mean(ours) - statistics.mean(theirs)) <= 2 * spread


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    spec = result["config"]["workload"]
    lines = [
        (
            f"{results.sentence(spec['title'])}; cohort {spec['fleet']['cohort']}, "
            f"{spec['stream']['num_experiences']} experiences of "
            f"{spec['stream']['rounds_per_experience']} rounds, batch "
            f"{spec['client']['batch_size']}, learning rate {spec['client']['lr']:g}; replay keeps "
            f"{CAPACITY} samples a device. The same devices, samples, cohorts and initial "
            "parameters; a seed each turn. CPU from the second round to the last, consolidation "
            "included, imports and data left out. Accuracy of the final float model on all 10,000 "
            f"test images, mean and sample standard deviation over {len(result['turns'])} seed(s)."
        ),
        "",
        (
            "| method | engine | CPU s | wall s | x less CPU than Avalanche (range) | accuracy, % "
            "| peak memory, MiB |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for engine in [AVALANCHE, *result["config"]["engines"]]:
            name = f"{method}: {engine}"
            if not results.runs_of(result, name):
                continue
            found = results.ratio(result, "cpu_s", f"{method}: {AVALANCHE}", name)
            times = f"{found[0]:.3g} ({found[1]:.3g} - {found[2]:.3g})" if found else ""
            accuracies = [100 * a for a in results.values(result, name, "accuracy")]
            spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
            cpu, wall, peak = (
                results.median(results.values(result, name, field))
                for field in ("cpu_s", "wall_s", "peak_mib")
            )
            lines.append(
                f"| {method} | {engine} | {cpu:.2f} | {wall:.2f} | {times} "
                f"| {statistics.mean(accuracies):.1f}{spread} | {peak:,.0f} |"
            )
    lines += [
        "",
        (
            "EWC does not help when classes are incremental, in neither code; it is here for its "
            f"cost. Its strengths are {STRENGTH:g} (ours, half the quadratic, per-example Fisher) "
            f"and {AVALANCHE_LAMBDA:g} (Avalanche's, Fisher of batch means)."
        ),
    ]
    return "\n".join(lines)
