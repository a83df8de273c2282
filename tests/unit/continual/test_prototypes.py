"""Nearest class means and streaming LDA: their statistics, the freeze, and the int8 answer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import edgelearn
from edgelearn.continual import prototypes
from edgelearn.continual.features import features, last_linear
from edgelearn.continual.memory import Memory
from edgelearn.continual.ncm import NCM
from edgelearn.continual.slda import SLDA
from edgelearn.continual.strategy import make_strategy
from edgelearn.errors import ScenarioError, StrategyError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import toy_devices, toy_facts, toy_learner, toy_scenario

CLASSES, SIZE = 5, 6
KINDS = [
    NCM(frozen_after=0),
    SLDA(frozen_after=0),
    SLDA(frozen_after=0, covariance="pooled", shrinkage=0.01),
]


def network(num_classes=CLASSES):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(8, SIZE), nn.ReLU(), nn.Linear(SIZE, num_classes)]
    return FlatModel(nn.Sequential(*layers))


def samples(labels, seed=0):
    """Samples of these classes, each around a centre of its own."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)
    centres = torch.randint(60, 196, (CLASSES, 8), generator=torch.Generator().manual_seed(9))
    x = centres[y] + torch.randint(-50, 51, (len(y), 8), generator=generator)
    ids = torch.arange(len(y), dtype=torch.int32)
    return Samples(SharedSamples(x.to(torch.uint8), y, Encoding(1 / 255)), ids)


def some(samples, rows):
    return Samples(samples.store, samples.ids[rows])


def life(strategy, model, experiences):
    """The memory after experiences, of a device that begins each and finishes it."""
    params, generator = model.initial(), torch.Generator()
    memory = Memory.initial(strategy.declare(model, toy_facts()))
    for data in experiences:
        memory = strategy.start(model, params, memory, None)
        memory = strategy.finish(model, params, data, memory, generator)
    return memory


def served(strategy, model, memory, data):
    """The answer's W and b."""
    head = last_linear(model)
    found = strategy.serve(model, model.initial(), memory, data, torch.Generator())
    changed = found != model.initial()
    assert not changed[: head.weight.start].any()  # the body stays
    return head.weights(found), head.biases(found)


def same_answers(weight, bias, other_weight, other_bias, known):
    """Whether two classifiers differ by the same row for all known classes."""
    rows = (weight - other_weight)[known]
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-3, atol=1e-3)
    levels = (bias - other_bias)[known]
    torch.testing.assert_close(levels, levels[:1].expand_as(levels), rtol=1e-3, atol=1e-3)


LABELS = [0, 1, 3, 1, 0, 3, 3, 1, 0, 0, 3, 1] * 3
KNOWN = [0, 1, 3]


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", KINDS)
def test_means_and_counts(strategy):
    model, data = network(), samples(LABELS)
    memory = life(strategy, model, [some(data, slice(0, 11)), some(data, slice(11, None))])
    z, y = features(model, model.initial(), data.batch().x).detach(), data.labels
    assert memory["counts"].tolist() == [int((y == c).sum()) for c in range(CLASSES)]
    for c in KNOWN:
        torch.testing.assert_close(memory["means"][c], z[y == c].mean(0))
    assert not memory["means"][[2, 4]].any()


def test_the_pooled_covariance_is_that_within_classes_in_any_order():
    model, data, strategy = network(), samples(LABELS), KINDS[2]
    memory = life(strategy, model, [some(data, slice(0, 11)), some(data, slice(11, None))])
    z, y = features(model, model.initial(), data.batch().x).detach().double(), data.labels
    apart = torch.cat([z[y == c] - z[y == c].mean(0) for c in KNOWN])
    expected = (apart.T @ apart / len(y)).float()
    torch.testing.assert_close(memory["covariance"], expected, rtol=1e-4, atol=1e-6)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    other = life(strategy, model, [some(data, order)])
    torch.testing.assert_close(other["covariance"], expected, rtol=1e-4, atol=1e-6)


def test_the_streaming_covariance_is_the_papers():
    model, data = network(), samples(LABELS)
    memory = life(SLDA(frozen_after=0), model, [data])
    z, y = features(model, model.initial(), data.batch().x).detach().double(), data.labels
    means, counts = torch.zeros(CLASSES, SIZE).double(), torch.zeros(CLASSES)
    covariance = torch.zeros(SIZE, SIZE).double()
    for t, (row, label) in enumerate(zip(z, y.tolist(), strict=True)):
        apart = row - means[label]
        delta = t / (t + 1) * torch.outer(apart, apart)  # equation 2
        covariance = (t * covariance + delta) / (t + 1)
        means[label] = (counts[label] * means[label] + row) / (counts[label] + 1)
        counts[label] += 1
    torch.testing.assert_close(memory["covariance"], covariance.float(), rtol=1e-4, atol=1e-6)


