from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.buffers import herding
from edgelearn.continual.features import features, last_linear
from edgelearn.continual.icarl import ICaRL
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.strategy import Facts
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.samples import EMPTY, Batch, Encoding, Samples, SharedSamples
from edgelearn.scenario.stream import Experience

FACTS = Facts(num_experiences=2, num_classes=5, sample_bytes=9)
LABELS = torch.arange(100) // 20
CENTRES = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
X = CENTRES[LABELS] + 0.6 * torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
STORE = SharedSamples(X, LABELS, Encoding())


def network(activation=nn.ReLU, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlatModel(nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 5)))


MODEL = network()
PARAMS = MODEL.initial()


def initial(strategy, model=MODEL):
    return Memory.initial(strategy.declare(model, FACTS), STORE)


def of_classes(*labels, count=20):
    ids = torch.cat([torch.arange(20 * c, 20 * c + count) for c in labels])
    return Samples(STORE, ids.to(torch.int32))


NOTHING = Samples(STORE, torch.empty(0, dtype=torch.int32))


def live(strategy, *experiences, model=MODEL, params=PARAMS):
    memory = initial(strategy, model)
    for position, (classes, data) in enumerate(experiences):
        memory = strategy.start(model, params, memory, Experience(position, position, classes))
        memory = strategy.finish(model, params, data, memory, torch.Generator())
        check(memory, strategy.declare(model, FACTS))
    return memory


def by_label(memory):
    found = {}
    for i in memory["buffer"].tolist():
        if i != EMPTY:
            found.setdefault(int(LABELS[i]), []).append(i)
    return found


# -- exemplars -------------------------------------------------------------------------------------


def test_exemplars_are_herded_in_equal_parts():
    memory = live(ICaRL(capacity=10), ((0, 1, 2), of_classes(0, 1, 2)))
    kept = by_label(memory)
    assert [len(kept[c]) for c in (0, 1, 2)] == [4, 3, 3]
    for label, ids in kept.items():
        own = torch.arange(20 * label, 20 * label + 20)
        order = herding(
            F.normalize(features(MODEL, PARAMS, STORE.batch(own).x).double(), dim=1), 10
        )
        assert ids == own[order][: len(ids)].tolist()


def test_old_classes_keep_the_first_of_their_order():
    strategy = ICaRL(capacity=12)
    first = by_label(live(strategy, ((0, 1), of_classes(0, 1))))
    both = by_label(live(strategy, ((0, 1), of_classes(0, 1)), ((3, 4), of_classes(3, 4))))
    assert [len(first[c]) for c in (0, 1)] == [6, 6]
    assert [len(both[c]) for c in (0, 1, 3, 4)] == [3, 3, 3, 3]
    for label in (0, 1):
        assert both[label] == first[label][:3]


def test_a_class_that_comes_again_is_herded_from_both():
    strategy = ICaRL(capacity=5)
    again = Samples(STORE, torch.arange(10, 20, dtype=torch.int32))
    memory = live(strategy, ((0,), of_classes(0, count=10)), ((0,), again))
    kept = by_label(live(strategy, ((0,), of_classes(0, count=10))))[0]
    own = torch.tensor([*kept, *range(10, 20)])
    order = herding(F.normalize(features(MODEL, PARAMS, STORE.batch(own).x).double(), dim=1), 5)
    assert by_label(memory)[0] == own[order].tolist()


def test_few_samples_leave_places_empty():
    memory = live(ICaRL(capacity=10), ((0, 1), of_classes(0, 1, count=2)))
    assert by_label(memory).keys() == {0, 1}
    assert int((memory["buffer"] == EMPTY).sum()) == 6
    assert torch.equal(
        live(ICaRL(capacity=10), ((0, 1), NOTHING))["buffer"], initial(ICaRL(capacity=10))["buffer"]
    )


# -- the loss --------------------------------------------------------------------------------------


