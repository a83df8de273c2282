"""Learning without forgetting: on new samples, answer about old classes as the old network did."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from edgelearn.compress.distill import soft_distillation
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.mode import evaluating
from edgelearn.continual.storage import Storage, check_kind
from edgelearn.continual.strategy import ClientStrategy, Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch
from edgelearn.scenario.stream import Experience


@final
class LwF(ClientStrategy):
    """Distill the parameters with which an experience began into those that learn it.

    The loss is cross-entropy + alpha sum_g T^2 KL(teacher || student), both within the classes g,
    by softmax of logits / T (`soft_distillation`). The teacher is the global parameters when the
    device began its current experience. In a task-incremental stream g goes over the classes of
    each experience that the device had before, as each task has a head of its own in the paper;
    else there is one g, all classes that it had before. In its first experience there is none.

    Classes count as learned that occur in an experience that the device has begun, whether it has
    samples of them or not: the global parameters know them from other devices.

    Reference: Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv:1606.09282. We differ:
    the factor T^2 (Hinton et al. 2015, arXiv:1503.02531), so that alpha need not change with T, and
    no phase that warms up a new head. Of a network with batch norm the teacher has the parameters
    of its time, but the running statistics of now.

    Args:
        alpha: Weight of distillation, at least 0; the default is what the paper mostly takes.
        temperature: T, above 0.
        storage: How the teacher is kept: "float32", "float16" or "int8" (`Storage`).
    """

    def __init__(
        self, *, alpha: float = 1.0, temperature: float = 2.0, storage: str = "float32"
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}; at least 0 is allowed")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; above 0 is allowed")
        self.alpha = alpha
        self.temperature = temperature
        self.storage = check_kind(storage)

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare the teacher, and classes by experience: those begun, and those before now."""
        classes = TensorSpec((facts.num_experiences, facts.num_classes), torch.bool)
        return {**self._stored(model).declaration(), "begun": classes, "old": classes}

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; a round begins plainly if nothing is decoded."""
        return super().overrides(hook) and (hook != "enter" or self.storage != "float32")

    def start(
        self, model: FlatModel, params: Tensor, memory: Memory, experience: Experience
    ) -> Memory:
        """Take the global parameters as teacher of all that came before."""
        old, begun = memory["begun"].clone(), memory["begun"].clone()
        begun[experience.position, list(experience.classes)] = True
        memory = self._stored(model).put(memory, {"teacher": params.clone()})
        return memory.replace(old=old, begun=begun)

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode what is stored cheaply."""
        return params, self._stored(model).unpacked(memory)

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return cross-entropy plus distillation."""
        logits = model(params, batch.x)
        with evaluating(model.module), torch.no_grad():
            teacher = model(memory["teacher"], batch.x)
        old = memory["old"]
        if batch.mask is None:
            old = old.any(0, keepdim=True)
        each = soft_distillation(
            logits[:, None], teacher[:, None], temperature=self.temperature, mask=old
        ).sum(1)
        distillation = each.mean() if batch.weight is None else (each * batch.weight).sum()
        return supervised_loss(logits, batch) + self.alpha * distillation

    def _stored(self, model: FlatModel) -> Storage:
        return Storage(self.storage, model.layout.num_trained, {"teacher": False})