def test_the_classifier_of_lda_is_its_closed_form():
    model, data, strategy = network(), samples(LABELS), KINDS[2]
    memory = life(strategy, model, [data])
    weight, bias = served(strategy, model, memory, data)
    sigma = memory["covariance"].double()
    inverse = torch.linalg.inv(0.99 * sigma + 0.01 * torch.eye(SIZE))
    means = memory["means"].double()
    rows = means @ inverse
    levels = -0.5 * (means * rows).sum(1)
    same_answers(weight, bias, rows.float(), levels.float(), KNOWN)


def test_full_shrinkage_is_the_nearest_mean():
    model, data = network(), samples(LABELS)
    lda, ncm = SLDA(frozen_after=0, shrinkage=1.0), NCM(frozen_after=0)
    found = served(lda, model, life(lda, model, [data]), data)
    torch.testing.assert_close(found, served(ncm, model, life(ncm, model, [data]), data))


def test_ncm_answers_with_the_nearest_mean():
    model, data, strategy = network(), samples(LABELS), NCM(frozen_after=0)
    memory = life(strategy, model, [data])
    weight, bias = served(strategy, model, memory, data)
    z = features(model, model.initial(), samples(LABELS, seed=5).batch().x).detach()
    distance = torch.cdist(z, memory["means"])
    distance[:, [2, 4]] = float("inf")
    assert torch.equal((z @ weight.T + bias).argmax(1), distance.argmin(1))


@pytest.mark.slow
def test_statistics_and_scores_equal_avalanche():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        supervised = pytest.importorskip("avalanche.training.supervised")
        theirs = supervised.StreamingLDA(
            slda_model=nn.Identity(),
            criterion=nn.CrossEntropyLoss(),
            input_size=SIZE,
            num_classes=CLASSES,
            shrinkage_param=1e-2,
            evaluator=None,
        )
    model, data = network(), samples(LABELS)
    z = features(model, model.initial(), data.batch().x).detach()
    for row, label in zip(z, data.labels, strict=True):
        theirs.fit(row[None], label[None])
    ours = SLDA(frozen_after=0, shrinkage=1e-2)
    memory = life(ours, model, [some(data, slice(0, 7)), some(data, slice(7, None))])
    torch.testing.assert_close(memory["means"], theirs.muK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory["covariance"], theirs.Sigma, rtol=1e-4, atol=1e-5)
    weight, bias = served(ours, model, memory, some(data, slice(0, 0)))
    scores = (z @ weight.T + bias)[:, KNOWN]
    expected = theirs.predict(z)[:, KNOWN]
    # Ours are moved by the same amount for all classes of a sample.
    scores, expected = scores - scores[:, :1], expected - expected[:, :1]
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)


# -- the experience under way ----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", KINDS)
def test_current_samples_count_at_once_and_are_not_stored(strategy):
    model, data = network(), samples(LABELS)
    first, second = some(data, slice(0, 11)), some(data, slice(11, None))
    memory = life(strategy, model, [first])
    memory = strategy.start(model, model.initial(), memory, None)
    before = {name: value.clone() for name, value in memory.items()}
    now = served(strategy, model, memory, second)
    later = served(strategy, model, life(strategy, model, [first, second]), second)
    torch.testing.assert_close(now, later, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(memory[name], value) for name, value in before.items())


@pytest.mark.parametrize("strategy", KINDS)
def test_samples_that_were_taken_in_do_not_count_twice(strategy):
    model, data = network(), samples(LABELS)
    first, second = some(data, slice(0, 11)), some(data, slice(11, None))
    memory = life(strategy, model, [first, second])
    with_them = served(strategy, model, memory, second)
    none = served(strategy, model, memory, some(data, slice(0, 0)))
    torch.testing.assert_close(with_them, none, rtol=0, atol=0)
    # Other ones do: nine of class 0, which drag its mean.
    other = served(strategy, model, memory, samples([0] * 9, seed=7))
    assert not torch.allclose(with_them[0], other[0], rtol=1e-2)