def binary(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def test_the_loss_by_hand():
    strategy = ICaRL(capacity=10)
    memory = live(strategy, ((0, 1), of_classes(0, 1)))
    memory = strategy.start(MODEL, PARAMS, memory, Experience(1, 1, (3,)))
    params = PARAMS + 0.3 * torch.randn(len(PARAMS), generator=torch.Generator().manual_seed(2))
    batch = strategy.extend(of_classes(3, count=4).batch(), memory, torch.Generator())
    assert batch.num_past == 4
    new, old = MODEL(params, batch.x).tolist(), MODEL(PARAMS, batch.x).tolist()
    expected = 0.0
    for n, label in enumerate(batch.y.tolist()):
        for c in (0, 1):
            expected += binary(new[n][c], 1 / (1 + math.exp(-old[n][c]))) / 8
        expected += binary(new[n][3], 1.0 if label == 3 else 0.0) / 8
    found = strategy.loss(MODEL, params, batch, memory)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_in_the_first_experience_labels_alone_count():
    strategy = ICaRL(capacity=10)
    memory = strategy.start(MODEL, PARAMS, initial(strategy), Experience(0, 0, (0, 1)))
    batch = of_classes(0, 1, count=3).batch()
    logits = MODEL(PARAMS, batch.x)[:, :2]
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(batch.y, 2).float()) * 2
    torch.testing.assert_close(strategy.loss(MODEL, PARAMS, batch, memory), expected)


def test_a_class_that_is_present_again_is_learned_by_its_label():
    strategy = ICaRL(capacity=10)
    memory = live(strategy, ((0, 1), of_classes(0, 1)))
    memory = strategy.start(MODEL, PARAMS, memory, Experience(1, 1, (0, 1)))
    other = memory.replace(old=torch.randn_like(PARAMS))
    batch = of_classes(0, 1, count=3).batch()
    assert torch.equal(
        strategy.loss(MODEL, PARAMS, batch, memory), strategy.loss(MODEL, PARAMS, batch, other)
    )


def test_weights_and_tasks():
    strategy = ICaRL(capacity=10)
    memory = strategy.start(MODEL, PARAMS, initial(strategy), Experience(0, 0, (0, 1, 2)))
    x, y = X[[0, 40]], torch.tensor([0, 2])
    mask = torch.tensor([[True, True, False, False, False], [False, False, True, True, False]])
    batch = Batch(x, y, torch.tensor([0.25, 0.75]), mask)
    logits = MODEL(PARAMS, x).tolist()
    expected = 0.25 * (binary(logits[0][0], 1.0) + binary(logits[0][1], 0.0))
    expected += 0.75 * binary(logits[1][2], 1.0)  # class 3 of its task has not been seen
    found = strategy.loss(MODEL, PARAMS, batch, memory)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_old_network_leaves_no_trace_in_batch_norm():
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5))
    model, strategy = FlatModel(module), ICaRL(capacity=10)
    carried = model.initial()
    model.carry(carried)
    module.train()
    trained = model.initial()[: model.layout.num_trained]
    memory = Memory.initial(strategy.declare(model, FACTS), STORE)
    memory = strategy.start(model, trained, memory, Experience(0, 0, (0, 1)))
    batch = of_classes(0, 1).batch()
    strategy.loss(model, trained, batch, memory)
    means = module[1].running_mean.clone()
    expected = 0.1 * F.linear(batch.x, *module[0].parameters()).mean(0)
    torch.testing.assert_close(means, expected)  # one forward pass with the usual momentum
    assert module.training


@pytest.mark.slow
def test_the_loss_is_avalanche_s_summed_over_classes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        losses = pytest.importorskip("avalanche.training.losses")
    strategy = ICaRL(capacity=10)
    memory = live(strategy, ((0, 1, 2), of_classes(0, 1, 2)))
    memory = strategy.start(MODEL, PARAMS, memory, Experience(1, 1, (3, 4)))
    params = PARAMS + 0.5
    batch = of_classes(0, 2, 3, 4, count=3).batch()
    plugin = losses.ICaRLLossPlugin()
    plugin.old_classes, plugin.old_model = [0, 1, 2], lambda x: MODEL(PARAMS, x)
    plugin.before_forward(SimpleNamespace(mb_x=batch.x))
    theirs = plugin(MODEL(params, batch.x), batch.y)
    torch.testing.assert_close(strategy.loss(MODEL, params, batch, memory), 5 * theirs)


def test_the_old_network_is_the_one_at_the_end():
    strategy = ICaRL(capacity=10)
    memory = live(strategy, ((0,), NOTHING), params=PARAMS + 1)
    assert torch.equal(memory["old"], PARAMS + 1)
    memory = strategy.start(MODEL, PARAMS + 2, memory, Experience(1, 1, (1, 2)))
    assert torch.equal(memory["old"], PARAMS + 1)
    assert memory["known"].tolist() == [True, False, False, False, False]
    assert memory["present"].tolist() == [False, True, True, False, False]


# -- the answer ------------------------------------------------------------------------------------


