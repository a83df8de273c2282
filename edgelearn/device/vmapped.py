"""Local training of many devices by `torch.func.vmap` over a strategy's hooks.

For networks and strategies that no written-out pass knows: autograd, once for all devices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from edgelearn.continual.memory import Memory
from edgelearn.device.stacked import TrainedStack
from edgelearn.device.stacked_batches import Devices
from edgelearn.device.training import Step, Training, make_optimizer
from edgelearn.scenario.samples import Batch, Samples, SampleStore


class NoStackError(ValueError):
    """Devices can't be trained as one stack; the message is the reason."""


def train_vmapped(
    training: Training,
    params: Tensor,
    devices: Devices,
    *,
    proximal_mu: float,
    updates: Tensor,
) -> tuple[TrainedStack, dict[str, Tensor]]:
    """Train a stack of devices with equally many samples by `torch.func.vmap` over the hooks.

    Args:
        training: How; all parameters of its model are trained by gradient.
        params: Global parameters [P].
        devices: K devices; `memory` holds all that the strategy declares.
        proximal_mu: FedProx's mu.
        updates: Takes local - global [K, P].

    Returns:
        The outcome, and the memories then.

    Raises:
        NoStackError: If the hooks give the devices batches of different shapes.
        Exception: What a hook or the network raises because it can't be stacked.
    """
    training.model.module.train()
    hooks = _Hooks(training, devices.store)
    memory = dict(devices.memory)
    local = params.repeat(len(devices), 1)
    optimizer = make_optimizer(training.spec, local)
    losses = np.zeros(len(devices))
    count, num_samples = 0, np.zeros(len(devices), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap warns of slow fallbacks
        for steps in zip(*_steps(training, devices), strict=True):
            batch = _stacked([step.batch for step in steps])
            gradients, loss = hooks.gradient(local, batch, memory)
            with torch.no_grad():
                gradients = hooks.adjust(gradients, local, memory)
                if proximal_mu:
                    gradients = gradients + proximal_mu * (local - params)
                before = local.clone()
                optimizer.step(gradients)
                hooks.proximal(local, memory)
                if training.strategy.overrides("after_step"):
                    memory = hooks.after_step(before, local.clone(), gradients, memory)
                    for k, step in enumerate(steps):
                        step.memory = _row(memory, k, devices.store)
            losses += loss.numpy()
            count, num_samples = count + 1, num_samples + batch["y"].shape[1]
    torch.sub(local, params, out=updates)
    counts = np.full(len(devices), count, np.int64)
    return TrainedStack(losses / count, counts, num_samples), memory


class _Hooks:
    """A strategy's hooks for all devices at once; tensors are [K, ...]."""

    def __init__(self, training: Training, store: SampleStore) -> None:
        self._model, self._strategy, self._spec = training.model, training.strategy, training.spec
        self._store = store
        pull = self._strategy.pull()
        self._explicit = pull if pull is not None and pull.is_explicit else None
        self._implicit = pull if pull is not None and not pull.is_explicit else None

    def gradient(
        self, params: Tensor, batch: Mapping[str, Tensor], memory: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients [K, P] of the losses, and these [K]."""

        def loss(own: Tensor, batch: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Tensor:
            return self._strategy.loss(self._model, own, Batch(**batch), self._memory(memory))

        gradients, losses = vmap(grad_and_value(loss))(params, batch, memory)
        return gradients, losses

    def adjust(self, gradients: Tensor, params: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """Return the changed gradients [K, P]."""
        if not self._strategy.overrides("adjust"):
            if self._explicit is None:
                return gradients
            return gradients + self._explicit.gradient(params, self._memory(memory))

        def adjust(g: Tensor, own: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
            return self._strategy.adjust(g, own, self._memory(memory))

        changed: Tensor = vmap(adjust)(gradients, params, memory)
        return changed

    def proximal(self, params: Tensor, memory: Mapping[str, Tensor]) -> None:
        """Change the parameters [K, P] in place."""
        if not self._strategy.overrides("proximal"):
            if self._implicit is not None:
                weight = self._implicit.weight(self._memory(memory), lr=self._spec.lr)
                params.lerp_(memory[self._implicit.anchor], weight)
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


def _steps(training: Training, devices: Devices) -> list[Iterator[Step]]:
    """Return the steps of each device, as it takes them alone."""
    ids, ends = torch.from_numpy(devices.ids), devices.starts.tolist()
    return [
        training.steps(
            Samples(devices.store, ids[ends[k] : ends[k + 1]]),
            _row(devices.memory, k, devices.store),
            int(devices.seeds[k]),
        )
        for k in range(len(devices))
    ]


def _stacked(batches: list[Batch]) -> dict[str, Tensor]:
    """Return the tensors of batches, stacked.

    Raises:
        NoStackError: If they differ in shape, or some have weights and others none.
    """
    parts = [{"x": b.x, "y": b.y, "weight": b.weight, "mask": b.mask} for b in batches]
    rows = [{name: t for name, t in part.items() if t is not None} for part in parts]
    shapes = [{name: t.shape for name, t in row.items()} for row in rows]
    if any(shape != shapes[0] for shape in shapes):
        raise NoStackError("devices have batches of different shapes")
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(memory: Mapping[str, Tensor], k: int, store: SampleStore) -> Memory:
    return Memory({name: tensor[k] for name, tensor in memory.items()}, store)