@pytest.mark.parametrize("strategy", KINDS)
def test_a_device_without_any_sample_answers_as_the_network_does(strategy):
    model, data = network(), samples(LABELS)
    none = some(data, slice(0, 0))
    params = model.initial()
    memory = life(strategy, model, [none])
    assert strategy.serve(model, params, memory, none, torch.Generator()) is params


# -- classes without samples -----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize("labels", [LABELS, [2] * 9, [4, 1]])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_unseen_classes_never_win(strategy, labels, scale):
    model = network()
    with torch.no_grad():
        for parameter in model.module[1].parameters():
            parameter *= scale  # of the features
    memory = life(strategy, model, [samples(labels)])
    data = samples(labels)
    params = strategy.serve(model, model.initial(), memory, data, torch.Generator())
    generator = torch.Generator().manual_seed(0)
    far = torch.cat([data.batch().x, 20 * torch.randn(500, 8, generator=generator)])
    known = set(labels)
    with torch.no_grad():
        assert set(model(params, far).argmax(1).tolist()) <= known
    prepared = Int8Runtime().prepare(model, params)
    for calibration in (data.batch().x, far, far[:0], 1e-6 * far):
        logits = prepared.calibrated(calibration)(far)
        assert torch.isfinite(logits).all()
        assert set(logits.argmax(1).tolist()) <= known
    assert torch.isfinite(params).all()


def test_a_class_with_a_small_row_and_a_large_bias_is_no_model_for_others():
    model = network()
    counts = torch.tensor([0, 1, 1, 1, 0])
    weight = torch.zeros(CLASSES, SIZE).double()
    weight[1, 0], weight[2, 0], weight[3, 0] = 1e-6, 1e6, -1e6
    bias = torch.tensor([0.0, 2e8, -1e8, -1e8, 0.0]).double()
    means = torch.full((CLASSES, SIZE), 100.0)
    params = prototypes.with_classifier(model, model.initial(), weight, bias, means, counts)
    head, z = last_linear(model), torch.rand(200, SIZE) * 100
    layer = FlatModel(nn.Linear(SIZE, CLASSES))
    predictor = Int8Runtime().prepare(layer, params[head.weight.start :]).calibrated(z)
    assert set(predictor(z).argmax(1).tolist()) <= {1, 2, 3}


def test_the_quantized_bias_of_an_unseen_class_fits_32_bits():
    model = network()
    strategy = SLDA(frozen_after=0)
    data = samples(LABELS)
    params = strategy.serve(model, model.initial(), life(strategy, model, [data]), data, None)
    head = last_linear(model)
    z = features(model, params, data.batch().x).detach()
    step = (z.max() - z.min().clamp(max=0)) / 255
    units = head.biases(params) / (step * head.weights(params).abs().amax(1) / 127)
    assert units.abs().max() < 2**31 / 10
    assert units[2] < units[0] - 1000


@pytest.mark.parametrize("strategy", KINDS)
def test_int8_answers_as_float_does(strategy):
    model = network()
    memory = life(strategy, model, [samples(LABELS)])
    params = strategy.serve(model, model.initial(), memory, samples(LABELS), torch.Generator())
    x = samples(LABELS * 5, seed=3).batch().x
    predictor = Int8Runtime().prepare(model, params).calibrated(samples(LABELS).batch().x)
    with torch.no_grad():
        agree = (predictor(x).argmax(1) == model(params, x).argmax(1)).float().mean()
    assert agree > 0.95


def test_what_all_rows_share_is_left_out():
    model, strategy = network(), SLDA(frozen_after=0)
    memory = life(strategy, model, [samples(LABELS)])
    weight, bias = served(strategy, model, memory, samples(LABELS))
    torch.testing.assert_close(weight[KNOWN].mean(0), torch.zeros(SIZE), atol=1e-3, rtol=0)
    assert abs(float(bias[KNOWN].mean())) < 1e-2


