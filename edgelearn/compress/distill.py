"""Losses that make a network answer as a teacher does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Instead of -inf: where no class is left, the loss is 0 and not NaN, with a derivative of 0.
_NEVER = -1e9


def soft_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Distillation with soft labels: T^2 KL(p_teacher || p_student), p = softmax(logits / T).

    T^2 keeps the size of gradients when T changes. The divergence differs from the cross-entropy
    of the paper by the teacher's entropy, which has no gradient: so equal answers cost nothing.

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
    arXiv:1503.02531.

    Args:
        logits: Of the student [..., C].
        teacher_logits: [..., C]; treated as constants.
        temperature: T, above 0.
        mask: Classes to be compared, bool, broadcast with [..., C]; None is all. Rows without any
            cost nothing.

    Returns:
        The loss of each row [...], in nats.

    Raises:
        ValueError: If the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; above 0 is allowed")
    student = F.log_softmax(_within(logits, mask) / temperature, dim=-1)
    teacher = F.log_softmax(_within(teacher_logits.detach(), mask) / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def hard_distillation(
    logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Distillation with hard labels: cross-entropy to the class that the teacher finds likeliest.

    What is left of soft labels without temperature where T -> 0; for labels that a teacher gives
    to samples that have none.

    Args:
        logits: Of the student [..., C].
        teacher_logits: [..., C]; treated as constants.
        mask: Classes to choose from, bool, broadcast with [..., C]; None is all. Rows without any
            cost nothing.

    Returns:
        The loss of each row [...], in nats.
    """
    student = F.log_softmax(_within(logits, mask), dim=-1)
    labels = _within(teacher_logits.detach(), mask).argmax(-1, keepdim=True)
    loss = -student.gather(-1, labels).squeeze(-1)
    if mask is None:
        return loss
    return torch.where(mask.any(-1), loss, torch.zeros_like(loss))


def _within(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits if mask is None else logits.masked_fill(~mask, _NEVER)
