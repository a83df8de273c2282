"""Local training of many devices by `torch.func.vmap` over a strategy's hooks.

For networks and strategies that no written-out pass knows: autograd, once for all devices. Hooks
are pure functions of tensors, so the same ones work on a stack of devices; unless they look at
numbers (`.item()`, `if tensor:`), draw from torch's global generator, or write into tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad_and_value, vmap

from edgelearn.continual.memory import Declaration, Memory, check
from edgelearn.device.optimizer import PathKeeper, make_optimizer
from edgelearn.device.stacked import StackTrained
from edgelearn.device.training import Training
from edgelearn.errors import StrategyError
from edgelearn.scenario.samples import Batch, Samples, SampleStore


@dataclass(frozen=True, slots=True)
class Learners:
    """Devices with equally many samples, to be trained together.

    Attributes:
        samples: Of each device, all from one store.
        seeds: Of each one's training [K].
        memory: All that they remember, by name [K, ...].
    """

    samples: Sequence[Samples]
    seeds: NDArray[np.uint64]
    memory: Mapping[str, Tensor]


def train_vmapped(
    training: Training,
    declaration: Declaration,
    params: Tensor,
    learners: Learners,
    *,
    proximal_mu: float = 0.0,
) -> tuple[StackTrained, dict[str, Tensor]]:
    """Train devices together, each from the same parameters.

    Args:
        training: How; all parameters of its network are trained by gradient.
        declaration: What the strategy remembers.
        params: Global parameters [P].
        learners: K devices.
        proximal_mu: FedProx's mu.

    Returns:
        The outcome, and all that the devices remember then [K, ...] by name.

    Raises:
        Exception: Whatever a hook or the network raises because it can't be stacked.
    """
    count, store = len(learners.samples), learners.samples[0].store
    memory = dict(learners.memory)
    hooks = _Hooks(training, store, memory)
    training.model.module.train()
    local = params.repeat(count, 1)
    optimizer = make_optimizer(training.spec, local)
    keeps_account = training.strategy.overrides("after_step")
    path = None if keeps_account else hooks.path(local, memory)
    every_step = [
        training.steps(samples, _row(memory, k, store), int(learners.seeds[k]))
        for k, samples in enumerate(learners.samples)
    ]
    total, num_steps, num_samples = torch.zeros(count, dtype=torch.float64), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap warns of slow fallbacks
        for steps in zip(*every_step, strict=True):
            batch = _stacked([step.batch for step in steps])
            gradients, losses = hooks.gradient(local, batch, memory)
            with torch.no_grad():
                gradients = hooks.adjust(gradients, local, memory)
                if proximal_mu:
                    gradients = gradients + proximal_mu * (local - params)
                if path is not None:
                    charged = hooks.charged(gradients, local)
                    path.before()
                gradients = hooks.pulled(gradients, local)
                before = local.clone() if keeps_account else local
                optimizer.step(gradients)
                hooks.proximal(local, memory)
                if path is not None:
                    path.after(charged)
                if keeps_account:
                    memory = hooks.after_step(before, local.clone(), gradients, memory)
                    for k, step in enumerate(steps):
                        step.memory = _row(memory, k, store)
            total += losses
            num_steps, num_samples = num_steps + 1, num_samples + batch["y"].shape[1]
    if path is not None:
        memory |= path.tensors(memory)
    check({name: rows[0] for name, rows in memory.items()}, declaration)
    loss = total.numpy() / max(num_steps, 1)
    counts = np.full(count, num_steps, np.int64), np.full(count, num_samples, np.int64)
    return StackTrained(local, loss, *counts), memory


class _Hooks:
    """A strategy's hooks for all devices at once; tensors are [K, ...]."""

    def __init__(
        self, training: Training, store: SampleStore, memory: Mapping[str, Tensor]
    ) -> None:
        self._model, self._strategy, self._spec = training.model, training.strategy, training.spec
        self._store = store
        self._adjusts = self._strategy.overrides("adjust")
        self._has_proximal = self._strategy.overrides("proximal")
        pull, begun = self._strategy.pull(), self._memory(memory)
        self._implicit: tuple[Tensor, Tensor] | None = None
        self._explicit: tuple[Tensor, Tensor] | None = None
        if pull is not None and pull.is_explicit:
            self._explicit = begun[pull.anchor], pull.strength * begun[pull.curvature]
        elif pull is not None and not self._has_proximal:
            self._implicit = begun[pull.anchor], pull.weight(begun, lr=self._spec.lr)

    def path(self, params: Tensor, memory: Mapping[str, Tensor]) -> PathKeeper | None:
        """Return what keeps the path integrals [K, P] that are declared, if any."""
        path, spec = self._strategy.path(), self._spec
        if path is None:
            return None
        is_bent = self._has_proximal or not (self._implicit is self._explicit is None)
        is_straight = spec.is_plain_sgd and not spec.weight_decay and not is_bent
        charge = memory[path.charge].clone()
        return PathKeeper(path, charge, params, lr=spec.lr, is_straight=is_straight)

    def gradient(
        self, params: Tensor, batch: Mapping[str, Tensor], memory: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients [K, P] of the losses, and these [K]."""

        def loss(own: Tensor, batch: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Tensor:
            return self._strategy.loss(self._model, own, Batch(**batch), self._memory(memory))

        gradients, losses = vmap(grad_and_value(loss))(params, batch, memory)
        return gradients, losses

    def adjust(self, gradients: Tensor, params: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """Return the gradients [K, P] as the hook changes them; an explicit pull is no part yet."""
        if not self._adjusts:
            return gradients

        def adjust(g: Tensor, own: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
            return self._strategy.adjust(g, own, self._memory(memory))

        changed: Tensor = vmap(adjust)(gradients, params, memory)
        return changed

    def pulled(self, gradients: Tensor, params: Tensor) -> Tensor:
        """Return the gradients [K, P] with that of an explicit pull, which a hook adds itself."""
        if self._explicit is None or self._adjusts:
            return gradients
        anchor, stiffness = self._explicit
        return gradients + stiffness * (params - anchor)

    def charged(self, gradients: Tensor, params: Tensor) -> Tensor:
        """Return the gradients [K, P] without that of an explicit pull, if a hook has it in."""
        if self._explicit is None or not self._adjusts:
            return gradients
        anchor, stiffness = self._explicit
        return gradients - stiffness * (params - anchor)

    def proximal(self, params: Tensor, memory: Mapping[str, Tensor]) -> None:
        """Change the parameters [K, P] in place."""
        if not self._has_proximal:
            if self._implicit is not None:
                params.lerp_(*self._implicit)
            return

        def proximal(own: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
            return self._strategy.proximal(own, self._memory(memory), lr=self._spec.lr)

        params.copy_(vmap(proximal)(params, memory))

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the memories after a step."""

        def account(
            before: Tensor, after: Tensor, g: Tensor, memory: Mapping[str, Tensor]
        ) -> dict[str, Tensor]:
            return dict(self._strategy.after_step(before, after, g, self._memory(memory)))

        kept: dict[str, Tensor] = vmap(account)(before, after, gradients, memory)
        return kept

    def _memory(self, tensors: Mapping[str, Tensor]) -> Memory:
        return Memory(tensors, self._store)


def _stacked(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the tensors of batches, stacked.

    Raises:
        StrategyError: If they differ in shape, or some have weights and others none.
    """
    names = [field.name for field in fields(Batch)]
    parts = [{name: getattr(batch, name) for name in names} for batch in batches]
    rows = [{name: t for name, t in part.items() if t is not None} for part in parts]
    shapes = [{name: t.shape for name, t in row.items()} for row in rows]
    if any(shape != shapes[0] for shape in shapes):
        raise StrategyError("`extend` gives devices batches of different shapes")
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(memory: Mapping[str, Tensor], k: int, store: SampleStore) -> Memory:
    return Memory({name: tensor[k] for name, tensor in memory.items()}, store)
