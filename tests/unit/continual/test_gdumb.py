from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgelearn
from edgelearn.continual.gdumb import GDumb, greedy_balanced
from edgelearn.continual.local import LocalTask
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.strategy import Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Encoding, Samples, SharedSamples
from edgelearn.scenario.spec import ClientSpec
from edgelearn.scenario.stream import Experience
from edgelearn.seeds import permutation, split
from edgelearn.testing.toy import toy_devices, toy_learner, toy_scenario

FACTS = Facts(num_experiences=2, num_classes=4, sample_bytes=13)
LABELS = torch.arange(80) // 20
STORE = SharedSamples(
    torch.randn(80, 3, generator=torch.Generator().manual_seed(0)), LABELS, Encoding()
)
SPEC = ClientSpec(strategy="gdumb", lr=0.1, epochs=2, batch_size=4)
STRATEGY = GDumb(capacity=10)


def network(module=None):
    module = module or nn.Linear(3, 4)
    shapes = {name: spec.shape for name, spec in STRATEGY.shares(None, FACTS).items()}
    return FlatModel(module, shapes)


MODEL = network()


def given(model, seed, begun):
    params = torch.randn(model.layout.size, generator=torch.Generator().manual_seed(seed))
    model.layout.shared(params)["begun"].fill_(begun)
    return params


def samples(first, last):
    return Samples(STORE, torch.arange(first, last, dtype=torch.int32))


def begun(*experiences, model=MODEL):
    """The memory after some experiences, with one more begun."""
    memory = Memory.initial(STRATEGY.declare(model, FACTS), STORE)
    for position in range(len(experiences) + 1):
        memory = STRATEGY.start(model, model.initial(), memory, Experience(position, position, ()))
        if position < len(experiences):
            data, generator = experiences[position], torch.Generator().manual_seed(position)
            memory = STRATEGY.finish(model, model.initial(), data, memory, generator)
        check(memory, STRATEGY.declare(model, FACTS))
    return memory


def fit(memory, data, params, model=MODEL, seed=5, **kwargs):
    model.module.train()
    return STRATEGY.fit(LocalTask(model, params, memory, data, SPEC, seed, **kwargs))


def counts(memory):
    ids = memory["buffer"]
    return torch.bincount(LABELS[ids[ids != EMPTY].long()], minlength=4).tolist()


# -- the buffer ------------------------------------------------------------------------------------


def take(capacity, *labels_of_parts):
    """Let samples arrive part by part; return the labels that are kept."""
    labels = torch.tensor([label for part in labels_of_parts for label in part])
    ids, first = torch.full((capacity,), EMPTY, dtype=torch.int32), 0
    for seed, part in enumerate(labels_of_parts):
        arriving = torch.arange(first, first + len(part), dtype=torch.int32)
        held = labels[ids.clamp(min=0).long()]
        generator = torch.Generator().manual_seed(seed)
        ids = greedy_balanced(ids, held, arriving, labels[arriving.long()], generator)
        first += len(part)
    kept = [i for i in ids.tolist() if i != EMPTY]
    assert len(set(kept)) == len(kept)
    return kept, sorted(labels[kept].tolist())


def test_the_sampler_by_hand():
    kept, labels = take(4, [7, 7, 7, 7, 7])
    assert labels == [7, 7, 7, 7]
    assert sorted(kept) == [0, 1, 2, 3]  # greedy: nobody of a class that has enough gives way
    assert take(4, [7] * 5, [8])[1] == [7, 7, 7, 8]
    assert take(4, [7] * 5, [8, 8, 8])[1] == [7, 7, 8, 8]
    assert take(5, [7] * 5, [8] * 5)[1] == [7, 7, 8, 8, 8]  # 2 < 5 / 2
    assert take(5, [7] * 5, [8] * 5, [9])[1] == [7, 7, 8, 8, 9]
    assert take(4, [0, 1, 2, 3], [4])[1][-1] == 4
    assert take(6, [1, 2], [1])[1] == [1, 1, 2]
    assert take(3, [], [1])[1] == [1]


def test_who_gives_way_is_drawn():
    gone = set()
    for seed in range(20):
        ids = torch.arange(4, dtype=torch.int32)
        out = greedy_balanced(
            ids,
            torch.zeros(4, dtype=torch.int64),
            torch.tensor([9], dtype=torch.int32),
            torch.tensor([1]),
            torch.Generator().manual_seed(seed),
        )
        gone |= set(range(4)) - set(out.tolist())
    assert gone == {0, 1, 2, 3}


def test_the_size_of_the_buffer():
    assert GDumb().declare(MODEL, FACTS)["buffer"].capacity == 200
    assert GDumb(memory_kib=1).declare(MODEL, FACTS)["buffer"].capacity == 78
    assert GDumb(memory_kib=0.001).declare(MODEL, FACTS)["buffer"].capacity == 1


# -- training --------------------------------------------------------------------------------------


def slowly(model, params, ids, seed):
    """SGD from `params` on some samples, step by step."""
    current = params.clone().requires_grad_()
    for epoch in range(SPEC.epochs):
        order = torch.from_numpy(permutation(split(seed, epoch), len(ids)))
        for places in order.split(SPEC.batch_size):
            batch = STORE.batch(ids[places])
            loss = F.cross_entropy(model(current, batch.x), batch.y)
            (gradient,) = torch.autograd.grad(loss, current)
            current = (current - SPEC.lr * gradient).detach().requires_grad_()
    return current.detach()


