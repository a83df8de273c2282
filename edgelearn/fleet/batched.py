"""Batched tier: devices as stacked tensors, in one process; for networks that are small.

A tiny network's training is all fixed costs: of Python, of each operation. Done for K devices at
once they are paid once. That holds while K copies of the parameters fit a core's own cache, so K
follows from its size; a large network, where fewer than four fit, trains device by device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgelearn.continual.memory import Memory, check
from edgelearn.device.fleet_store import RecordFile, RecordLayout
from edgelearn.device.learner import divergence, make_learner
from edgelearn.device.stacked import TrainedStack, train_linear
from edgelearn.device.stacked_batches import Devices
from edgelearn.device.training import Training
from edgelearn.device.vmapped import train_vmapped
from edgelearn.errors import DivergenceError
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Integers, Job, cohort_of
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.fleet.workbench import failure
from edgelearn.scenario.world import World
from edgelearn.seeds import derive, split_all

FEWEST = 4  # a stack of fewer devices is not worth it
_MOST = 256
_L2_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_UNITS = {"K": 2**10, "M": 2**20}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
class BatchedEngine:
    """One process, one thread, many devices in each operation."""

    def __init__(self, world: World, store_path: Path, *, cache_bytes: int | None = None) -> None:
        """Prepare a stack.

        Args:
            world: The scenario's world.
            store_path: The fleet's state.
            cache_bytes: Size of a core's own cache; None asks this machine.
        """
        self._world = world
        self._reference = ReferenceEngine(world, store_path)  # whoever can't be stacked
        self._learner = make_learner(world)
        strategy, model = self._learner.strategy, self._learner.model
        self._training = Training(model, strategy, self._learner.spec)
        self._linear = self._training.linear_stack(world.sample_shape)
        layout = RecordLayout.of(self._learner.declaration)
        self._file = RecordFile(store_path, layout, world.scenario.fleet.num_devices)
        self._num_stacked = stack_size(model.layout.size, cache_bytes)
        self._reason = self._why_alone()
        self._is_stacking = self._reason is None

    @property
    def name(self) -> str:
        """The tier's name."""
        return "batched"

    @property
    def num_workers(self) -> int:
        """Processes that work."""
        return 1

    @property
    def fallback_reason(self) -> str | None:
        """Why devices, or some of them, train one by one; None if no reason was found yet."""
        return self._reason

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs; those of training as `fit`, others one after another."""
        cohort = cohort_of(jobs)
        if cohort is None:
            return self._reference.run(jobs, params, updates)
        done = self.fit(cohort, params, updates)
        return [done.row(row) for row in range(len(cohort))]

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort, stack by stack."""
        done = CohortDone.empty(cohort)
        sizes = self._world.train_sizes(cohort.devices, cohort.position)
        is_alone = self._alone(cohort)
        with _one_thread():
            idle = np.flatnonzero(~is_alone & (sizes == 0))
            self._take_idle(cohort, idle, params, done)
            for rows in self._stacks(np.flatnonzero(~is_alone & (sizes > 0)), sizes):
                if not self._train(cohort, rows, params, updates, done):
                    is_alone[rows] = True
        jobs = cohort.jobs(np.flatnonzero(is_alone).tolist(), sizes)
        for result in self._reference.run(jobs, params, updates):
            done.take(result)
        return done

    def close(self) -> None:
        """Nothing to release."""
        self._reference.close()

    def _alone(self, cohort: CohortFit) -> NDArray[np.bool_]:
        """Return which rows need more than steps: they are trained one by one [K]."""
        strategy = self._learner.strategy
        if not self._is_stacking or strategy.overrides("upload"):
            return np.ones(len(cohort), np.bool_)
        is_alone = cohort.consolidated < cohort.position  # has missed an experience
        is_alone |= cohort.begun > cohort.position + 1  # belongs to another run: an error
        if strategy.overrides("start"):
            is_alone |= cohort.begun <= cohort.position
        return is_alone

    def _stacks(self, rows: Integers, sizes: Integers) -> Iterator[Integers]:
        """Yield the rows of each stack: devices of like sizes, the most samples first.

        Which devices share a stack follows from the cohort alone.
        """
        rows = rows[np.argsort(-sizes[rows], kind="stable")]
        groups = [rows]
        if self._linear is None:  # a stack's devices take the same steps
            groups = np.split(rows, np.flatnonzero(np.diff(sizes[rows])) + 1)
        for group in groups:
            if len(group):
                yield from np.array_split(group, math.ceil(len(group) / self._num_stacked))

    def _train(
        self,
        cohort: CohortFit,
        rows: Integers,
        params: Tensor,
        updates: Tensor,
        done: CohortDone,
    ) -> bool:
        """Train a stack; return whether it could be."""
        if self._linear is None and len(rows) < FEWEST:
            return False
        devices = self._devices(cohort, rows)
        out = _rows_of(updates, rows)
        memory = None
        if self._linear is not None:
            trained = train_linear(
                self._training,
                self._linear,
                params,
                devices,
                proximal_mu=cohort.proximal_mu,
                updates=out,
            )
        else:
            try:
                trained, memory = self._train_vmapped(params, devices, cohort.proximal_mu, out)
            except Exception as error:  # whatever a hook raises; alone, it is that device's failure
                self._reason = _brief(error)
                out.zero_()
                return False
        self._admit(cohort, rows, trained, out, done)
        if out.data_ptr() != updates[rows[0]].data_ptr():
            updates[torch.from_numpy(rows)] = out
        if memory is not None and self._learner.strategy.overrides("after_step"):
            self._keep(cohort, rows, memory, done)
        return True

    def _train_vmapped(
        self, params: Tensor, devices: Devices, mu: float, out: Tensor
    ) -> tuple[TrainedStack, dict[str, Tensor]]:
        trained, memory = train_vmapped(
            self._training, params, devices, proximal_mu=mu, updates=out
        )
        check({name: tensor[0] for name, tensor in memory.items()}, self._learner.declaration)
        return trained, memory

    def _devices(self, cohort: CohortFit, rows: Integers) -> Devices:
        """Gather what a stack of devices learns from."""
        numbers = cohort.devices[rows]
        ids, starts = self._world.train_ids(numbers, cohort.position)
        seed = derive(self._learner.seed, "steps", cohort.server_round)
        names = self._learner.declaration if self._linear is None else self._read_by_steps()
        memory = self._file.read_all(numbers, cohort.read_slots[rows], names)
        return Devices(self._world.train, ids, starts, split_all(seed, numbers), memory)

    def _read_by_steps(self) -> list[str]:
        """Return the names of what a declared strategy's steps read."""
        rehearsal, pull = self._learner.strategy.rehearsal(), self._learner.strategy.pull()
        names = [] if rehearsal is None else [rehearsal.buffer]
        return names if pull is None else [*names, pull.curvature, pull.anchor]

    def _admit(
        self,
        cohort: CohortFit,
        rows: Integers,
        trained: TrainedStack,
        out: Tensor,
        done: CohortDone,
    ) -> None:
        """Take in what is finite; of the guard's schema, all else holds by construction."""
        is_finite = torch.isfinite(out.sum(1))
        if not is_finite.all():  # a sum may overflow where no term does
            is_finite = torch.isfinite(out).all(1)
        is_good = is_finite.numpy() & np.isfinite(trained.loss)
        for k in np.flatnonzero(~is_good).tolist():
            self._diverged(cohort, int(rows[k]), float(trained.loss[k]), done)
            out[k] = 0.0
        good = rows[is_good]
        done.num_examples[good] = self._world.train_sizes(cohort.devices[good], cohort.position)
        done.loss[good] = trained.loss[is_good]
        done.num_steps[good] = trained.num_steps[is_good]
        done.num_samples[good] = trained.num_samples[is_good]
        done.progress[good, 0] = cohort.position + 1

    def _keep(
        self,
        cohort: CohortFit,
        rows: Integers,
        memory: dict[str, Tensor],
        done: CohortDone,
    ) -> None:
        """Write new memories."""
        for k, row in enumerate(rows.tolist()):
            if row not in done.errors:
                own = Memory({name: tensor[k] for name, tensor in memory.items()})
                device, slot = int(cohort.devices[row]), int(cohort.write_slots[row])
                done.checksums[row] = self._file.write(device, slot, own)

    def _take_idle(
        self, cohort: CohortFit, rows: Integers, params: Tensor, done: CohortDone
    ) -> None:
        """Take in devices without samples: they take no step."""
        if len(rows) and not bool(torch.isfinite(params).all()):
            for row in rows.tolist():
                self._diverged(cohort, row, 0.0, done)
            return
        done.progress[rows, 0] = cohort.position + 1

    def _diverged(self, cohort: CohortFit, row: int, loss: float, done: CohortDone) -> None:
        device = int(cohort.devices[row])
        try:
            raise divergence(device, cohort.server_round, loss)
        except DivergenceError as error:
            done.errors[row] = failure(device, error)

    def _why_alone(self) -> str | None:
        """Return why devices must be trained one by one; None if they can be stacked."""
        model, fit = self._learner.model, self._num_stacked
        if fit < FEWEST:
            return f"{model.layout.size} parameters: {fit} devices fit a core's cache at once"
        if self._linear is not None:
            return None
        if any(isinstance(layer, _CONVOLUTIONS) for layer in model.module.modules()):
            return "convolutions of many devices at once are slower than one by one"
        if model.layout.size != model.layout.num_trained:
            return "some of the network's tensors are not trained by gradient"
        return self._probe()

    def _probe(self) -> str | None:
        """Return why hooks or network can't be stacked, found out by two made-up devices.

        Not by the first real ones, so that a run that is resumed decides as it did before.
        """
        store, size = self._world.train, self._learner.spec.batch_size
        ids = np.arange(min(size, len(store.y)), dtype=np.int32)
        initial = self._learner.initial_state(store).memory
        devices = Devices(
            store,
            np.concatenate([ids, ids]),
            len(ids) * np.arange(3),
            split_all(self._learner.seed, np.arange(2)),
            {name: torch.stack([tensor, tensor]) for name, tensor in initial.items()},
        )
        params = self._learner.model.initial()
        try:
            with _one_thread():
                self._train_vmapped(params, devices, 0.0, params.repeat(2, 1))
        except Exception as error:
            return _brief(error)
        return None


