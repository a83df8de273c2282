"""What the engines that train a whole cohort in one go have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.compress.codec import Codec, decoded, encoded
from edgelearn.device.fleet_store import RecordFile, RecordLayout
from edgelearn.device.learner import Learner, refuse_divergence
from edgelearn.device.tracking import Trackers
from edgelearn.errors import DivergenceError
from edgelearn.federated import egress
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Integers, Job, Phase
from edgelearn.fleet.tracked import track
from edgelearn.scenario.spec import ALL
from edgelearn.scenario.world import World
from edgelearn.seeds import derive, split_all

_log = logging.getLogger(__name__)  # a simulated device's own log

DETECTS = "devices look for boundaries of experiences themselves"
Run = Callable[[Sequence[Job], Tensor, Tensor], list[Done]]


@dataclass(frozen=True, slots=True)
class Trained:
    """Plain training of a cohort [K]; `kept` has what is new in memories, by name [K, ...]."""

    loss: NDArray[np.float64]
    num_steps: Integers
    num_samples: Integers
    norms: NDArray[np.float64]
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, size: int) -> Trained:
        """Return one to be filled."""
        losses, norms = np.zeros(size), np.zeros(size)
        return cls(losses, np.zeros(size, np.int64), np.zeros(size, np.int64), norms)


Train = Callable[[CohortFit, Tensor, Tensor], Trained]


def not_declared(learner: Learner) -> str | None:
    """Return why local training is not plain SGD with what a strategy declares; None if it is."""
    strategy = learner.strategy
    if (reason := feeds_back(learner)) is not None:
        return reason
    if (reason := saves_memory(learner)) is not None:
        return reason
    if learner.detector is not None:
        return DETECTS
    if strategy.keeps_network:
        return f"{type(strategy).__name__} keeps the network on the device"
    if (reason := has_public(learner)) is not None:
        return reason
    if not strategy.is_declared or strategy.overrides("upload"):
        return f"{type(strategy).__name__} computes what it does instead of declaring it"
    if learner.spec.optimizer != "sgd":
        return f"the optimizer is {learner.spec.optimizer}"
    if learner.spec.steps:
        return f"a round has {learner.spec.steps} steps instead of whole epochs"
    return None


def holds_parts(world: World) -> str | None:
    """Return why devices can't be trained as a stack of equal ones; None if they can."""
    if world.kinds.widths == (1.0,):
        return None
    return "devices hold sub-models of different widths (fleet.width)"


def feeds_back(learner: Learner) -> str | None:
    """Return why a codec needs devices one by one; None if it doesn't."""
    if learner.codec is None or not learner.codec.keeps_residual:
        return None
    return f"{type(learner.codec).__name__} keeps what it did not send (error feedback)"


def saves_memory(learner: Learner) -> str | None:
    """Return why devices have to take their steps one by one; None if they don't."""
    spec = learner.spec
    if spec.train != ALL:
        return "devices train only a part of the network"
    if spec.accumulate > 1:
        return f"a batch passes in {spec.accumulate} parts"
    return "activations are computed again in the backward pass" if spec.checkpoint else None


def has_public(learner: Learner) -> str | None:
    """Return why a device's first memory is not what its declaration says; None if it is."""
    if not learner.needs_public:
        return None
    return f"{type(learner.strategy).__name__} begins with the public samples in memory"


def open_memories(world: World, learner: Learner, store_path: Path) -> RecordFile:
    """Open the file with the devices' memories."""
    layout = RecordLayout.of(learner.declaration)
    return RecordFile(store_path, layout, world.scenario.fleet.num_devices)


def seeds_of(seed: int, cohort: CohortFit) -> NDArray[np.uint64]:
    """Return the seed of each device's training; as `learner.steps_seed` has it."""
    return split_all(derive(seed, "steps", cohort.server_round), cohort.devices)


