"""`edgelearn doctor`: what this machine and installation can do, tier by tier."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import edgelearn
from edgelearn.device.learners import make_learner
from edgelearn.errors import RunError
from edgelearn.federated.loop import Progress
from edgelearn.federated.rundir import versions
from edgelearn.fleet import native
from edgelearn.fleet.plan import make_plan
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.load import load
from edgelearn.scenario.spec import ENGINES, Scenario
from edgelearn.scenario.world import build

EXTRAS = {
    "native": ("edgelearn_native", "compiled training"),
    "ray": ("ray", "the ray tier"),
    "onnxruntime": ("onnxruntime", "the runtime onnxruntime"),
    "prune": ("torch_pruning", "channels that are taken out of a network"),
    "executorch": ("executorch", "files for phones: export --format pte"),
    "report": ("matplotlib", "report.html"),
    "avalanche": ("avalanche", "Avalanche's strategies and benchmarks"),
    "deploy": ("cryptography", "keys and certificates of a real fleet"),
}
# A few rounds, and no evaluation but at the end of an experience.
_SHORT = {"stream.rounds_per_experience": 6, "evaluate.every_rounds": 10**6}
_SLOW_TO_START = ("ray", "pool")


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier on this machine.

    Attributes:
        name: Its name.
        rate: Device updates per second, measured; None if it was not run.
        note: Why it can't run the scenario, or what was not measured.
        is_chosen: Whether the planner takes it.
    """

    name: str
    rate: float | None
    note: str
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found."""

    facts: dict[str, str]
    extras: dict[str, str]
    scenario: str
    reason: str
    tiers: list[Tier]


def examine(reference: str | None = None, *, every_tier: bool = False) -> Examination:
    """Look at the machine, and measure what each tier makes of a scenario.

    Args:
        reference: Scenario to measure with; None is a small one of the built-in ones.
        every_tier: Measure also the tiers that take seconds to start.
    """
    scenario = load(reference or "split-digits", _SHORT)
    world = build(scenario)
    learner = make_learner(world)
    chosen = make_plan(world, learner)
    tiers = []
    for name in ENGINES[1:]:
        is_chosen = name == chosen.tier
        try:
            make_plan(world, learner, engine=name)
        except RunError as error:
            tiers.append(Tier(name, None, str(error), is_chosen))
            continue
        if name in _SLOW_TO_START and not (every_tier or is_chosen):
            tiers.append(Tier(name, None, "takes seconds to start: --all measures it", is_chosen))
            continue
        tiers.append(Tier(name, _rate(scenario, name), "", is_chosen))
    return Examination(_facts(), _extras(), scenario.name, chosen.reason, tiers)


def _rate(scenario: Scenario, engine: str) -> float:
    """Return device updates per second: the median over rounds, the first one left out."""
    ends: list[float] = []

    def note(_progress: Progress) -> None:
        ends.append(time.perf_counter())

    simulate(scenario, engine=engine, on_round=note)
    per_experience = scenario.stream.rounds_per_experience
    rounds = [
        after - before
        for number, (before, after) in enumerate(itertools.pairwise(ends), start=2)
        if number % per_experience  # at the end of an experience devices consolidate too
    ]
    return scenario.fleet.cohort / statistics.median(rounds)


def _facts() -> dict[str, str]:
    found = versions()
    return {
        "edgelearn": f"{edgelearn.__version__}, Python {found['python']}",
        "libraries": f"torch {found['torch']}, flwr {found['flwr']}, numpy {found['numpy']}",
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "compiler": shutil.which("c++")
        or shutil.which("g++")
        or "none (only to build the kernels)",
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    wide = [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8") if name in flags]
    return f"{platform.machine()} {' '.join(wide)}".strip()


def _extras() -> dict[str, str]:
    out = {}
    for name, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            out[name] = f"missing: {purpose}; pip install 'edgelearn[{name}]'"
        else:
            out[name] = purpose
    if native.is_installed():
        import edgelearn_native as kernels

        version = importlib.metadata.version("edgelearn-native")
        out["native"] += f", {version} with {', '.join(kernels.isas())}"
    return out
