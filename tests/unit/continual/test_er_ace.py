from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from edgelearn.continual.er_ace import ERACE
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Encoding, Samples, SharedSamples
from edgelearn.scenario.stream import Experience

MODEL = FlatModel(nn.Linear(4, 5))
FACTS = Facts(num_experiences=2, num_classes=5, sample_bytes=5)
STORE = SharedSamples(torch.rand(40, 4), torch.arange(40) % 5, Encoding())
PARAMS = torch.randn(MODEL.layout.size, generator=torch.Generator().manual_seed(0))


def memory_of(*experiences):
    strategy = ERACE()
    memory = Memory.initial(strategy.declare(MODEL, FACTS), STORE)
    for position, classes in enumerate(experiences):
        memory = strategy.start(MODEL, PARAMS, memory, Experience(position, position, classes))
    return memory


def mixed(seed=0, present=(3, 4, 3), past=(0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(present) + len(past), 4, generator=generator)
    return Batch(x, torch.tensor([*present, *past]), None, None, torch.arange(len(past)))


def cross_entropy(logits, label, classes):
    return math.log(sum(math.exp(float(logits[c])) for c in classes)) - float(logits[label])


@pytest.mark.parametrize(
    ("experiences", "part"),
    [
        ([(0, 1), (2, 3)], 1 / 2),
        ([(0,), (1, 2), (3,)], 1 / 4),
        ([(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)], 1 / 3),
        ([(0, 1, 2), (2, 3)], 3 / 8),
    ],
)
def test_the_loss_by_hand(experiences, part):
    batch, memory = mixed(present=(3, 2, 3)), memory_of(*experiences)
    logits, labels = MODEL(PARAMS, batch.x), batch.y.tolist()

    def mean(rows, classes):
        terms = [cross_entropy(logits[n], labels[n], classes) for n in rows]
        return sum(terms) / len(terms)

    seen = range(4)  # class 4 has not been seen
    expected = mean(range(3), (2, 3))
    expected += (1 - part) * mean(range(3, 7), seen) + part * mean(range(3), seen)
    assert float(ERACE().loss(MODEL, PARAMS, batch, memory)) == pytest.approx(expected, rel=1e-5)


def test_it_pushes_old_classes_less_than_replay():
    batch = mixed(present=(3, 4) * 4, past=(0, 1, 2))

    def push(loss):
        leaf = PARAMS.clone().requires_grad_()
        rows = torch.autograd.grad(loss(leaf), leaf)[0][20:]  # of the biases
        return float(rows[:3].sum())

    memory = memory_of((0,), (1,), (2,), (3, 4))
    ace = push(lambda p: ERACE().loss(MODEL, p, batch, memory))
    plain = push(lambda p: supervised_loss(MODEL(p, batch.x), batch))
    assert ace < plain


def test_without_a_past_it_is_cross_entropy():
    strategy, batch = ERACE(), Samples(STORE, torch.arange(6, dtype=torch.int32)).batch()
    memory = memory_of((0, 1))
    assert strategy.extend(batch, memory, torch.Generator()) is batch
    assert torch.equal(
        strategy.loss(MODEL, PARAMS, batch, memory),
        supervised_loss(MODEL(PARAMS, batch.x), batch),
    )


def test_within_a_task_the_classes_of_the_task_compete():
    batch, memory = mixed(present=(3, 4), past=(0,)), memory_of((0, 1), (2, 3, 4))
    mask = torch.tensor([[False, False, True, True, False]] * 3)
    mask[1] = torch.tensor([False, False, False, True, True])
    mask[2] = torch.tensor([True, True, False, False, False])
    batch = Batch(batch.x, batch.y, None, mask, batch.places)
    logits = MODEL(PARAMS, batch.x)
    expected = cross_entropy(logits[0], 3, (3,)) / 2 + cross_entropy(logits[1], 4, (3, 4)) / 2
    expected += 0.4 * cross_entropy(logits[2], 0, (0, 1))
    expected += 0.6 * cross_entropy(logits[0], 3, (2, 3)) / 2
    expected += 0.6 * cross_entropy(logits[1], 4, (3, 4)) / 2
    assert float(ERACE().loss(MODEL, PARAMS, batch, memory)) == pytest.approx(expected, rel=1e-5)


def test_classes_are_noted_when_they_begin():
    memory = memory_of((1, 3))
    again = ERACE().start(MODEL, PARAMS, memory, Experience(1, 1, (0, 1)))
    assert again["times"].tolist() == [1, 2, 0, 1, 0]
    assert again["present"].tolist() == [True, True, False, False, False]
    assert memory["times"].tolist() == [0, 1, 0, 1, 0]


def test_the_buffer_takes_in_what_has_ended():
    strategy = ERACE(capacity=6, replay_batch=4)
    memory = Memory.initial(strategy.declare(MODEL, FACTS), STORE)
    data = Samples(STORE, torch.arange(30, dtype=torch.int32))
    memory = strategy.finish(MODEL, PARAMS, data, memory, torch.Generator())
    assert len(set(memory["buffer"].tolist())) == 6
    batch = strategy.extend(data.batch(slice(0, 2)), memory, torch.Generator())
    assert (len(batch), batch.num_past) == (6, 4)


@pytest.mark.slow
def test_avalanche_has_half_of_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        theirs = pytest.importorskip("avalanche.training.regularization").ACECriterion()
    memory = memory_of((0, 1, 4), (2, 3), (4,))  # p is 1/10
    for seed in range(3):
        batch = mixed(seed, present=(4,), past=(0, 1, 2, 3, 4, 0, 1, 2, 3))
        logits = MODEL(PARAMS, batch.x)
        buffer = logits.roll(-1, 0), batch.y.roll(-1, 0)  # the past, then the present
        half = theirs(logits[:1], batch.y[:1], *buffer)
        torch.testing.assert_close(ERACE().loss(MODEL, PARAMS, batch, memory), 2 * half)


def test_bad_arguments():
    with pytest.raises(ValueError, match="replay_batch is -2"):
        ERACE(replay_batch=-2)