# -- the freeze ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [NCM, SLDA])
@pytest.mark.parametrize("frozen_after", [0, 1, 2])
def test_the_body_is_trained_and_then_frozen(make, frozen_after):
    learner, plain = toy_learner(make(frozen_after=frozen_after)), toy_learner(naive())
    device, params = toy_devices()[0], learner.model.initial()
    state, other = learner.initial_state(device.store), plain.initial_state(device.store)
    for position in range(2):
        where = {"position": position, "server_round": position + 1}
        fit = learner.fit(state, params, device, **where)
        expected = plain.fit(other, params, device, **where)
        delta = learner.model.layout.flatten(fit.update.arrays)
        if position < frozen_after:
            assert torch.equal(delta, plain.model.layout.flatten(expected.update.arrays))
            assert fit.update.metrics == expected.update.metrics
        else:
            assert not delta.any()
            assert fit.num_samples == fit.update.metrics["num-steps"] == 0
        params = params + delta
        state = learner.consolidate(fit.state, params, device, upto=position + 1)
        other = expected.state
        if position + 1 < frozen_after:
            assert not state.memory["counts"].any()  # they would be stale
        else:
            assert int(state.memory["counts"].sum()) == 10 * (position + 2 - max(frozen_after, 1))


def naive():
    return make_strategy("naive", {})


@pytest.mark.parametrize("make", [NCM, SLDA])
def test_the_network_answers_by_itself_until_its_body_is_frozen(make):
    model, data, strategy = network(), samples(LABELS), make(frozen_after=2)
    params = model.initial()
    memory = strategy.start(model, params, life(strategy, model, [data]), None)
    assert strategy.serve(model, params, memory, data, torch.Generator()) is params
    memory = strategy.finish(model, params, data, memory, torch.Generator())
    assert strategy.serve(model, params, memory, data, torch.Generator()) is not params


def test_a_part_that_is_frozen_freezes_the_combination():
    strategy = make_strategy("slda+replay", {"slda": {"frozen_after": 0}})
    learner, device = toy_learner(strategy), toy_devices()[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    fit = learner.fit(state, params, device, position=0, server_round=1)
    assert not learner.model.layout.flatten(fit.update.arrays).any()


@pytest.mark.parametrize("name", ["ncm", "slda"])
def test_a_fleet_remembers_the_first_classes(name):
    # Features of the first classes reach further than those of the others, so a device that is to
    # answer in integers needs samples of both at hand when it is calibrated: replay keeps some.
    client = {"strategy": f"{name}+replay", "args": {"replay": {"capacity": 6}}, "epochs": 5}
    record = edgelearn.simulate(toy_scenario(client=client))
    last = record.rounds[-1]["accuracy"]
    for kind in ("served", "float"):
        assert all(right >= 0.9 * n for right, n in zip(last[kind], last["count"], strict=True))
    assert record.rounds[0]["loss"] > 0
    assert record.rounds[-1]["loss"] == 0.0  # nothing was trained


def test_an_untrained_body_already_does_something():
    client = {"strategy": "slda", "args": {"frozen_after": 0}}
    record = edgelearn.simulate(toy_scenario(client=client))
    first = record.rounds[0]["accuracy"]
    assert first["served"][0] > 0.7 * first["count"][0]


@pytest.mark.parametrize("kind", [NCM, SLDA])
@pytest.mark.parametrize("frozen_after", [0, 1, 2])
def test_the_contract_is_kept_frozen_or_not(kind, frozen_after):
    findings = check_strategy(kind, frozen_after=frozen_after)
    assert [finding for finding in findings if finding.passed is False] == []


# -- arguments -------------------------------------------------------------------------------------


def test_a_network_without_a_bias_is_refused():
    model = FlatModel(nn.Linear(4, 3, bias=False))
    for kind in (NCM, SLDA):
        with pytest.raises(StrategyError, match="needs a last layer with a bias"):
            kind().declare(model, toy_facts())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ncm", {"frozen_after": -1}, "frozen_after is -1; at least 0"),
        ("slda", {"frozen_after": -1}, "frozen_after is -1; at least 0"),
        ("slda", {"shrinkage": 0.0}, "shrinkage is 0.0; allowed: above 0, to 1"),
        ("slda", {"shrinkage": 1.1}, "shrinkage is 1.1"),
        ("slda", {"covariance": "full"}, "covariance is 'full'; allowed: streaming, pooled"),
    ],
)
def test_arguments(name, arguments, message):
    with pytest.raises(ScenarioError, match=message):
        make_strategy(name, arguments)


def test_samples_are_observed_in_their_order_in_parts(monkeypatch):
    monkeypatch.setattr(prototypes, "_ROWS", 5)
    model, data = network(), samples(LABELS)
    seen = prototypes.observe(model, model.initial(), data)
    z = features(model, model.initial(), data.batch().x).detach().double()
    torch.testing.assert_close(seen.features, z)
    assert torch.equal(seen.labels, data.labels)
