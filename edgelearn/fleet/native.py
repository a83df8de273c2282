"""Native tier: a cohort's training in one call of compiled code, one thread per core.

Covers plain stacks (`edgelearn.stack`) with client strategies that declare what they do, and SGD;
`why_not` says what keeps a scenario from it. Everything but plain local training (consolidation,
evaluation, a device that has to catch up) is done as the reference tier does it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.strategy import Pull, Rehearsal
from edgelearn.device.learner import Learner
from edgelearn.device.learners import make_learner
from edgelearn.device.tracking import Trackers
from edgelearn.fleet import together
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Job
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.scenario.samples import EMPTY
from edgelearn.scenario.world import World
from edgelearn.stack import Conv2d, Flatten, Layer, Linear, MaxPool2d, NotAStackError, Stack

MISSING = "edgelearn-native is not installed"
_FIRST_WITH_PATHS = (0, 1, 1)


def is_installed() -> bool:
    """Whether the compiled kernels are there."""
    return importlib.util.find_spec("edgelearn_native") is not None


def _version() -> tuple[int, ...]:
    import edgelearn_native

    return tuple(int(part) for part in re.findall(r"\d+", edgelearn_native.__version__)[:3])


def why_not(world: World, learner: Learner) -> str | None:
    """Return what keeps a scenario from the native tier; None if nothing does."""
    if not is_installed():
        return MISSING
    if (reason := together.holds_parts(world)) is not None:
        return reason
    if (reason := together.not_declared(learner)) is not None:
        return reason
    pull = learner.strategy.pull()
    if pull is not None and pull.is_explicit:
        return f"{type(learner.strategy).__name__} takes its penalty as a gradient"
    if learner.strategy.path() is not None and _version() < _FIRST_WITH_PATHS:
        first = ".".join(map(str, _FIRST_WITH_PATHS))
        return f"edgelearn-native is too old to keep a path integral; from {first} on it does"
    if world.train.meanings is not None:
        return "the meaning of labels changes between domains"
    try:
        _plan(Stack.of(learner.model, world.sample_shape))
    except NotAStackError as error:
        return f"the network is no plain stack: {error}"
    except ValueError as error:
        return str(error)
    return None


@final
class NativeEngine:
    """Compiled training, and a reference engine for the rest."""

    def __init__(self, world: World, store_path: Path, *, num_threads: int) -> None:
        """Make ready; `why_not` must have nothing to say.

        Args:
            world: The scenario's world.
            store_path: The fleet's state.
            num_threads: Devices that train at once.
        """
        import edgelearn_native as kernels

        self._world, self._num_threads, self._kernels = world, num_threads, kernels
        self._learner = make_learner(world)
        self._rest = ReferenceEngine(world, store_path, num_threads=num_threads)
        self._memories = together.open_memories(world, self._learner, store_path)
        self._plan = _plan(Stack.of(self._learner.model, world.sample_shape))
        self._data = _data(world)
        self._trackers = Trackers.of(world)

    @property
    def name(self) -> str:
        """The tier's name."""
        return "native"

    @property
    def num_workers(self) -> int:
        """Threads that train."""
        return self._num_threads

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs; training goes to the compiled code."""
        return together.run(jobs, params, updates, self.fit, self._rest.run)

    def fit(self, cohort: CohortFit, params: Tensor, updates: Tensor) -> CohortDone:
        """Train a cohort in one call, apart from devices that have to catch up first."""
        return together.fit(
            cohort,
            params,
            updates,
            self._world,
            self._learner,
            self._memories,
            self._train,
            self._rest.run,
            self._trackers,
        )

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P], added up in the order of rows."""
        return mean(updates, weights, num_threads=self._num_threads)

    def buffer(self, rows: int, size: int) -> Tensor:
        """Return memory for updates [rows, size]."""
        return torch.zeros(rows, size)

    def close(self) -> None:
        """Nothing to release."""
        self._rest.close()

    def _train(self, cohort: CohortFit, params: Tensor, out: Tensor) -> together.Trained:
        """Train all of a cohort in one call."""
        spec, path = self._learner.spec, self._learner.strategy.path()
        ids, starts = self._world.train_ids(
            cohort.devices, cohort.position, server_round=cohort.server_round
        )
        seeds = together.seeds_of(self._learner.seed, cohort)
        declared, kept = self._declared(cohort), self._charges(cohort)
        if path is not None:
            declared["charge"] = kept[path.charge].numpy()
        loss, steps, passed = self._plan.fit(
            self._data,
            params.numpy(),
            out.numpy(),
            ids=ids,
            starts=starts,
            seeds=seeds,
            draw_seeds=seeds,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            lr=spec.lr,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            proximal_mu=cohort.proximal_mu + self._learner.strategy.proximity(),
            num_threads=self._num_threads,
            **declared,
        )
        if path is not None and path.moved is not None:
            kept[path.moved] = together.moved(self._memories, path.moved, cohort, out)
        finite, norms = np.empty(len(cohort), bool), np.empty(len(cohort))
        self._kernels.finite_rows(out.numpy(), finite, norms, self._num_threads)
        return together.Trained(loss, steps, passed, norms, kept)

    def _charges(self, cohort: CohortFit) -> dict[str, Tensor]:
        """Return the path integrals so far [K, T], by name, if any are kept."""
        path = self._learner.strategy.path()
        if path is None:
            return {}
        places = cohort.devices, cohort.read_slots
        return {path.charge: torch.from_numpy(self._memories.gather(path.charge, *places, fill=0))}

    def _declared(self, cohort: CohortFit) -> dict[str, Any]:
        """Return the arguments for what the strategy declares."""
        strategy = self._learner.strategy
        arguments: dict[str, Any] = {}
        if (rehearsal := strategy.rehearsal()) is not None:
            arguments |= self._replay(rehearsal, cohort)
        if (pull := strategy.pull()) is not None:
            arguments |= self._pull(pull, cohort)
        return arguments

    def _replay(self, rehearsal: Rehearsal, cohort: CohortFit) -> dict[str, Any]:
        places = cohort.devices, cohort.read_slots
        buffers = self._memories.gather(rehearsal.buffer, *places, fill=EMPTY)
        held = buffers != EMPTY
        starts = np.concatenate([[0], np.cumsum(held.sum(1))]).astype(np.int64)
        return {
            "replay_ids": buffers[held],
            "replay_starts": starts,
            "replay_batch": rehearsal.count,
            "replay_share": -1.0 if rehearsal.share is None else rehearsal.share,
        }

    def _pull(self, pull: Pull, cohort: CohortFit) -> dict[str, Any]:
        places = cohort.devices, cohort.read_slots
        return {
            "curvature": self._memories.addresses(pull.curvature, *places),
            "anchor": self._memories.addresses(pull.anchor, *places),
            "curvature_size": self._learner.model.layout.num_trained,
            "strength": pull.strength,
        }


