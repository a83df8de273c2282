from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgelearn.continual.combined import Combined
from edgelearn.continual.der import DER, DERpp, dark_loss, same_sample
from edgelearn.continual.ewc import EWC
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Batch, Encoding, OwnedSamples, Samples, SharedSamples

MODEL = FlatModel(nn.Linear(2, 3))
FACTS = Facts(num_experiences=3, num_classes=3, sample_bytes=9)
X = torch.randint(0, 256, (60, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
STORE = SharedSamples(X, torch.arange(60) % 3, Encoding(1 / 255))
KINDS = [DER, DERpp]


def params(seed):
    return torch.randn(MODEL.layout.size, generator=torch.Generator().manual_seed(seed))


def initial(strategy, store=STORE):
    return Memory.initial(strategy.declare(MODEL, FACTS), store)


def samples(first, last):
    return Samples(STORE, torch.arange(first, last, dtype=torch.int32))


def finish(strategy, memory, data, seed):
    generator = torch.Generator().manual_seed(seed)
    memory = strategy.finish(MODEL, params(seed), data, memory, generator)
    check(memory, strategy.declare(MODEL, FACTS))
    return memory


def cross_entropy(logits, label):
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


@pytest.mark.parametrize(("beta", "kind"), [(0.0, DER), (0.7, DERpp)])
def test_the_loss_by_hand(kind, beta):
    strategy = DER(alpha=0.4) if kind is DER else DERpp(alpha=0.4, beta=beta)
    memory = initial(strategy)
    stored = torch.randn(memory["logits"].shape, generator=torch.Generator().manual_seed(1))
    memory = memory.replace(logits=stored)
    places = torch.tensor([7, 2, 7])
    batch = Batch(torch.rand(5, 2), torch.tensor([0, 2, 1, 1, 0]), None, None, places)
    logits = MODEL(params(0), batch.x).tolist()
    expected = sum(cross_entropy(logits[n], int(batch.y[n])) for n in (0, 1)) / 2
    for n, place in enumerate(places.tolist(), start=2):
        for c in range(3):
            expected += 0.4 * (logits[n][c] - float(stored[place, c])) ** 2 / 9
        expected += beta * cross_entropy(logits[n], int(batch.y[n])) / 3
    assert float(strategy.loss(MODEL, params(0), batch, memory)) == pytest.approx(expected)


def test_only_derpp_looks_at_the_labels_of_stored_samples():
    places = torch.tensor([0, 1])
    x = torch.rand(3, 2)
    one = Batch(x, torch.tensor([0, 1, 2]), None, None, places)
    other = Batch(x, torch.tensor([0, 2, 1]), None, None, places)
    losses = [
        [float(s.loss(MODEL, params(0), b, initial(s))) for b in (one, other)]
        for s in (DER(), DERpp(), DERpp(beta=0.0, alpha=0.3))
    ]
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1]
    assert losses[2] == losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_past_it_is_cross_entropy(kind):
    strategy = kind()
    batch = samples(0, 5).batch()
    assert strategy.extend(batch, initial(strategy), torch.Generator()) is batch
    assert torch.equal(
        strategy.loss(MODEL, params(0), batch, initial(strategy)),
        supervised_loss(MODEL(params(0), batch.x), batch),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_task_labels_compete_but_answers_are_whole(kind):
    strategy = kind(alpha=1.0)
    memory = initial(strategy)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    batch = Batch(torch.rand(2, 2), torch.tensor([0, 2]), None, mask, torch.tensor([0]))
    logits = MODEL(params(0), batch.x)
    expected = cross_entropy(logits[0, :2].tolist(), 0) + float(logits[1].square().mean())
    if kind is DERpp:
        expected += 0.5 * cross_entropy(logits[1, 1:].tolist(), 1)
    assert float(strategy.loss(MODEL, params(0), batch, memory)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["class-balanced", "reservoir"])
def test_logits_stay_with_their_samples(kind, policy):
    strategy = kind(capacity=9, policy=policy)
    memory, entered = initial(strategy), {}
    for experience in range(5):
        data = samples(12 * experience, 12 * experience + 12)
        before = set(memory["buffer"].tolist())
        memory = finish(strategy, memory, data, experience)
        ids = memory["buffer"].tolist()
        entered |= {i: experience for i in ids if i not in before}
        for place, i in enumerate(ids):
            x = STORE.batch(torch.tensor([i])).x
            expected = MODEL(params(entered[i]), x)[0]
            torch.testing.assert_close(memory["logits"][place], expected)
    assert len({entered[i] for i in memory["buffer"].tolist()}) > 1  # some stayed, some are new


@pytest.mark.parametrize("kind", KINDS)
def test_the_buffer_is_that_of_replay(kind):
    ours, plain = kind(capacity=7, replay_batch=3), Replay(capacity=7, replay_batch=3)
    assert ours.rehearsal() == plain.rehearsal()
    memory, other = initial(ours), initial(plain)
    for seed in range(3):
        data = samples(20 * seed, 20 * seed + 20)
        memory, other = finish(ours, memory, data, seed), finish(plain, other, data, seed)
    assert torch.equal(memory["buffer"], other["buffer"])
    assert torch.equal(memory["seen"], other["seen"])
    with_logits = ours.declare(MODEL, Facts(3, 10, 9))["logits"]
    assert with_logits.shape == (7, 10)


def test_where_nothing_lies_there_are_no_logits():
    strategy = DER(capacity=5)
    memory = finish(strategy, initial(strategy), samples(0, 2), 0)
    empty = memory["buffer"] == EMPTY
    assert int(empty.sum()) == 3
    assert not memory["logits"][empty].any()
    assert memory["logits"][~empty].all()
    again = finish(strategy, memory, samples(0, 0), 1)
    assert torch.equal(again["logits"], memory["logits"])


def test_a_slot_that_is_used_anew_has_the_new_sample_s_logits():
    store = OwnedSamples.empty((2,), torch.uint8, Encoding(1 / 255))
    strategy = DER(capacity=4, policy="reservoir")
    memory = initial(strategy, store)
    for seed in range(6):
        ids = store.add(X[6 * seed : 6 * seed + 6], STORE.y[:6])
        before = {bytes(store.x[i].numpy()) for i in memory["buffer"].tolist() if i != EMPTY}
        kept = memory["logits"].clone()
        memory = finish(strategy, memory, Samples(store, ids), seed)
        for place, i in enumerate(memory["buffer"].tolist()):
            if bytes(store.x[i].numpy()) in before:
                assert (memory["logits"][place] == kept).all(1).any()
            else:
                expected = MODEL(params(seed), store.batch(torch.tensor([i])).x)[0]
                torch.testing.assert_close(memory["logits"][place], expected)
        store.retain(memory["buffer"])
    assert len(store.y) < 6 * 6  # slots were used again


def test_places_of_ids():
    table = torch.tensor([5, -1, 9, 2, 9], dtype=torch.int32)
    ids = torch.tensor([9, 3, 2, 5, 100, -7], dtype=torch.int32)
    assert same_sample(ids, table).tolist() == [2, -1, 3, 0, -1, -1]
    assert same_sample(ids, table[:0]).tolist() == [-1] * 6
    assert same_sample(ids[:0], table).tolist() == []


@pytest.mark.parametrize(
    ("kind", "kwargs", "expected"),
    [
        (DER, {"alpha": -0.1}, "alpha is -0.1; at least 0"),
        (DER, {"alpha": float("nan")}, "alpha is nan"),
        (DERpp, {"alpha": -1}, "alpha is -1; at least 0"),
        (DERpp, {"beta": -1}, "beta is -1; at least 0"),
        (DER, {"policy": "newest"}, "policy is 'newest'"),
        (DERpp, {"memory_kib": 1, "capacity": 1}, "not both"),
    ],
)
def test_bad_arguments(kind, kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        kind(**kwargs)


def test_with_ewc_beside_it():
    together = Combined({"der": DERpp(capacity=6), "ewc": EWC(step="explicit")})
    memory = Memory.initial(together.declare(MODEL, FACTS), STORE)
    memory = together.finish(MODEL, params(0), samples(0, 20), memory, torch.Generator())
    batch = together.extend(samples(30, 34).batch(), memory, torch.Generator().manual_seed(1))
    assert batch.num_past == 4
    stored = memory["der.logits"]
    expected = dark_loss(MODEL(params(1), batch.x), batch, stored, alpha=0.1, beta=0.5)
    torch.testing.assert_close(together.loss(MODEL, params(1), batch, memory), expected)
    with pytest.raises(ValueError, match=r"replaces the loss|replays"):
        Combined({"der": DER(), "derpp": DERpp()})
