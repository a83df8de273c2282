"""Engines against each other and against peers, on one workload."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from harness import peers, results, world
from harness.paths import CHILDREN, PEERS, WORKLOADS
from harness.processes import own_environment, peer_environment, run_child
from harness.results import Options

import edgelearn
from edgelearn.scenario.spec import ENGINES

WORKLOADS_OF_PART = ("w1", "w2", "w3", "flute")
TIERS = ("reference", "pool", "batched", "native")
GEMM = "gemm"
FLOWER, PFL, NAIVE = "Flower/Ray", "pfl, 2 workers", "naive loop"

# Rounds that count, of peers that must know their number beforehand: a few seconds each.
_ROUNDS = {
    "w1": {FLOWER: 4, PFL: 5},
    "w2": {FLOWER: 6, PFL: 15},
    "w3": {FLOWER: 5, PFL: 25},
    "flute": {FLOWER: 8, PFL: 40},
}


def federations() -> tuple[str, ...]:
    """Return the ways in which this edgelearn can federate."""
    known = inspect.signature(edgelearn.simulate).parameters
    return ("faithful", "fused") if "federation" in known else ("faithful",)


def name_of(tier: str, federation: str) -> str:
    """Return the name of an engine in results."""
    return f"edgelearn {tier}, {federation}"


def best() -> tuple[str, str]:
    """Return the fastest tier and federation that this edgelearn offers."""
    return ("native" if "native" in ENGINES else "pool"), federations()[-1]


def ours(
    workload: str,
    tier: str,
    federation: str,
    *,
    budget_s: float,
    rounds: int,
    overrides: Mapping[str, Any] | None = None,
    skip: int = 1,
    position: int = 0,
    interval_s: float = 0.3,
) -> dict[str, Any]:
    """Run edgelearn on a workload.

    Args:
        workload: Its name.
        tier: The engine.
        federation: "faithful" or "fused".
        budget_s: Least seconds of rounds that count.
        rounds: Least number of rounds that count.
        overrides: Values of the scenario to replace.
        skip: Rounds before those that count.
        position: Position in the stream of the rounds that count.
        interval_s: Seconds between looks at the memory.
    """
    facts = world.facts(workload, overrides, position)
    asked = {
        "scenario": str(WORKLOADS / f"{workload}.toml"),
        "overrides": dict(overrides or {}),
        "engine": tier,
        "federation": federation,
        "budget_s": budget_s,
        "min_rounds": rounds,
        "skip": skip,
        "sizes": facts.sizes,
        "cohorts": facts.cohorts,
        "flops_per_sample": facts.flops_per_sample,
    }
    command = [sys.executable, str(CHILDREN / "edgelearn_run.py")]
    ended = run_child(
        command,
        asked,
        environment=own_environment(),
        interval_s=interval_s,
        gentle=interval_s >= 0.3,
    )
    return ended.as_dict()


def naive(workload: str, *, budget_s: float, rounds: int) -> dict[str, Any]:
    """Run the naive loop, in edgelearn's own environment."""
    asked = {"data": str(world.dump(workload)), "budget_s": budget_s, "min_rounds": rounds}
    command = [sys.executable, str(PEERS / "naive.py")]
    return run_child(command, asked, environment=peer_environment()).as_dict()


def flower(workload: str, *, rounds: int) -> dict[str, Any]:
    """Run Flower's simulation."""
    asked = {"data": str(world.dump(workload)), "rounds": rounds + 1}
    command = [str(peers.environment("flower") / "python"), str(PEERS / "flower_ray.py")]
    return run_child(command, asked, environment=peer_environment()).as_dict()


def pfl(workload: str, *, rounds: int) -> dict[str, Any]:
    """Run pfl-research with two workers."""
    asked = {"data": str(world.dump(workload)), "rounds": rounds + 1}
    torchrun = [str(peers.environment("pfl") / "python"), "-m", "torch.distributed.run"]
    command = [*torchrun, "--standalone", "--nproc-per-node=2", str(PEERS / "pfl_workers.py")]
    environment = {**peer_environment(), "OMP_NUM_THREADS": "1"}
    return run_child(command, asked, environment=environment).as_dict()


def gemm(*, seconds: float) -> dict[str, Any]:
    """Measure matrix multiplication."""
    command = [sys.executable, str(CHILDREN / "gemm.py")]
    asked = {"seconds": seconds, "size": 2048}
    return run_child(command, asked, environment=own_environment()).as_dict()


