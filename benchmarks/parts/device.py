"""One device: edgelearn's client strategies beside Avalanche's, and what a step of each costs."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from harness import peers, results, world
from harness.paths import CHILDREN, PEERS, WORKLOADS
from harness.processes import own_environment, peer_environment, run_child
from harness.results import Options

from edgelearn.scenario.spec import ENGINES
from parts import comparison

PART = "device"
AVALANCHE = "Avalanche"
FISHER = "Fisher of the CNN"
METHODS: dict[str, dict[str, Any]] = {
    "naive": {},
    "replay": {"capacity": 200, "replay_batch": 10},
    "ewc": {"strength": 10.0},
    "si": {},
}
# As in `continual`: the same pull needs another lambda there.
AVALANCHE_ARGS = {"naive": {}, "replay": {"capacity": 200}, "ewc": {"ewc_lambda": 50.0}, "si": {}}


def measure(options: Options) -> dict[str, Any]:
    """Measure each method on each engine, in turn."""
    way = comparison.federations()[-1]
    tiers = [tier for tier in comparison.TIERS if tier in ENGINES and tier != "pool"]

    def runs(turn: int) -> dict[str, results.Run]:
        found: dict[str, results.Run] = {FISHER: _fisher}
        for method in METHODS:
            for tier in tiers:
                found[_name(method, tier)] = partial(_ours, method, tier, way, turn)
            if options.peers:
                found[_name(method, AVALANCHE)] = partial(_avalanche, method, turn)
        return found

    config = {
        "workload": world.scenario(PART).as_dict(),
        "methods": METHODS,
        "tiers": tiers,
        "peers": {"avalanche": peers.versions("avalanche")} if options.peers else {},
        "command": "python benchmarks/engines.py --only device",
    }
    count = 1 if options.quick else options.repetitions
    return results.repeat(PART, runs, options, config=config, repetitions=count)


def _name(method: str, engine: str) -> str:
    return f"{method}: {engine}"


def _ours(method: str, tier: str, federation: str, seed: int) -> dict[str, Any]:
    asked = {
        "scenario": str(WORKLOADS / f"{PART}.toml"),
        "overrides": {
            "client.strategy": method,
            "client.args": METHODS[method],
            "seed": seed,
        },
        "engine": tier,
        "federation": federation,
    }
    command = [sys.executable, str(CHILDREN / "continual_run.py")]
    return run_child(command, asked, environment=own_environment()).as_dict()


def _avalanche(method: str, seed: int) -> dict[str, Any]:
    asked = {
        "data": str(world.dump(PART, {"seed": seed})),
        "strategy": method,
        **AVALANCHE_ARGS[method],
    }
    command = [str(peers.environment("avalanche") / "python"), str(PEERS / "avalanche_devices.py")]
    return run_child(command, asked, environment=peer_environment()).as_dict()


def _fisher() -> dict[str, Any]:
    asked = {"samples": 1000, "repeats": 3}
    command = [sys.executable, str(CHILDREN / "fisher_cnn.py")]
    return run_child(command, asked, environment=own_environment()).as_dict()


def factor(result: dict[str, Any], method: str) -> float | None:
    """Return how much less CPU the best engine needs than Avalanche."""
    found = [
        results.ratio(result, "cpu_s", _name(method, AVALANCHE), _name(method, tier))
        for tier in result["config"]["tiers"]
    ]
    return max((ratio[0] for ratio in found if ratio is not None), default=None)


def added(result: dict[str, Any], method: str, tier: str) -> float | None:
    """Return what a method adds to naive's CPU time on an engine, in percent."""
    found = results.ratio(result, "cpu_s", _name(method, tier), _name("naive", tier))
    return None if found is None else 100 * (found[0] - 1)


def fisher_epochs(result: dict[str, Any]) -> float | None:
    """Return the Fisher's CPU time in training epochs on the same samples."""
    return results.median(results.values(result, FISHER, "epochs"))


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    spec = result["config"]["workload"]
    data, stream, client = spec["data"], spec["stream"], spec["client"]
    trained = data["max_train"] * stream["rounds_per_experience"]
    lines = [
        (
            f"{results.sentence(spec['title'])}; {stream['num_experiences']} experiences of "
            f"{data['max_train'] // stream['num_experiences']:,} samples, each passed twice, batch "
            f"{client['batch_size']}, the same steps for all. CPU from the second pass on, "
            "consolidation included. Replay keeps 200 samples and passes as many again."
        ),
        "",
        (
            "| method | engine | new samples per CPU s | x Avalanche (range) | adds to naive "
            "| accuracy, % |"
        ),
        "|---|---|---|---|---|---|",
    ]
    timed = trained * (1 - 0.5 / stream["num_experiences"])
    for method in METHODS:
        for engine in [AVALANCHE, *result["config"]["tiers"]]:
            name = _name(method, engine)
            cpu = results.median(results.values(result, name, "cpu_s"))
            if cpu is None:
                continue
            found = results.ratio(result, "cpu_s", _name(method, AVALANCHE), name)
            times = "" if found is None else f"{found[0]:.3g} ({found[1]:.3g} - {found[2]:.3g})"
            more = added(result, method, engine)
            extra = "" if more is None or method == "naive" else f"{more:+.0f} %"
            accuracy = results.median(results.values(result, name, "accuracy")) or 0.0
            shown = engine if engine == AVALANCHE else f"edgelearn {engine}"
            lines.append(
                f"| {method} | {shown} | {timed / cpu:,.0f} | {times} | {extra} "
                f"| {100 * accuracy:.1f} |"
            )
    values = [results.median(results.values(result, FISHER, k)) for k in ("fisher_ms", "epoch_ms")]
    if None not in values:
        lines += [
            "",
            (
                f"Empirical Fisher of 1,000 samples on the small CNN: {values[0]:,.0f} ms CPU; a "
                f"training epoch on them (reference engine, batch 10): {values[1]:,.0f} ms."
            ),
        ]
    return "\n".join(lines)
