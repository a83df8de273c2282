from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.lwf import LwF
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.strategy import Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch
from edgelearn.scenario.stream import Experience

FACTS = Facts(num_experiences=3, num_classes=6, sample_bytes=9)
EXPERIENCES = [Experience(p, p, (2 * p, 2 * p + 1)) for p in range(3)]


def model(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 6)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(5))
    return FlatModel(nn.Sequential(*layers))


def begin(strategy, m, count, *, experiences=EXPERIENCES):
    """Begin some experiences, each with other parameters; return the last ones too."""
    memory = Memory.initial(strategy.declare(m, FACTS))
    for position, experience in enumerate(experiences[:count]):
        params = m.initial()[: m.layout.num_trained] + 0.1 * position
        memory = strategy.start(m, params, memory, experience)
        check(memory, strategy.declare(m, FACTS))
    return strategy.enter(m, m.initial(), memory)[1], params


def batch(classes=(4, 5), *, mask=False, weight=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 8, generator=generator)
    y = torch.tensor(classes)[torch.randint(0, len(classes), (7,), generator=generator)]
    masks = torch.zeros(7, 6, dtype=torch.bool)
    masks[:, list(classes)] = True
    return Batch(x, y, weight, masks if mask else None)


def divergence(student, teacher, classes, temperature):
    log_q = F.log_softmax(student[:, classes] / temperature, 1)
    log_p = F.log_softmax(teacher[:, classes] / temperature, 1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def test_the_first_experience_is_plain():
    m, strategy = model(), LwF(alpha=3.0)
    memory, _ = begin(strategy, m, 1)
    theta = (m.initial() + 0.5).requires_grad_()
    loss = strategy.loss(m, theta, batch((0, 1)), memory)
    plain = supervised_loss(m(theta, batch((0, 1)).x), batch((0, 1)))
    assert float(loss.detach()) == float(plain.detach())
    pair = [torch.autograd.grad(value, theta)[0] for value in (loss, plain)]
    torch.testing.assert_close(*pair)


def test_all_classes_that_came_before_are_distilled_together():
    m, strategy = model(), LwF(alpha=0.7, temperature=3.0)
    memory, teacher = begin(strategy, m, 3)
    theta, b = m.initial() + 0.5, batch()
    expected = (
        F.cross_entropy(m(theta, b.x), b.y)
        + 0.7 * divergence(m(theta, b.x), m(teacher, b.x), [0, 1, 2, 3], 3.0).mean()
    )
    torch.testing.assert_close(strategy.loss(m, theta, b, memory), expected)


def test_with_tasks_each_former_one_has_a_head():
    m, strategy = model(), LwF(alpha=0.7)
    memory, teacher = begin(strategy, m, 3)
    theta, b = m.initial() + 0.5, batch(mask=True)
    logits, old = m(theta, b.x), m(teacher, b.x)
    expected = F.cross_entropy(logits[:, 4:], b.y - 4) + 0.7 * sum(
        divergence(logits, old, classes, 2.0).mean() for classes in ([0, 1], [2, 3])
    )
    torch.testing.assert_close(strategy.loss(m, theta, b, memory), expected)


def test_domains_have_all_classes_from_the_second_on():
    every = [Experience(p, p, tuple(range(6))) for p in range(3)]
    m, strategy = model(), LwF()
    memory, teacher = begin(strategy, m, 2, experiences=every)
    theta, b = m.initial() + 0.5, batch()
    expected = (
        F.cross_entropy(m(theta, b.x), b.y)
        + divergence(m(theta, b.x), m(teacher, b.x), list(range(6)), 2.0).mean()
    )
    torch.testing.assert_close(strategy.loss(m, theta, b, memory), expected)


def test_weights_of_samples_count():
    weight = torch.linspace(0, 1, 7) / 3.5
    m, strategy = model(), LwF()
    memory, teacher = begin(strategy, m, 2)
    theta, b = m.initial() + 0.5, batch(weight=weight)
    each = F.cross_entropy(m(theta, b.x), b.y, reduction="none")
    each = each + divergence(m(theta, b.x), m(teacher, b.x), [0, 1], 2.0)
    torch.testing.assert_close(strategy.loss(m, theta, b, memory), (each * weight).sum())


def test_the_teacher_stays_that_of_the_start_and_has_no_gradient():
    m, strategy = model(), LwF()
    memory, teacher = begin(strategy, m, 2)
    assert torch.equal(memory["teacher"], teacher)
    assert memory["teacher"].data_ptr() != teacher.data_ptr()
    pulled = {**memory, "teacher": memory["teacher"].requires_grad_()}
    loss = strategy.loss(m, m.initial().requires_grad_(), batch(), Memory(pulled))
    loss.backward()
    assert memory["teacher"].grad is None


def test_the_teacher_leaves_batch_norm_alone():
    m, strategy = model(norm=True), LwF()
    memory, teacher = begin(strategy, m, 2)
    m.module.train()
    m.carry(m.initial())
    plain = m.module[1].running_mean.clone()
    m(teacher, batch().x)
    moved = m.module[1].running_mean.clone()
    m.carry(m.initial())
    strategy.loss(m, teacher, batch(), memory)
    assert torch.equal(m.module[1].running_mean, moved)  # once, by the student
    assert not torch.equal(moved, plain)
    assert m.module[1].training


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_cheap_teacher_is_nearly_the_same(storage):
    m = model()
    full, teacher = begin(LwF(), m, 2)
    cheap, _ = begin(LwF(storage=storage), m, 2)
    bound = 2e-3 if storage == "float16" else 1 / 200
    assert (cheap["teacher"] - teacher).abs().max() <= bound * teacher.abs().max()
    losses = [
        s.loss(m, m.initial() + 0.5, batch(), memory)
        for s, memory in ((LwF(), full), (LwF(storage=storage), cheap))
    ]
    assert losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


@pytest.mark.slow
def test_distillation_equals_avalanches_but_for_the_factor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        regularization = pytest.importorskip("avalanche.training.regularization")
    m = model()
    theirs = regularization.LearningWithoutForgetting(alpha=1, temperature=2)
    strategy = LwF(temperature=2.0, alpha=0.25)  # T^2 = 4
    memory, teacher = begin(strategy, m, 3)
    task = SimpleNamespace(targets=SimpleNamespace(uniques={0, 1, 2, 3}))
    labels = SimpleNamespace(uniques=[0])
    dataset = SimpleNamespace(targets_task_labels=labels, task_set={0: task})
    with torch.no_grad():
        for name, parameter in m.module.named_parameters():
            parameter.copy_(m.layout.views(teacher)[name])
    theirs.post_adapt(SimpleNamespace(model=m.module), SimpleNamespace(dataset=dataset))
    theta, b = (m.initial() + 0.5).requires_grad_(), batch()
    ours = strategy.loss(m, theta, b, memory) - supervised_loss(m(theta, b.x), b)
    expected = theirs(b.x, m(theta, b.x), m.module)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    pair = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (ours, expected)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"alpha": -1.0}, "alpha is -1.0; at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0; above 0"),
        ({"storage": "int4"}, "storage is 'int4'"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        LwF(**kwargs)
