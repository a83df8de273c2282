"""Which engine runs a scenario, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgelearn.errors import RunError, nearest
from edgelearn.fleet.batched import why_batched
from edgelearn.scenario.spec import ENGINES
from edgelearn.scenario.world import World

# Below this much training in a round, starting workers and handing out jobs costs more than a
# second core gives.
_WORTH_FLOPS = 20e9


@dataclass(frozen=True, slots=True)
class Plan:
    """The planner's choice.

    Attributes:
        tier: "reference", "batched" or "pool".
        num_workers: Processes that train.
        reason: Why, for people.
        flops_per_sample: Floating-point operations of one forward pass.
    """

    tier: str
    num_workers: int
    reason: str
    flops_per_sample: float


def make_plan(world: World, *, engine: str = "auto", num_workers: int | None = None) -> Plan:
    """Choose the engine.

    Args:
        world: The scenario's world.
        engine: "auto", or a tier by name.
        num_workers: Processes; None lets the planner choose.

    Raises:
        RunError: If the tier is unknown, or does not go with that many workers.
    """
    if engine not in ENGINES:
        raise RunError(
            f"unknown engine {engine!r}{nearest(engine, ENGINES)}; allowed: {', '.join(ENGINES)}"
        )
    if num_workers is not None and num_workers < 1:
        raise RunError(f"got {num_workers} workers; at least 1 is needed")
    if engine in ("reference", "batched") and (num_workers or 1) > 1:
        raise RunError(f"the {engine} engine has one worker, got {num_workers}; use pool")
    flops = forward_flops(world)
    cores = os.cpu_count() or 1
    if engine == "pool":
        return Plan("pool", num_workers or cores, "asked for", flops)
    if engine in ("reference", "batched"):
        return Plan(engine, 1, "asked for", flops)
    if num_workers is not None:
        tier = "pool" if num_workers > 1 else "reference"
        return Plan(tier, num_workers, f"{num_workers} worker(s) asked for", flops)
    spec = world.scenario
    mean_samples = len(world.train.y) / spec.fleet.num_devices / spec.stream.num_experiences
    work = 3 * flops * mean_samples * spec.client.epochs * spec.fleet.cohort
    if cores > 1 and work >= _WORTH_FLOPS:
        return Plan("pool", cores, f"{work / 1e9:.3g} GFLOP a round is worth {cores} cores", flops)
    if (reason := why_batched(world)) is not None:
        return Plan("batched", 1, reason, flops)
    return Plan(
        "reference", 1, f"{work / 1e9:.3g} GFLOP a round is not worth starting workers", flops
    )


def forward_flops(world: World) -> float:
    """Count the floating-point operations of one forward pass of one sample.

    Two for each weight of a linear or convolution layer and place where it is applied; what is
    between these layers is left out. (torch's own counter imports its compiler: 80 MB, a second.)
    """
    module = world.model().module.eval()
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
