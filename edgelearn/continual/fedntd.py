"""FedNTD: keep what the global network thinks of the classes that a sample is not of."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from edgelearn.compress.distill import soft_distillation
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.mode import evaluating
from edgelearn.continual.strategy import ClientStrategy, Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch


@final
class FedNTD(ClientStrategy):
    r"""Distill the global network of the round into the local one, the true class left out.

    The loss is cross-entropy + beta T^2 KL(q~_global || q~_local), where q~ is the softmax of
    logits / T over all classes but the sample's own. Local data say what a sample is, so the true
    class need not be held; what a device has no samples of, its training would forget, and the
    global network still knows from others. `lwf` holds the network from before an experience, and
    only in classes of earlier ones; this holds the one that came with the round, in all.

    Where tasks are known the softmax is over the classes of the sample's task. The teacher, 4 T
    bytes for T trained parameters, is needed in a round and not stored.

    Reference: Lee, Jeong, Shin, Bae, Yun, "Preservation of the Global Knowledge by Not-True
    Distillation in Federated Learning", NeurIPS 2022, arXiv:2106.03097, equations 3 and 4. We
    differ: the factor T^2 (Hinton et al. 2015, arXiv:1503.02531), so that beta need not change with
    T; it is 1 at the paper's T. Batch norm of the teacher has the running statistics of now.

    Args:
        beta: Weight of distillation, at least 0.
        temperature: T, above 0.
    """

    def __init__(self, *, beta: float = 1.0, temperature: float = 1.0) -> None:
        if not beta >= 0:
            raise ValueError(f"beta is {beta}; at least 0 is allowed")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; above 0 is allowed")
        self.beta = beta
        self.temperature = temperature

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the teacher, for the time of a round."""
        return {"teacher": TensorSpec((model.layout.num_trained,), is_kept=False)}

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Take the global parameters as teacher."""
        return params, memory.replace(teacher=params[: model.layout.num_trained].clone())

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return cross-entropy plus distillation of the classes that samples are not of."""
        logits = model(params, batch.x)
        with evaluating(model.module), torch.no_grad():
            teacher = model(memory["teacher"], batch.x)
        others = batch.y[:, None] != torch.arange(logits.shape[1])
        if batch.mask is not None:
            others = others & batch.mask
        each = soft_distillation(logits, teacher, temperature=self.temperature, mask=others)
        distillation = each.mean() if batch.weight is None else (each * batch.weight).sum()
        return supervised_loss(logits, batch) + self.beta * distillation
