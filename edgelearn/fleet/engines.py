"""Opens the engine that a plan names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from edgelearn.device.learners import make_learner
from edgelearn.fleet import native
from edgelearn.fleet.batched import BatchedEngine
from edgelearn.fleet.cohort import rows_in_memory
from edgelearn.fleet.jobs import Engine, weighted_sum
from edgelearn.fleet.native import NativeEngine
from edgelearn.fleet.plan import Plan
from edgelearn.fleet.pool import PoolEngine
from edgelearn.fleet.ray import RayEngine
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.scenario.world import World


def open_engine(world: World, store_path: Path, plan: Plan) -> Engine:
    """Open an engine; whoever opens it closes it.

    Args:
        world: The scenario's world.
        store_path: The fleet's state.
        plan: The planner's choice.
    """
    if plan.tier == "ray":
        inner = partial(_open_alone, plan.inner)
        mean = native.mean if plan.inner == "native" else weighted_sum
        return RayEngine(world, store_path, inner, mean, num_workers=plan.num_workers)
    if plan.tier == "pool":
        size = make_learner(world).layout.size
        return PoolEngine(
            world,
            store_path,
            num_workers=plan.num_workers,
            cohort=min(world.scenario.fleet.cohort, rows_in_memory(size)),
            num_params=size,
        )
    if plan.tier == "native":
        return NativeEngine(world, store_path, num_threads=plan.num_workers)
    return _open_alone(plan.tier, world, store_path)


def _open_alone(tier: str, world: World, store_path: Path) -> Engine:
    """Open an engine that uses one processor."""
    if tier == "native":
        return NativeEngine(world, store_path, num_threads=1)
    if tier == "batched":
        return BatchedEngine(world, store_path)
    return ReferenceEngine(world, store_path)
