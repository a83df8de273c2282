"""FOT: what earlier experiences see of an update, and how a fleet agrees on what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgelearn
from edgelearn.continual.fot import FOT
from edgelearn.continual.layers import layers_of
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Facts, make_strategy
from edgelearn.continual.subspace import sketches
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.scenario.stream import Experience
from edgelearn.testing.contract import check_strategy

FACTS = Facts(num_experiences=3, num_classes=3, sample_bytes=25)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3, bias=False)
    )


def network(strategy, make=mlp):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
    shared = strategy.shares(FlatModel(module), FACTS)
    return FlatModel(module, {name: spec.shape for name, spec in shared.items()})


def few_directions(seed, num=20, directions=3):
    """Images that span few directions: combinations of some images."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.rand(directions, 64, generator=generator)
    mix = torch.rand(num, directions, generator=generator)
    x = (mix @ of).view(num, 1, 8, 8)
    store = SharedSamples(x, torch.zeros(num, dtype=torch.int64), Encoding())
    return Samples(store, torch.arange(num, dtype=torch.int32))


def at(strategy, model, position):
    memory = Memory.initial(strategy.declare(model, FACTS))
    return strategy.start(model, model.initial(), memory, Experience(position, position, (0,)))


def leave(strategy, model, given, data, position, *, seed=None):
    """A device's round in which it moved at random, or not at all."""
    local = given.clone()
    if seed is not None:
        size = model.layout.num_trained
        local[:size] += 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    passage = Passage(model, given, local, data, 1, 0.1)
    out, _ = strategy.leave(passage, at(strategy, model, position))
    return local, out


def counts(model, params):
    return [round(value, 6) for value in model.layout.shared(params)["counts"].tolist()]


@pytest.mark.parametrize("make", [mlp, cnn])
def test_earlier_inputs_see_nothing_of_an_update(make):
    strategy = FOT(energy=1.0, rank=600)
    model, old, new = network(strategy, make), few_directions(1), few_directions(2)
    given = model.initial()
    _, given = leave(strategy, model, given, old, 0)
    local, sent = leave(strategy, model, given, new, 1, seed=5)

    def change(params, data):
        x = data.batch().x
        return float((model(params, x) - model(given, x)).abs().max())

    assert change(sent, old) < 0.02 * change(local, old)
    assert change(sent, new) > 0.2 * change(local, new)


def test_the_first_experience_is_free():
    strategy = FOT()
    model, data = network(strategy), few_directions(1)
    given, size = model.initial(), model.layout.num_network
    for server_round in range(3):
        local, given = leave(strategy, model, given, data, 0, seed=server_round)
        assert torch.equal(given[:size], local[:size])
        assert counts(model, given) == [0, server_round + 1, 0]


def test_energy_0_holds_on_to_the_first_direction_only():
    model = network(FOT())
    _, given = leave(FOT(), model, model.initial(), few_directions(1), 0)
    sizes = []
    for energy in (0.0, 0.9, 1.0):
        local, sent = leave(FOT(energy=energy), model, given, few_directions(2), 1, seed=5)
        taken = (local - sent)[: model.layout.num_trained]
        first = layers_of(model)[0].read(taken)
        sizes.append(int(torch.linalg.matrix_rank(first, rtol=1e-4)))
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1


