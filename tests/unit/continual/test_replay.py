from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.memory import Memory, check
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Encoding, OwnedSamples, Samples, SharedSamples

MODEL = FlatModel(nn.Linear(2, 4))
FACTS = Facts(num_experiences=2, num_classes=4, sample_bytes=65)
STORE = SharedSamples(
    torch.arange(100, dtype=torch.uint8)[:, None].repeat(1, 2), torch.arange(100) // 25, Encoding()
)


def declared(**kwargs):
    return Replay(**kwargs).declare(MODEL, FACTS)


def start(strategy):
    return Memory.initial(strategy.declare(MODEL, FACTS), STORE)


def samples(*ids):
    return Samples(STORE, torch.tensor(ids, dtype=torch.int32))


def finish(strategy, memory, data, seed=0):
    generator = torch.Generator().manual_seed(seed)
    memory = strategy.finish(MODEL, MODEL.initial(), data, memory, generator)
    check(memory, strategy.declare(MODEL, FACTS))
    return memory


def held(memory):
    return sorted(memory["buffer"][memory["buffer"] != EMPTY].tolist())


def test_the_size_of_the_buffer():
    assert declared(capacity=17)["buffer"].capacity == 17
    assert declared(memory_kib=1)["buffer"].capacity == 1024 // 65
    assert declared(memory_kib=0.001)["buffer"].capacity == 1
    assert declared()["buffer"].capacity == 200
    assert declared()["seen"].shape == (4,)


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "herding"])
def test_the_buffer_takes_in_what_has_ended(policy):
    strategy = Replay(capacity=10, policy=policy)
    memory = finish(strategy, start(strategy), samples(0, 1, 2))
    assert held(memory) == [0, 1, 2]
    memory = finish(strategy, memory, samples(*range(25, 60)))
    assert len(held(memory)) == 10
    assert set(held(memory)) <= {0, 1, 2, *range(25, 60)}
    assert memory["seen"].tolist() == [3, 25, 10, 0]
    if policy != "reservoir":
        kept = torch.bincount(STORE.labels(memory["buffer"]), minlength=4)
        assert kept.tolist() in ([3, 4, 3, 0], [3, 3, 4, 0])


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "herding"])
def test_an_experience_without_samples(policy):
    strategy = Replay(capacity=3, policy=policy)
    memory = finish(strategy, start(strategy), samples())
    assert held(memory) == []
    memory = finish(strategy, finish(strategy, memory, samples(5, 6)), samples())
    assert held(memory) == [5, 6]
    assert memory["seen"].tolist() == [2, 0, 0, 0]


ANGLES = torch.tensor([3.0, 87.0, 40.0, 44.0, 1.0, 46.0, 30.0, 60.0]) * torch.pi / 180
POINTS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1) * torch.linspace(1, 9, 8)[:, None]


def herded(strategy, memory, *ids):
    store = SharedSamples(POINTS, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), Encoding())
    memory = Memory(memory, store)
    data = Samples(store, torch.tensor(ids, dtype=torch.int32))
    return strategy.finish(MODEL, MODEL.initial(), data, memory, torch.Generator())


def test_herding_keeps_the_nearest_to_the_mean_of_features_of_length_1():
    strategy = Replay(capacity=3, policy="herding")
    memory = herded(strategy, start(strategy), 0, 1, 2, 3)
    # The mean's direction is 43.5 degrees: 44 is next to it, and with it 40; then 87 with these.
    assert memory["buffer"].tolist() == [3, 2, 1]
    # Of two classes each gets its part; the first one drops what it chose last.
    memory = herded(strategy, memory, 6, 7)
    assert memory["buffer"].tolist()[:2] == [3, 2]
    assert memory["buffer"].tolist()[2] in (6, 7)
    assert memory["seen"].tolist() == [4, 2, 0, 0]


def test_herding_chooses_anew_where_a_class_comes_again():
    strategy = Replay(capacity=2, policy="herding")
    memory = herded(strategy, start(strategy), 0, 4)
    assert sorted(memory["buffer"].tolist()) == [0, 4]
    crowd = memory.replace(seen=torch.tensor([1000, 0, 0, 0]))
    # Two for a thousand hold against one that is new; two for two do not.
    assert herded(strategy, crowd, 1)["buffer"].tolist()[0] in (0, 4)
    assert sorted(herded(strategy, crowd, 1)["buffer"].tolist()) == [0, 4]
    assert 1 in herded(strategy, memory, 1)["buffer"].tolist()


def test_which_samples_stay_is_a_matter_of_the_generator():
    strategy = Replay(capacity=10)
    runs = [
        held(finish(strategy, start(strategy), samples(*range(100)), seed)) for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert max(runs[0]) > 20  # not the first that came


def test_nothing_is_replayed_before_the_first_experience_has_ended():
    strategy = Replay()
    batch = samples(0, 1).batch()
    assert strategy.extend(batch, start(strategy), torch.Generator()) is batch


@pytest.mark.parametrize(("replay_batch", "expected"), [(0, 3), (2, 2), (5, 5), (50, 10)])
def test_how_many_are_replayed(replay_batch, expected):
    strategy = Replay(capacity=10, replay_batch=replay_batch)
    memory = finish(strategy, start(strategy), samples(*range(10)))
    batch = strategy.extend(samples(90, 91, 92).batch(), memory, torch.Generator())
    assert batch.x[:3, 0].tolist() == [90, 91, 92]
    assert len(batch) == 3 + expected
    assert len(set(batch.x[3:, 0].tolist())) == expected
    assert max(batch.x[3:, 0].tolist()) < 10
    assert batch.weight is None


def test_the_share_of_what_is_replayed():
    strategy = Replay(capacity=10, replay_batch=4, share=0.2)
    memory = finish(strategy, start(strategy), samples(*range(10)))
    weight = strategy.extend(samples(90, 91).batch(), memory, torch.Generator()).weight
    torch.testing.assert_close(weight, torch.tensor([0.4, 0.4, 0.05, 0.05, 0.05, 0.05]))


def test_a_real_device_stores_the_samples_themselves():
    store = OwnedSamples.empty((2,), torch.uint8, Encoding())
    strategy = Replay(memory_kib=0.01)
    facts = Facts(2, 4, store.sample_bytes)
    assert store.sample_bytes == 3
    memory = Memory.initial(strategy.declare(MODEL, facts), store)
    ids = store.add(STORE.x[:20], STORE.y[:20])
    memory = strategy.finish(MODEL, MODEL.initial(), Samples(store, ids), memory, torch.Generator())
    store.retain(memory["buffer"])
    assert int(store.used.sum()) == 3
    replayed = memory.draw("buffer", 3, torch.Generator())
    assert set(replayed.x[:, 0].tolist()) <= set(range(20))
    assert len(set(replayed.x[:, 0].tolist())) == 3


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"memory_kib": 1, "capacity": 1}, "not both"),
        ({"memory_kib": -1}, "not below 0"),
        ({"capacity": -1}, "not below 0"),
        ({"policy": "newest"}, "policy is 'newest'; allowed: class-balanced, reservoir, herding"),
        ({"share": 1.1}, "share is 1.1; at most 1"),
        ({"replay_batch": -1}, "replay_batch is -1; at least 0"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        Replay(**kwargs)