@pytest.mark.parametrize("has_begun", [False, True])
def test_it_begins_again_once_for_the_whole_fleet(has_begun):
    memory = begun(samples(0, 20))
    params = given(MODEL, 1, 2.0000001 if has_begun else 1.0)
    done = fit(memory, samples(20, 60), params)
    ids = done.memory["buffer"]
    assert sorted(counts(done.memory)) == [0, 3, 3, 4]
    start = params if has_begun else MODEL.initial()
    expected = slowly(MODEL, start, ids, 5)
    network_size = MODEL.layout.num_network
    torch.testing.assert_close(done.params[:network_size], expected[:network_size])
    assert float(MODEL.layout.shared(done.params)["begun"]) == 2.0
    assert (done.num_steps, done.num_samples) == (6, 20)


def test_what_is_not_in_the_buffer_teaches_nothing():
    memory = fit(begun(), samples(0, 40), given(MODEL, 1, 1)).memory
    params = given(MODEL, 2, 1)
    x = STORE.x.clone()
    outside = [i for i in range(40) if i not in memory["buffer"].tolist()]
    x[outside] += 5.0
    changed = Memory(dict(memory), SharedSamples(x, LABELS, Encoding()))
    one, other = fit(memory, samples(0, 40), params), fit(changed, samples(0, 40), params)
    assert len(outside) == 30
    assert torch.equal(one.params, other.params)
    assert torch.equal(other.memory["buffer"], memory["buffer"])


def test_an_experience_is_taken_in_once():
    memory = fit(begun(), samples(0, 40), given(MODEL, 1, 0)).memory
    assert memory["taken"].tolist() == [samples(0, 40).fingerprint]
    again = fit(memory, samples(0, 40), given(MODEL, 2, 1), seed=6).memory
    assert torch.equal(again["buffer"], memory["buffer"])
    done = STRATEGY.finish(MODEL, MODEL.initial(), samples(0, 40), memory, torch.Generator())
    assert torch.equal(done["buffer"], memory["buffer"])
    away = STRATEGY.finish(MODEL, MODEL.initial(), samples(0, 40), begun(), torch.Generator())
    assert counts(away) == [5, 5, 0, 0]


def test_what_comes_in_parts_is_taken_in_by_part():
    memory = begun()
    for first, expected in ((0, [10, 0, 0, 0]), (20, [5, 5, 0, 0]), (40, [4, 3, 3, 0])):
        memory = fit(memory, samples(first, first + 20), given(MODEL, 1, 1)).memory
        assert sorted(counts(memory)) == sorted(expected)
    done = STRATEGY.finish(MODEL, MODEL.initial(), samples(0, 60), memory, torch.Generator())
    assert torch.equal(done["buffer"], memory["buffer"])  # nothing twice
    ids = done["buffer"]
    assert len(ids.unique()) == len(ids)


def test_batch_norm_begins_again_too():
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model, memory = network(module), begun()
    first = fit(memory, samples(0, 40), given(model, 1, 0), model)
    second = fit(memory, samples(0, 40), given(model, 2, 0), model)
    assert torch.equal(first.params, second.params)
    statistics = model.layout.views(first.params)["1.running_mean"]
    assert statistics.abs().min() > 0


def test_fedprox_and_optimizers():
    memory = begun()
    params = given(MODEL, 1, 1)
    free = fit(memory, samples(0, 40), params).params
    bound = fit(memory, samples(0, 40), params, proximal_mu=5.0).params
    assert (bound - params).norm() < 0.9 * (free - params).norm()
    for optimizer in ("adam", "adamw"):
        task = LocalTask(MODEL, params, memory, samples(0, 40), SPEC, 5)
        other = STRATEGY.fit(replace(task, spec=replace(SPEC, optimizer=optimizer))).params
        assert not torch.equal(other, free)


def test_in_a_learner_the_network_is_trained_on_what_is_stored():
    learner, device = toy_learner(GDumb(capacity=8)), toy_devices(1, num_per_class=20)[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in (0, 1):
        for turn in range(6):
            server_round = 6 * position + turn + 1
            fit = learner.fit(state, params, device, position=position, server_round=server_round)
            state = fit.state
            params = params + learner.model.layout.flatten(fit.update.arrays)
        state = learner.consolidate(state, params, device, upto=position + 1)
    assert float(learner.model.layout.shared(params)["begun"]) == 2
    for position in (0, 1):
        batch = device.samples(position).batch()
        hits = learner.model(params, batch.x).argmax(1) == batch.y
        assert float(hits.float().mean()) > 0.8


def test_a_fleet_remembers_with_it():
    record = edgelearn.simulate(
        toy_scenario(
            client={"strategy": "gdumb", "args": {"capacity": 8}, "epochs": 5},
            stream={"rounds_per_experience": 3},
            fleet={"num_devices": 6, "cohort": 3},
        )
    )
    assert record.scores().average_accuracy > 0.8


@pytest.mark.parametrize("kwargs", [{"capacity": -1}, {"memory_kib": 1, "capacity": 1}])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match="not both, and not below 0"):
        GDumb(**kwargs)
