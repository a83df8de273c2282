"""Client strategies that compute what they do, for the contract of engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch


class Functional(ClientStrategy):
    """Overrides every hook of a step, each in its own way."""

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        size = model.layout.num_trained
        return {"path": TensorSpec((size,)), "steps": TensorSpec((), torch.int64)}

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        plain = super().loss(model, params, batch, memory)
        return plain + 0.01 * ((1 + memory["path"].abs()) * params.square()).sum()

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients * torch.clamp(0.2 / gradients.norm(), max=1.0)

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        return params.sign() * torch.relu(params.abs() - 1e-3 * lr)

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        path = memory["path"] + gradients * (before - after)
        return memory.replace(path=path, steps=memory["steps"] + 1)


class Noisy(ClientStrategy):
    """Sees each sample twice, once through noise of the device's own."""

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        noise = torch.randn(batch.x.shape, generator=generator)
        return batch.join(Batch(batch.x + 0.1 * noise, batch.y, None, batch.mask), share=0.3)


class Looks(ClientStrategy):
    """Looks at a number, which a stack of devices does not have."""

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients * 0.5 if float(gradients.norm()) > 1 else gradients


class Fails(ClientStrategy):
    """Raises in every step."""

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Any:
        raise ValueError("no batch today")