def nearest_mean(model, params, x, groups):
    """The class whose mean of normalized features, normalized, is nearest: algorithm 1."""
    phi = F.normalize(features(model, params, x), dim=1)
    labels = list(groups)
    means = []
    for label in labels:
        own = F.normalize(features(model, params, X[groups[label]]), dim=1).mean(0)
        means.append(own / own.norm())
    nearest = torch.cdist(phi.double(), torch.stack(means).double()).argmin(1)
    return torch.tensor(labels)[nearest]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("seed", range(3))
def test_the_served_network_answers_with_the_nearest_mean(activation, seed):
    model = network(activation, seed)
    params, strategy = model.initial(), ICaRL(capacity=20)
    memory = live(
        strategy, ((0, 1), of_classes(0, 1)), ((2, 4), of_classes(2, 4)), model=model, params=params
    )
    own = strategy.serve(model, params, memory, NOTHING, torch.Generator())
    expected = nearest_mean(model, params, X, by_label(memory))
    assert torch.equal(model(own, X).argmax(1), expected)
    assert 3 not in expected
    assert len(set(expected.tolist())) == 4
    head = last_linear(model)
    torch.testing.assert_close(head.weights(own).norm(dim=1), torch.tensor([1.0, 1, 1, 0, 1]))
    assert torch.equal(own[: head.weight.start], params[: head.weight.start])


def test_a_class_without_a_mean_is_never_answered():
    model, strategy = network(nn.Tanh), ICaRL(capacity=20)
    params = model.initial()
    memory = live(strategy, ((2,), of_classes(2)), model=model, params=params)
    own = strategy.serve(model, params, memory, NOTHING, torch.Generator())
    logits = model(own, -X)
    assert float(logits[:, 2].min()) < 0  # so an output of 0 would win
    assert logits.argmax(1).eq(2).all()
    answers = Int8Runtime().prepare(model, own).calibrated(-X)(-X).argmax(1)
    assert answers.eq(2).all()


def test_the_int8_network_answers_with_it_too():
    strategy = ICaRL(capacity=20)
    memory = live(strategy, ((0, 1, 2, 4), of_classes(0, 1, 2, 4)))
    own = strategy.serve(MODEL, PARAMS, memory, NOTHING, torch.Generator())
    predictor = Int8Runtime().prepare(MODEL, own).calibrated(X[:60])
    expected = nearest_mean(MODEL, PARAMS, X, by_label(memory))
    answers = predictor(X).argmax(1)
    assert float((answers == expected).float().mean()) > 0.95
    assert 3 not in answers


def test_present_samples_stand_in_until_there_are_exemplars():
    strategy = ICaRL(capacity=20)
    memory = live(strategy, ((0, 1), of_classes(0, 1)))
    memory = strategy.start(MODEL, PARAMS, memory, Experience(1, 1, (1, 2)))
    data = of_classes(1, 2)
    own = strategy.serve(MODEL, PARAMS, memory, data, torch.Generator())
    groups = {**by_label(memory), 2: list(range(40, 60))}
    assert torch.equal(MODEL(own, X).argmax(1), nearest_mean(MODEL, PARAMS, X, groups))


def test_who_has_no_samples_answers_with_the_network_as_it_is():
    strategy = ICaRL(capacity=20)
    own = strategy.serve(MODEL, PARAMS, initial(strategy), NOTHING, torch.Generator())
    assert torch.equal(own, PARAMS)


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"memory_kib": 1, "capacity": 1}, "not both"),
        ({"capacity": -1}, "not below 0"),
        ({"replay_batch": -1}, "replay_batch is -1; at least 0"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        ICaRL(**kwargs)


def test_what_it_needs():
    with pytest.raises(StrategyError, match=r"room for 4 exemplars.* 5 classes"):
        ICaRL(capacity=4).declare(MODEL, FACTS)
    with pytest.raises(StrategyError, match="room for 1 exemplars"):
        ICaRL(memory_kib=0.01).declare(MODEL, FACTS)
    with pytest.raises(StrategyError, match="needs a bias"):
        ICaRL().declare(FlatModel(nn.Linear(8, 5, bias=False)), FACTS)
    with pytest.raises(StrategyError, match=r"nn\.Linear"):
        ICaRL().declare(FlatModel(nn.Conv2d(1, 2, 1)), FACTS)
    assert ICaRL().declare(MODEL, FACTS)["buffer"].capacity == 200
    assert ICaRL(memory_kib=0.1).declare(MODEL, FACTS)["buffer"].capacity == 11