def runs(workload: str, options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what takes turns on a workload."""
    quick = options.quick
    budget_s, rounds = (0.2, 2) if quick else (2.0, 3)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        GEMM: partial(gemm, seconds=0.3 if quick else 1.5)
    }
    for tier in TIERS:
        if tier in ENGINES:
            for way in federations():
                call = partial(ours, workload, tier, way, budget_s=budget_s, rounds=rounds)
                found[name_of(tier, way)] = call
    found[NAIVE] = partial(naive, workload, budget_s=budget_s, rounds=rounds)
    if options.peers:
        counts = {FLOWER: 2, PFL: 3} if quick else _ROUNDS[workload]
        found[FLOWER] = partial(flower, workload, rounds=counts[FLOWER])
        found[PFL] = partial(pfl, workload, rounds=counts[PFL])
    return found


def measure(workload: str, options: Options) -> dict[str, Any]:
    """Measure one workload."""
    spec, made = world.scenario(workload), world.world_of(workload)
    world.dump(workload)
    found = runs(workload, options)
    config = {
        "workload": spec.as_dict(),
        "digest": spec.digest,
        "parameters": made.model().layout.size,
        "mean_samples": float(np.mean([len(part) for part in made.train_parts])),
        "flops_per_sample": world.train_flops(made),
        "engines": list(found),
        "missing_tiers": [tier for tier in TIERS if tier not in ENGINES],
        "federations": list(federations()),
        "peers": {n: peers.versions(n) for n in ("flower", "pfl")} if options.peers else {},
        "command": f"python benchmarks/engines.py --only {workload}",
    }
    return results.repeat(workload, found, options, config=config)


def engines_of(result: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the engines that ran, slowest kind first."""
    first = [FLOWER, PFL, NAIVE]
    names = [name for name in result["config"]["engines"] if name != GEMM]
    for name in [*first, *[n for n in names if n not in first]]:
        if results.runs_of(result, name):
            yield name


def share_of_gemm(result: dict[str, Any], engine: str) -> float | None:
    """Return an engine's floating-point operations in percent of the peak, turn by turn."""
    found = results.ratio(result, "gflops", engine, GEMM)
    return None if found is None else 100 * found[0]


TITLES = {
    "w1": "W1: FedAvg's CNN on Fashion-MNIST",
    "w2": "W2: FedAvg's 2NN on Fashion-MNIST",
    "w3": "W3: a sensor-sized network on digits",
    "flute": "Softmax regression on synthetic MNIST",
}


def section(result: dict[str, Any]) -> str:
    """Return a workload's table."""
    config = result["config"]
    spec = config["workload"]
    peak = results.median(results.values(result, GEMM, "gflops")) or float("nan")
    lines = [
        (
            f"{results.sentence(spec['title'])}. {spec['fleet']['num_devices']:,} devices, cohort "
            f"{spec['fleet']['cohort']}, {config['mean_samples']:.1f} samples a device on average, "
            f"batch {spec['client']['batch_size']}, learning rate {spec['client']['lr']:g}, 1 "
            f"epoch, no evaluation. {config['flops_per_sample'] / 1e6:.3g} MFLOP a sample (forward "
            f"and backward); sgemm peak of the machine in the same turns {peak:.0f} GF/s."
        ),
        "",
        (
            "| engine | client updates/s | x Flower/Ray (range) | x pfl | CPU ms per update "
            "| % of sgemm peak | peak memory, MiB | start to end of round 1, s |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result, name) for name in engines_of(result)]
    notes = [f"{tier} is not in this edgelearn" for tier in config["missing_tiers"]]
    notes += [f"{n} was left out: `{_last(e)}`" for n, e in result["skipped"].items()]
    other = [
        n
        for n in engines_of(result)
        if any(run.get("same_cohorts") is False for run in results.runs_of(result, n))
    ]
    notes += [f"{n} asked other devices than the rest" for n in other]
    notes += [f"{n} ran on the {tier} engine" for n, tier in _elsewhere(result)]
    if notes:
        lines += ["", "Notes: " + "; ".join(notes) + "."]
    return "\n".join(lines)


def _elsewhere(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield engines that the planner replaced by another one, and that one."""
    for name in engines_of(result):
        tiers = {run["engine"]["tier"] for run in results.runs_of(result, name) if "engine" in run}
        for tier in tiers:
            if not name.startswith(f"edgelearn {tier},"):
                yield name, tier


def _last(text: str) -> str:
    """Return the line of an error that says most."""
    lines = [line for line in text.splitlines() if line.strip(" =-")] or [""]
    telling = [line for line in lines if "Error" in line and "File " not in line]
    return (telling or lines)[-1].strip()[:160].replace("`", "'")


def _row(result: dict[str, Any], name: str) -> str:
    def middle(field: str) -> float:
        found = results.median(results.values(result, name, field))
        return float("nan") if found is None else found

    cells = [name, f"{middle('updates_per_s'):,.{_digits(middle('updates_per_s'))}f}"]
    for peer in (FLOWER, PFL):
        found = results.ratio(result, "updates_per_s", name, peer)
        if found is None or name == peer:
            cells.append("1" if name == peer else "")
        elif peer == FLOWER:
            cells.append(f"{found[0]:.3g} ({found[1]:.3g} - {found[2]:.3g})")
        else:
            cells.append(f"{found[0]:.3g}")
    share = share_of_gemm(result, name)
    cells += [
        f"{middle('cpu_ms_per_update'):.3g}",
        "" if share is None else f"{share:.2g}",
        f"{middle('peak_mib'):,.0f}",
        f"{middle('first_round_s'):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1