def why_batched(world: World) -> str | None:
    """Return why this tier is the best that one process can do; None if it may not be."""
    learner, cohort = make_learner(world), world.scenario.fleet.cohort
    training = Training(learner.model, learner.strategy, learner.spec)
    count = min(cohort, stack_size(learner.model.layout.size))
    if count < FEWEST or training.linear_stack(world.sample_shape) is None:
        return None
    return f"{learner.model.layout.size} parameters: {count} devices train as one"


def stack_size(num_params: int, cache_bytes: int | None = None) -> int:
    """Return how many devices fit half of a core's own cache, with their parameters alone.

    Args:
        num_params: Length of the flat vector, P.
        cache_bytes: Size of that cache; None asks this machine.
    """
    cache = _cache_bytes() if cache_bytes is None else cache_bytes
    return min(_MOST, cache // 2 // (4 * max(1, num_params)))


def _cache_bytes() -> int:
    """Return the size of the first core's L2 cache; 1 MiB where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        text = _L2_CACHE.read_text().strip()
        return int(text[:-1]) * _UNITS[text[-1]]
    return 2**20


def _rows_of(updates: Tensor, rows: Integers) -> Tensor:
    """Return where a stack's updates go: these rows if they are neighbours, else a new tensor."""
    first = int(rows[0])
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        return updates[first : first + len(rows)]
    return torch.empty(len(rows), updates.shape[1])


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """More threads would change the order of sums, and be slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
