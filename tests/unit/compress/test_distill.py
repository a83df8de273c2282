from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from edgelearn.compress.distill import hard_distillation, soft_distillation


def logits(seed, rows=5, classes=6):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def by_hand(student, teacher, temperature):
    """In plain Python, one row."""

    def softmax(row):
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    pairs = zip(softmax(teacher), softmax(student), strict=True)
    return temperature**2 * sum(p * math.log(p / q) for p, q in pairs)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_soft_by_hand(temperature):
    student, teacher = logits(0), logits(1)
    found = soft_distillation(student, teacher, temperature=temperature)
    expected = [
        by_hand(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_soft_has_the_gradient_of_cross_entropy_to_soft_labels():
    student, teacher = logits(0).requires_grad_(), logits(1)
    (found,) = torch.autograd.grad(
        soft_distillation(student, teacher, temperature=3.0).sum(), student
    )
    labels = F.softmax(teacher / 3, 1)
    (expected,) = torch.autograd.grad(
        9 * F.cross_entropy(student / 3, labels, reduction="sum"), student
    )
    torch.testing.assert_close(found, expected)


def test_gradients_keep_their_size_at_high_temperature():
    """T^2: towards infinity the gradient is (z - v) / C for centred logits (Hinton et al., 2.1)."""
    student, teacher = logits(0), logits(1)
    student, teacher = student - student.mean(1, True), teacher - teacher.mean(1, True)
    leaf = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(soft_distillation(leaf, teacher, temperature=500.0).sum(), leaf)
    torch.testing.assert_close(found, (student - teacher) / 6, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_within_some_classes_is_that_of_these_alone(temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)
    mask = torch.tensor([True, False, True, True, False, False])
    found = soft_distillation(student, teacher, temperature=temperature, mask=mask)
    few = soft_distillation(student[:, mask], teacher[:, mask], temperature=temperature)
    torch.testing.assert_close(found, few)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert not gradient[:, ~mask].any()
    assert gradient[:, mask].all()


def test_equal_answers_cost_nothing():
    assert float(soft_distillation(logits(0), logits(0), temperature=2.0).abs().max()) == 0


def test_hard_is_cross_entropy_to_the_teachers_choice():
    student, teacher = logits(0), logits(1)
    expected = F.cross_entropy(student, teacher.argmax(1), reduction="none")
    torch.testing.assert_close(hard_distillation(student, teacher), expected)
    mask = torch.tensor([True, False, True, True, False, False])
    few = hard_distillation(student[:, mask], teacher[:, mask])
    torch.testing.assert_close(hard_distillation(student, teacher, mask=mask), few)


@pytest.mark.parametrize(
    "loss", [hard_distillation, lambda *a, **k: soft_distillation(*a, temperature=2.0, **k)]
)
def test_no_class_is_no_loss_and_the_teacher_has_no_gradient(loss):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[3] = True
    found = loss(student, teacher, mask=mask)
    assert found[3] > 0
    assert not found[[0, 1, 2, 4]].any()
    gradient, none = torch.autograd.grad(found.sum(), (student, teacher), allow_unused=True)
    assert none is None
    assert gradient[3].any()
    assert not gradient[[0, 1, 2, 4]].any()


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature is 0; above 0"):
        soft_distillation(logits(0), logits(1), temperature=0)