def fit(
    cohort: CohortFit,
    params: Tensor,
    updates: Tensor,
    world: World,
    learner: Learner,
    memories: RecordFile,
    train: Train,
    rest: Run,
    trackers: Trackers | None = None,
) -> CohortDone:
    """Train a cohort.

    Args:
        cohort: K devices.
        params: Global parameters [P].
        updates: Where the updates go [K, P].
        world: The scenario's world.
        learner: The scenario's learner.
        memories: What the devices remember.
        train: Trains devices that have nothing to do but to train, in one go.
        rest: Does the jobs of devices that have to catch up first.
        trackers: Look at the ranges of devices that track theirs.
    """
    done = CohortDone.empty(cohort)
    behind = cohort.consolidated < cohort.position
    behind |= cohort.begun > cohort.position + 1  # of another run, which is an error
    if learner.strategy.overrides("start"):
        behind |= cohort.begun <= cohort.position
    rows = np.flatnonzero(~behind)
    sizes = world.train_sizes(cohort.devices, cohort.position, server_round=cohort.server_round)
    if len(rows):
        whole = len(rows) == len(cohort)
        part = cohort if whole else cohort.of(rows)
        target = updates if whole else torch.empty(len(rows), updates.shape[1])
        found = train(part, params, target)
        for index in np.flatnonzero(~np.isfinite(found.norms + found.loss)).tolist():
            if np.isfinite(found.loss[index]) and bool(torch.isfinite(target[index]).all()):
                continue  # its norm alone overflows
            row, loss = int(rows[index]), float(found.loss[index])
            done.errors[row] = _divergence(int(cohort.devices[row]), cohort.server_round, loss)
            target[index] = 0
        wider: dict[int, dict[str, Tensor]] = {}
        if trackers is not None:
            wider = track(trackers, part, params, target, rows, world, memories, done)
        if learner.codec is not None:
            for index, row in enumerate(rows.tolist()):
                if row not in done.errors:
                    update = target[index]
                    found.norms[index] = _send(learner, learner.codec, update, cohort, row, done)
        if not whole:
            updates[torch.from_numpy(rows)] = target
        well = np.array([row not in done.errors for row in rows.tolist()])
        kept = rows[well]
        done.num_examples[kept] = sizes[rows][well]
        for name in ("loss", "num_steps", "num_samples", "norms"):
            getattr(done, name)[kept] = getattr(found, name)[well]
        done.progress[kept, 0] = cohort.position + 1
        changed = set(np.flatnonzero(found.num_steps > 0).tolist()) if found.kept else set()
        for index in sorted(changed | wider.keys()):
            row = int(rows[index])
            if row in done.errors:
                continue
            done.checksums[row] = memories.rewrite(
                int(cohort.devices[row]),
                int(cohort.read_slots[row]),
                int(cohort.write_slots[row]),
                {n: t[index] for n, t in found.kept.items() if index in changed}
                | wider.get(index, {}),
            )
    if behind.any():
        late = np.flatnonzero(behind)
        for result in rest(cohort.jobs(late.tolist(), sizes), params, updates):
            done.take(result)
    return done


def moved(memories: RecordFile, name: str, cohort: CohortFit, updates: Tensor) -> Tensor:
    """Return how far devices have moved [K, T]: so far, by the memory's tensor, and with this."""
    so_far = memories.gather(name, cohort.devices, cohort.read_slots, fill=0)
    return torch.from_numpy(so_far).add_(updates[:, : so_far.shape[1]])


def run(
    jobs: Sequence[Job],
    params: Tensor,
    updates: Tensor,
    fit: Callable[[CohortFit, Tensor, Tensor], CohortDone],
    rest: Run,
) -> list[Done]:
    """Do jobs: those that train as one cohort (they are of one round), the others one by one."""
    fits = [job for job in jobs if job.phase is Phase.FIT]
    others = [job for job in jobs if job.phase is not Phase.FIT]
    done: dict[int, Done] = {}
    if others:
        done |= {result.row: result for result in rest(others, params, updates)}
    if fits:
        rows = np.array([job.row for job in fits])
        own = torch.zeros(len(fits), updates.shape[1])
        found = fit(_as_cohort(fits), params, own)
        updates[torch.from_numpy(rows)] = own
        done |= {job.row: found.of(index, job.row) for index, job in enumerate(fits)}
    return [done[job.row] for job in jobs]


def _send(
    learner: Learner, codec: Codec, update: Tensor, cohort: CohortFit, row: int, done: CohortDone
) -> float:
    """Encode a device's update [P], and put what the server decodes in its place.

    Returns:
        The norm of that.
    """
    layout, device = learner.model.layout, int(cohort.devices[row])
    try:
        message = encoded(
            codec,
            layout,
            update,
            seed=learner.seed,
            server_round=cohort.server_round,
            device=device,
        )
        egress.message_schema(codec, layout).admit(message, {})
        update.copy_(decoded(codec, layout, message))
    except Exception as error:
        done.fail(row, device, error)
        update.zero_()
        return 0.0
    done.messages[row] = {name: value.numpy() for name, value in message.items()}
    return float(update.norm())


def _as_cohort(jobs: Sequence[Job]) -> CohortFit:
    def column(name: str) -> Integers:
        return np.array([getattr(job, name) for job in jobs], np.int64)

    first = jobs[0]
    return CohortFit(
        devices=column("device"),
        server_round=first.server_round,
        position=first.position,
        begun=column("begun"),
        consolidated=column("consolidated"),
        read_slots=column("read_slot"),
        write_slots=column("write_slot"),
        serial=first.serial,
        proximal_mu=first.proximal_mu,
    )


def _divergence(device: int, server_round: int, loss: float) -> str:
    """Return the reason that the learner gives."""
    try:
        refuse_divergence(device, server_round, loss)
    except DivergenceError as error:
        return egress.reason_of(error)