def mean(updates: Tensor, weights: NDArray[np.float64], *, num_threads: int = 1) -> Tensor:
    """Return sum_k weights_k updates_k [P], added up in the order of rows; see `Engine.mean`."""
    import edgelearn_native as kernels

    total = torch.empty(updates.shape[1])
    kernels.weighted_sum(updates.numpy(), weights, total.numpy(), num_threads)
    return total


def _plan(stack: Stack) -> Any:
    """Return the compiled kernels' plan of a stack.

    Raises:
        ValueError: If they do not cover it.
    """
    import edgelearn_native as kernels

    layers = [_as_tuple(layer) for layer in stack.layers]
    return kernels.Plan(stack.input_shape, stack.num_params, layers)


def _as_tuple(layer: Layer) -> tuple[Any, ...]:
    if isinstance(layer, Linear):
        return ("linear", layer.weight, layer.bias, layer.fan_out)
    if isinstance(layer, Conv2d):
        places = layer.weight, layer.bias, layer.channels_out
        return ("conv2d", *places, *layer.kernel, *layer.padding)
    if isinstance(layer, MaxPool2d):
        return ("maxpool2d", layer.size)
    return ("flatten",) if isinstance(layer, Flatten) else ("relu",)


def _data(world: World) -> Any:
    """Return the training samples of the whole fleet; nothing is copied."""
    import edgelearn_native as kernels

    store = world.train
    encoding, domains = store.encoding, store.domains
    return kernels.Data(
        store.x.numpy(),
        store.y.numpy(),
        scale=encoding.scale / encoding.std,
        shift=encoding.mean / encoding.std,
        domain_index=None if domains is None else domains.index.numpy(),
        domain_weight=None if domains is None else domains.weight.numpy(),
        task_masks=None if encoding.task_masks is None else encoding.task_masks.numpy(),
    )
