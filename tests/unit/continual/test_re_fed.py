"""Re-Fed: importance along the way of the informative model, and the cache."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.memory import Memory
from edgelearn.continual.re_fed import ReFed, most_important
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import Facts, make_strategy, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Encoding, Samples, SharedSamples
from edgelearn.testing.contract import check_strategy

FACTS = Facts(num_experiences=3, num_classes=3, sample_bytes=9)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModel(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval())


def store(num=100):
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(0, 256, (num, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 3, (num,), generator=generator)
    return SharedSamples(x, y, Encoding(1 / 255))


def ids(*places):
    return torch.tensor(places, dtype=torch.int32)


def finish(strategy, params, data, memory):
    return strategy.finish(model(), params, data, memory, torch.Generator())


def by_hand(strategy, params, data):
    """Equations 3 to 5 with one gradient at a time."""
    m, v, found = model(), params.clone(), torch.zeros(len(data))
    q = (1 - strategy.locality) / (2 * strategy.locality)
    for step in range(1, strategy.steps + 1):
        gradients = []
        for i in range(len(data)):
            leaf = v.clone().requires_grad_()
            batch = data.batch(slice(i, i + 1))
            gradients += torch.autograd.grad(supervised_loss(m(leaf, batch.x), batch), leaf)
        found += torch.stack([g.square().sum() for g in gradients]) / step
        moved = v - strategy.lr * torch.stack(gradients).mean(0)
        # argmin_z  lr q |z - w|^2 / 2 + |z - moved|^2 / 2
        v = (moved + strategy.lr * q * params) / (1 + strategy.lr * q)
    return found


@pytest.mark.parametrize("locality", [0.2, 0.5, 1.0])
def test_importance_is_that_of_the_paper(locality):
    strategy = ReFed(locality=locality, steps=4, lr=0.5)
    data = Samples(store(), torch.arange(70, dtype=torch.int32))  # more than one chunk
    params = model().initial()
    found = strategy.importance(model(), params, data)
    torch.testing.assert_close(found, by_hand(strategy, params, data), rtol=1e-3, atol=1e-5)


def test_a_global_informative_model_stays_where_it_is():
    data = Samples(store(), torch.arange(20, dtype=torch.int32))
    params = model().initial()
    once = ReFed(steps=1).importance(model(), params, data)
    bound = ReFed(steps=3, locality=1e-6).importance(model(), params, data)
    free = ReFed(steps=3, locality=1.0, lr=0.5).importance(model(), params, data)
    torch.testing.assert_close(bound, once * (1 + 1 / 2 + 1 / 3), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(free, bound, rtol=1e-2)


def test_old_samples_compete_with_new_ones():
    strategy, shelf = ReFed(capacity=6, steps=2), store()
    memory = Memory.initial(strategy.declare(model(), FACTS), shelf)
    params = model().initial()
    first = finish(strategy, params, Samples(shelf, ids(*range(30))), memory)
    assert (memory["cache"] == EMPTY).all()
    second = finish(strategy, params, Samples(shelf, ids(*range(30, 60))), first)
    every = torch.cat([first["cache"], ids(*range(30, 60))])
    importance = strategy.importance(model(), params, Samples(shelf, every))
    best = every[importance.argsort(descending=True)[:6]]
    assert second["cache"].tolist() == best.tolist()
    assert set(best.tolist()) & set(range(30))
    assert set(best.tolist()) & set(range(30, 60))


def test_a_cache_that_is_not_full_keeps_all():
    strategy, shelf = ReFed(capacity=10), store()
    memory = Memory.initial(strategy.declare(model(), FACTS), shelf)
    kept = finish(strategy, model().initial(), Samples(shelf, ids(3, 5, 8)), memory)["cache"]
    assert sorted(kept.tolist()) == [EMPTY] * 7 + [3, 5, 8]
    assert (kept[3:] == EMPTY).all()


def test_a_balanced_cache_is_shared_by_classes():
    strategy, shelf = ReFed(capacity=9, is_balanced=True), store()
    memory = Memory.initial(strategy.declare(model(), FACTS), shelf)
    kept = finish(strategy, model().initial(), Samples(shelf, ids(*range(100))), memory)["cache"]
    assert torch.bincount(shelf.labels(kept)).tolist() == [3, 3, 3]


def test_a_device_without_samples_keeps_its_cache():
    strategy, shelf = ReFed(capacity=4), store()
    memory = Memory.initial(strategy.declare(model(), FACTS), shelf)
    params = model().initial()
    assert finish(strategy, params, Samples(shelf, ids()), memory) is memory
    full = finish(strategy, params, Samples(shelf, ids(*range(9))), memory)
    again = finish(strategy, params, Samples(shelf, ids()), full)
    assert sorted(again["cache"].tolist()) == sorted(full["cache"].tolist())


def test_groups_take_turns():
    importance = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    assert most_important(importance, groups, 4).tolist() == [0, 5, 1, 4]
    assert most_important(importance, groups, 5).tolist() == [0, 5, 1, 4, 2]
    assert most_important(importance, groups * 0, 3).tolist() == [0, 1, 2]
    assert most_important(torch.ones(3), torch.zeros(3), 2).tolist() == [0, 1]


@pytest.mark.parametrize("size", [{"capacity": 7}, {"memory_kib": 0.1}, {}])
def test_it_stores_as_many_samples_as_replay_and_nothing_else(size):
    own = ReFed(**size).declare(model(), FACTS)
    assert list(own) == ["cache"]
    assert own["cache"] == Replay(**size).declare(model(), FACTS)["buffer"]


def test_what_is_cached_joins_the_batch():
    strategy, shelf = ReFed(capacity=4, replay_batch=3), store()
    memory = Memory.initial(strategy.declare(model(), FACTS), shelf)
    memory = finish(strategy, model().initial(), Samples(shelf, ids(*range(20))), memory)
    batch = Samples(shelf, ids(50, 51)).batch()
    joined = strategy.extend(batch, memory, torch.Generator())
    assert len(joined) == 5
    assert set(memory["cache"][joined.places].tolist()) <= set(range(20))
    assert strategy.is_declared  # so that compiled engines run it


def test_it_goes_with_penalties_and_not_with_another_buffer():
    findings = check_strategy(lambda: make_strategy("re-fed+ewc", {"re-fed": {"capacity": 4}}))
    assert not [f for f in findings if f.passed is False]
    with pytest.raises(Exception, match="only one part can be one that replays"):
        make_strategy("re-fed+replay", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_kib": 1.0, "capacity": 3}, "give one of the two"),
        ({"capacity": -1}, "not below 0"),
        ({"locality": 0.0}, "locality is 0.0; allowed: above 0, at most 1"),
        ({"locality": 1.1}, "locality is 1.1"),
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"lr": 0.0}, "lr is 0.0; allowed: above 0"),
        ({"replay_batch": -1}, "replay_batch is -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReFed(**arguments)