def test_a_fleet_agrees_when_an_experience_has_ended():
    strategy = FOT(rank=9)
    model = network(strategy)
    layers = layers_of(model)
    data, given, means = [few_directions(seed) for seed in (1, 2)], model.initial(), []
    for server_round in range(3):  # two devices, and the mean of what they send
        sent = [leave(strategy, model, given, each, 0, seed=server_round)[1] for each in data]
        each = [sketches(model, given[: model.layout.num_trained], d, layers, 9) for d in data]
        means.append([(a + b) / 2 for a, b in zip(*each, strict=True)])
        given = (sent[0] + sent[1]) / 2
    assert counts(model, given) == [0, 3, 0]
    running = [0.25 * a + 0.25 * b + 0.5 * c for a, b, c in zip(*means, strict=True)]
    beside = model.layout.shared(given)
    for i, expected in enumerate(running):
        torch.testing.assert_close(beside[f"present{i}"], expected, atol=1e-5, rtol=1e-4)
        assert not beside[f"past{i}"].any()
    sent = [leave(strategy, model, given, few_directions(7), 1, seed=9)[1] for _ in range(2)]
    after = (sent[0] + sent[1]) / 2
    assert counts(model, after) == [1, 1, 1]
    beside = model.layout.shared(after)
    (fresh, *_rest) = sketches(
        model, given[: model.layout.num_trained], few_directions(7), layers, 9
    )
    torch.testing.assert_close(beside["past0"], running[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(beside["present0"], fresh, atol=1e-5, rtol=1e-4)
    _, third = leave(strategy, model, after, few_directions(8), 2)
    assert counts(model, third) == [2, 1, 2]
    torch.testing.assert_close(
        model.layout.shared(third)["past0"], running[0] + fresh, atol=1e-5, rtol=1e-4
    )


def test_few_samples_are_not_sent_but_bound_all_the_same():
    strategy = FOT(min_samples=16, energy=1.0)
    model = network(strategy)
    _, given = leave(strategy, model, model.initial(), few_directions(1), 0)
    for num in (0, 1, 15):
        local, sent = leave(strategy, model, given, few_directions(2, num), 1, seed=3)
        assert counts(model, sent) == [1, 0, 1]
        assert not model.layout.shared(sent)["present0"].any()
        assert not torch.equal(sent[:9], local[:9])
    _, sent = leave(strategy, model, given, few_directions(2, 16), 1)
    assert counts(model, sent) == [1, 1, 1]


def test_who_comes_late_changes_nothing_of_the_counts():
    strategy = FOT()
    model = network(strategy)
    _, given = leave(strategy, model, model.initial(), few_directions(1), 0)
    _, given = leave(strategy, model, given, few_directions(2), 2)
    _, sent = leave(strategy, model, given, few_directions(3), 1, seed=1)
    size = model.layout.num_network
    assert torch.equal(sent[size:], given[size:])


def test_what_is_sent_is_as_large_as_said():
    strategy = FOT(rank=9)
    shared = strategy.shares(FlatModel(mlp()), FACTS)
    num_bytes = sum(spec.stored_bytes for spec in shared.values())
    assert num_bytes == 8 * (65 * 9 + 25 * 9) + 12
    declared = strategy.declare(FlatModel(mlp()), FACTS)
    assert sum(spec.device_bytes(0) for spec in declared.values()) == 8


def test_inputs_are_left_as_they_are():
    strategy = FOT()
    model, data = network(strategy), few_directions(1)
    given = model.initial()
    _, given = leave(strategy, model, given, data, 0)
    local, before = given.clone() + 1, given.clone()
    strategy.leave(Passage(model, given, local, data, 1, 0.1), at(strategy, model, 1))
    assert torch.equal(given, before)
    assert torch.equal(local, before + 1)


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="linear layers or convolutions"):
        FOT().shares(FlatModel(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))), FACTS)


def test_domains_are_remembered_better():
    def run(strategy, **arguments):
        scenario = edgelearn.load(
            "permuted-digits",
            data={"max_train": 800, "max_test": 200},
            fleet={"num_devices": 8, "cohort": 8},
            stream={"num_experiences": 3, "rounds_per_experience": 3},
            client={"strategy": strategy, "args": arguments},
        )
        return edgelearn.simulate(scenario, engine="reference").scores()

    naive, fot = run("naive"), run("fot", energy=0.9)
    assert fot.forgetting < naive.forgetting - 0.1
    assert fot.average_accuracy > naive.average_accuracy + 0.05


@pytest.mark.parametrize("rest", ["ewc", "replay", "re-fed", "fedssi"])
def test_it_goes_with_what_changes_the_steps(rest):
    findings = check_strategy(lambda: make_strategy(f"fot+{rest}", {"fot": {"min_samples": 1}}))
    assert not [f for f in findings if f.passed is False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": -0.1}, "energy is -0.1; allowed: 0 to 1"),
        ({"energy": 1.1}, "energy is 1.1"),
        ({"rank": 0}, "rank is 0; at least 1"),
        ({"min_samples": 0}, "min_samples is 0; at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FOT(**arguments)
