"""Which engine runs a scenario, and why."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgelearn.device.learner import Learner
from edgelearn.errors import RunError, nearest
from edgelearn.fleet import batched, native, ray, together
from edgelearn.params import FlatModel
from edgelearn.scenario.spec import ENGINES
from edgelearn.scenario.world import World

# Below this much training in a round, starting workers and handing out jobs costs more than a
# second core gives.
_WORTH_FLOPS = 20e9
ONE_WORKER = ("reference", "batched")


@dataclass(frozen=True, slots=True)
class Plan:
    """The planner's choice.

    Attributes:
        tier: One of `ENGINES`.
        num_workers: Processes or threads that train.
        reason: Why, for people.
        flops_per_sample: Floating-point operations of one forward pass.
        inner: The tier that each worker of the ray tier runs.
    """

    tier: str
    num_workers: int
    reason: str
    flops_per_sample: float
    inner: str = ""


def make_plan(
    world: World, learner: Learner, *, engine: str = "auto", num_workers: int | None = None
) -> Plan:
    """Choose the engine.

    Args:
        world: The scenario's world.
        learner: Its learner.
        engine: "auto", or a tier by name.
        num_workers: Processes or threads; None lets the planner choose.

    Raises:
        RunError: If the tier is unknown, or can't run the scenario with that many workers.
    """
    if engine not in ENGINES:
        raise RunError(
            f"unknown engine {engine!r}{nearest(engine, ENGINES)}; allowed: {', '.join(ENGINES)}"
        )
    if num_workers is not None and num_workers < 1:
        raise RunError(f"got {num_workers} workers; at least 1 is needed")
    if engine in ONE_WORKER and (num_workers or 1) > 1:
        raise RunError(f"the {engine} engine has one worker, got {num_workers}; use pool")
    flops, cores = forward_flops(world), os.cpu_count() or 1
    obstacles = {
        "native": native.why_not(world, learner),
        "batched": batched.why_not(world, learner, tries_hooks=engine == "batched"),
        "ray": together.holds_parts(world) if ray.is_installed() else ray.MISSING,
    }
    if (obstacle := obstacles.get(engine)) is not None:
        raise RunError(f"the {engine} engine can't run this scenario: {obstacle}")
    quickest = next(
        (name for name in ("native", "batched") if obstacles[name] is None), "reference"
    )
    if engine == "ray":
        reason = f"asked for; each worker runs the {quickest} tier"
        return Plan(engine, num_workers or cores, reason, flops, quickest)
    if engine != "auto":
        workers = 1 if engine in ONE_WORKER else num_workers or cores
        return Plan(engine, workers, "asked for", flops)
    if quickest == "native":
        covers = "compiled code covers the network and the strategy"
        return Plan("native", num_workers or cores, covers, flops)
    tier, workers, reason = _without_compiler(world, flops, num_workers, cores, quickest)
    # Hooks would run in this process anyway, so they can be tried out here.
    if tier == "reference" and batched.why_not(world, learner, tries_hooks=True) is None:
        tier, reason = "batched", "autograd can train many devices at once"
    return Plan(tier, workers, f"{reason}; not native: {obstacles['native']}", flops)


def _without_compiler(
    world: World, flops: float, num_workers: int | None, cores: int, alone: str
) -> tuple[str, int, str]:
    """Return tier, workers and reason among the tiers that need torch alone."""
    if num_workers is not None and num_workers > 1:
        return "pool", num_workers, f"{num_workers} workers asked for"
    if alone == "batched":
        return "batched", 1, "networks of many devices fit into the cache at once"
    if num_workers is not None:
        return "reference", 1, "1 worker asked for"
    spec = world.scenario
    mean_samples = len(world.train.y) / spec.fleet.num_devices / spec.stream.num_experiences
    passed = spec.client.steps * spec.client.batch_size or mean_samples * spec.client.epochs
    work = 3 * flops * passed * spec.fleet.cohort
    if cores > 1 and work >= _WORTH_FLOPS:
        return "pool", cores, f"{work / 1e9:.3g} GFLOP a round is worth {cores} cores"
    return "reference", 1, f"{work / 1e9:.3g} GFLOP a round is not worth starting workers"


def forward_flops(world: World, model: FlatModel | None = None) -> float:
    """Count the floating-point operations of one forward pass of one sample.

    Two for each weight of a linear or convolution layer and place where it is applied; what is
    between these layers is left out. (torch's own counter imports its compiler: 80 MB, a second.)

    Args:
        world: The scenario's world.
        model: A network in place of the scenario's.
    """
    module = copy.deepcopy((model or world.model()).module).eval()
    total = 0.0

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += 2.0 * weight.numel() * output.numel() / len(weight)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for layer in module.modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(torch.zeros(1, *world.sample_shape))
    return total
