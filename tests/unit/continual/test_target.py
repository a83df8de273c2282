"""TARGET on the device: made samples, what is kept of them, and the loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.generator import Known, Synthesis, input_statistics, synthesize
from edgelearn.continual.layers import layers_of, observe
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Facts, make_strategy
from edgelearn.continual.target import Target, pack, unpack
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.models import cnn
from edgelearn.scenario.samples import Batch, Encoding, Samples, SharedSamples
from edgelearn.scenario.stream import Experience
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import NUM_CLASSES, SHAPE, toy_facts, toy_model, toy_samples

FACTS = toy_facts()


def trained():
    """The toy's network, trained on all of the toy, and the toy."""
    model, store = toy_model(), toy_samples()
    data = Samples(store, torch.arange(60, dtype=torch.int32))
    params, batch = model.initial(), data.batch()
    for _ in range(150):
        leaf = params.clone().requires_grad_()
        loss = F.cross_entropy(model(leaf, batch.x), batch.y)
        params = params - 0.3 * torch.autograd.grad(loss, leaf)[0]
    return model, params, data


def of_classes(data, *classes):
    keep = torch.isin(data.labels, torch.tensor(classes))
    return Samples(data.store, data.ids[keep])


def started(strategy, model, data, position=0, classes=(0, 1)):
    memory = Memory.initial(strategy.declare(model, FACTS), data.store)
    return strategy.start(model, model.initial(), memory, Experience(position, position, classes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def known_of(model, params, data):
    means, squares = input_statistics(model, params, data, layers_of(model))
    bounds = torch.stack(data.batch().x.aminmax())
    return Known(torch.tensor([True] * 3 + [False]), SHAPE, bounds, means, squares)


# -- making samples --------------------------------------------------------------------------------


def test_made_samples_are_of_their_classes_within_bounds_and_like_real_ones():
    model, params, data = trained()
    known, layers = known_of(model, params, of_classes(data, 0, 1, 2)), layers_of(model)
    made = synthesize(model, params, layers, known, Synthesis(90, steps=80), generator())
    assert made.shape == (90, *SHAPE)
    assert float(made.min()) >= float(known.bounds[0])
    assert float(made.max()) <= float(known.bounds[1])
    answers = model(params, made)[:, :3].argmax(1)
    # batches begin where the last one ended, so the classes take turns throughout
    assert float((answers == torch.arange(90) % 3).float().mean()) > 0.7
    noise = synthesize(model, params, layers, known, Synthesis(90, steps=1), generator())

    def distance(images):
        return math.dist(images.mean(0).flatten().tolist(), known.means[0].tolist())

    assert distance(made) < 0.5 * distance(noise)


def test_the_student_pushes_samples_to_where_it_is_wrong():
    model, params, data = trained()
    known, layers = known_of(model, params, data), layers_of(model)
    alone = synthesize(model, params, layers, known, Synthesis(80, adversarial=0.0), generator())
    pushed = synthesize(model, params, layers, known, Synthesis(80, adversarial=9.0), generator())
    assert torch.equal(alone[:64], pushed[:64])  # it has yet to learn from the first batch
    assert not torch.allclose(alone[64:], pushed[64:])


def test_the_generator_alone_decides():
    model, params, data = trained()
    known, layers = known_of(model, params, data), layers_of(model)
    one, same, other = (
        synthesize(model, params, layers, known, Synthesis(70, steps=3), generator(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("make", [toy_model, lambda: FlatModel(CNN)])
def test_statistics_are_those_of_what_layers_see(make):
    model = make()
    data = Samples(toy_samples(70), torch.arange(280, dtype=torch.int32))  # more than one chunk
    layers, params = layers_of(model), model.initial()
    means, squares = input_statistics(model, params, data, layers)
    _, inputs = observe(model, params, data.batch().x, layers)
    for layer, seen, mean, square in zip(layers, inputs, means, squares, strict=True):
        values = layer.by_channel(seen.detach())
        torch.testing.assert_close(mean, values.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(square, values.square().mean(0), rtol=1e-4, atol=1e-5)


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    CNN = cnn(input_shape=SHAPE, num_classes=NUM_CLASSES, channels=(3,), hidden=5)


# -- what is kept ----------------------------------------------------------------------------------


def test_a_byte_is_a_level_between_the_bounds():
    images = torch.linspace(-1, 3, 32).view(2, 4, 4)
    bounds = torch.tensor([-1.0, 3.0])
    rows = pack(images, 16, bounds)
    assert rows.dtype == torch.uint8
    assert rows.shape == (2, 16)
    assert (int(rows.min()), int(rows.max())) == (0, 255)
    back = unpack(rows, (4, 4), bounds)
    assert float((back - images).abs().max()) <= 2 / 255 + 1e-6


@pytest.mark.parametrize(("num_bytes", "error"), [(32, 2e-3), (64, 0.0), (128, 0.0)])
def test_more_bytes_are_floats(num_bytes, error):
    images = torch.linspace(-1, 3, 32).view(2, 4, 4)
    rows = pack(images, num_bytes, torch.zeros(2))
    assert rows.shape == (2, num_bytes)
    assert float((unpack(rows, (4, 4), torch.zeros(2)) - images).abs().max()) <= error


@pytest.mark.parametrize("num_bytes", [15, 48])
def test_other_sizes_are_refused(num_bytes):
    with pytest.raises(ValueError, match=f"{num_bytes} bytes for 16 numbers"):
        pack(torch.zeros(1, 4, 4), num_bytes, torch.zeros(2))


def test_logits_are_those_of_the_samples_as_they_are_kept():
    model, params, data = trained()
    strategy = Target(capacity=10, steps=5)
    memory = started(strategy, model, data)
    memory = strategy.finish(model, params, of_classes(data, 0, 1), memory, generator())
    assert memory["past"].tolist() == [True, True, False, False]
    x = unpack(memory["made"], SHAPE, memory["bounds"])
    assert torch.equal(memory["logits"], model(params, x).detach())


def test_statistics_weigh_experiences_alike_and_bounds_widen():
    model, params, data = trained()
    strategy = Target(capacity=4, steps=1)
    first, second = of_classes(data, 0), of_classes(data, 1, 2, 3)
    memory = started(strategy, model, data)
    memory = strategy.finish(model, params, first, memory, generator())
    memory = strategy.start(model, params, memory, Experience(1, 1, (2, 3)))
    memory = strategy.finish(model, params, second, memory, generator())
    parts = [input_statistics(model, params, part, layers_of(model)) for part in (first, second)]
    for i in range(2):
        mean = (parts[0][0][i] + parts[1][0][i]) / 2
        torch.testing.assert_close(memory[f"mean.{i}"], mean, rtol=1e-4, atol=1e-6)
        square = (parts[0][1][i] + parts[1][1][i]) / 2
        torch.testing.assert_close(memory[f"square.{i}"], square, rtol=1e-4, atol=1e-6)
    assert torch.equal(memory["bounds"], torch.stack(data.batch().x.aminmax()))
    assert memory["past"].all()


def test_a_device_without_samples_makes_some_once_it_has_had_any():
    model, params, data = trained()
    strategy, none = Target(capacity=4, steps=1), of_classes(data)
    memory = started(strategy, model, data)
    assert strategy.finish(model, params, none, memory, generator()) is memory
    memory = strategy.finish(model, params, of_classes(data, 0), memory, generator())
    memory = strategy.start(model, params, memory, Experience(1, 1, (2, 3)))
    memory = strategy.finish(model, params, none, memory, generator())
    assert memory["past"].all()
    assert float(memory["learned"]) == 1


def test_what_is_stored_is_as_large_as_said():
    def num_bytes(strategy):
        declared = strategy.declare(toy_model(), FACTS)
        return sum(spec.device_bytes(FACTS.sample_bytes) for spec in declared.values())

    # 16 features and 8 hidden ones; 2 x 4 flags, 2 bounds, 1 count
    assert num_bytes(Target(capacity=10)) == 10 * (16 + 4 * 4) + 8 * (16 + 8) + 8 + 12
    assert Target(memory_kib=1.0).declare(toy_model(), FACTS)["made"].shape == (32, 16)


# -- the loss --------------------------------------------------------------------------------------


def with_samples(strategy, seed=3):
    model, params, data = trained()
    memory = started(strategy, model, data)
    memory = strategy.finish(model, params, of_classes(data, 0, 1), memory, generator())
    memory = strategy.start(model, params, memory, Experience(1, 1, (2, 3)))
    moved = params + 0.2 * torch.randn(params.shape, generator=generator(seed))
    return model, moved, of_classes(data, 2, 3), memory


def test_the_loss_by_hand():
    strategy = Target(capacity=6, steps=3, distill=7.0, temperature=3.0, replay_batch=4)
    model, params, data, memory = with_samples(strategy)
    batch = strategy.extend(data.batch(slice(0, 5)), memory, generator())
    assert (len(batch), batch.num_past) == (9, 4)
    logits = model(params, batch.x)
    new = F.cross_entropy(logits[:5, 2:], batch.y[:5] - 2)
    soft = torch.softmax(memory["logits"][batch.places][:, :2] / 3, 1)
    old = -(soft * torch.log_softmax(logits[5:, :2] / 3, 1)).sum(1).mean()
    found = strategy.loss(model, params, batch, memory)
    torch.testing.assert_close(found, new + 7 * old, rtol=1e-4, atol=1e-5)


def test_there_is_nothing_to_distil_in_the_first_experience():
    strategy = Target(capacity=6)
    model, params, data = trained()
    memory, batch = started(strategy, model, data), of_classes(data, 0, 1).batch()
    assert strategy.extend(batch, memory, generator()) is batch
    expected = F.cross_entropy(model(params, batch.x)[:, :2], batch.y)
    torch.testing.assert_close(strategy.loss(model, params, batch, memory), expected)


def test_old_logits_are_not_pushed_down_by_new_samples():
    strategy = Target(capacity=6, steps=3, distill=0.0)
    model, params, data, memory = with_samples(strategy)
    batch = strategy.extend(data.batch(), memory, generator())
    leaf = params.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(strategy.loss(model, leaf, batch, memory), leaf)
    head = layers_of(model)[-1].read(gradient)
    assert not head[:2].any()
    assert head[2:].any()


def test_masks_of_tasks_are_kept():
    strategy = Target(capacity=6, steps=3)
    model, params, data, memory = with_samples(strategy)
    plain = data.batch(slice(0, 5))
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[:, 2:] = True
    batch = strategy.extend(Batch(plain.x, plain.y, None, mask), memory, generator())
    assert batch.mask[:5].tolist() == mask.tolist()
    same = strategy.extend(plain, memory, generator())
    torch.testing.assert_close(
        strategy.loss(model, params, batch, memory), strategy.loss(model, params, same, memory)
    )


@pytest.mark.parametrize(
    "arguments",
    [{"capacity": 3, "steps": 2}, {"memory_kib": 0.5, "adversarial": 0.0, "steps": 2}],
)
def test_the_contract_is_kept(arguments):
    findings = check_strategy(Target, **arguments)
    assert [f for f in findings if f.passed is not True] == []


def test_it_goes_with_penalties_and_not_with_replay():
    findings = check_strategy(
        lambda: make_strategy("target+ewc", {"target": {"steps": 2, "capacity": 9}})
    )
    assert not [f for f in findings if f.passed is False]
    with pytest.raises(ScenarioError, match="only one part can be one that replays"):
        make_strategy("target+replay", {})


def test_samples_that_are_floats():
    x = torch.randn(20, *SHAPE, generator=generator())
    store = SharedSamples(x, torch.arange(20) % 4, Encoding())
    data = Samples(store, torch.arange(20, dtype=torch.int32))
    strategy, model = Target(capacity=5, steps=2), toy_model()
    facts = Facts(2, 4, sample_bytes=65)
    memory = Memory.initial(strategy.declare(model, facts), store)
    memory = strategy.start(model, model.initial(), memory, Experience(0, 0, (0, 1, 2, 3)))
    memory = strategy.finish(model, model.initial(), data, memory, generator())
    joined = strategy.extend(data.batch(), memory, generator())
    assert joined.x[20:].shape == (5, *SHAPE)
    assert torch.isfinite(joined.x).all()


def test_a_network_with_another_kind_of_layer_has_statistics_of_the_rest():
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4)))
    declared = Target().declare(model, FACTS)
    assert [name for name in declared if name.startswith("mean")] == ["mean.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_kib": 1.0, "capacity": 3}, "give one of the two"),
        ({"distill": -1.0}, "distill is -1.0; at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
        ({"replay_batch": -1}, "replay_batch is -1"),
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"one_hot": -1.0}, "one_hot is -1.0"),
        ({"statistics": -1.0}, "statistics is -1.0"),
        ({"adversarial": -1.0}, "adversarial is -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Target(**arguments)
