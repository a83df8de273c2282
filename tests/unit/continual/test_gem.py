from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual import agem
from edgelearn.continual.gem import GEM, project
from edgelearn.continual.memory import Memory, check
from edgelearn.continual.strategy import Facts
from edgelearn.errors import ExtraMissingError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Encoding, Samples, SharedSamples

MODEL = FlatModel(nn.Linear(3, 4))
FACTS = Facts(num_experiences=3, num_classes=4, sample_bytes=13)
PARAMS = torch.randn(MODEL.layout.size, generator=torch.Generator().manual_seed(0))
STORE = SharedSamples(torch.rand(60, 3), torch.arange(60) // 15, Encoding())


def vectors(seed, num_past):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, generator=generator), torch.randn(num_past, 40, generator=generator)


def samples(first, last):
    return Samples(STORE, torch.arange(first, last, dtype=torch.int32))


def after(strategy, *experiences):
    memory = Memory.initial(strategy.declare(MODEL, FACTS), STORE)
    for seed, data in enumerate(experiences):
        generator = torch.Generator().manual_seed(seed)
        memory = strategy.finish(MODEL, PARAMS, data, memory, generator)
        check(memory, strategy.declare(MODEL, FACTS))
    return memory


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("num_past", [1, 2, 5])
def test_the_projection_solves_the_program(num_past, gamma):
    for seed in range(10):
        gradient, past = vectors(seed, num_past)
        found = project(gradient, past, gamma=gamma)
        if bool((past @ gradient >= 0).all()):
            assert torch.equal(found, gradient)
            continue
        rows, g = past.double(), gradient.double()
        v = torch.linalg.lstsq(rows.T, (found.double() - g)[:, None]).solution[:, 0]
        torch.testing.assert_close((v @ rows + g).float(), found)  # a step along the past alone
        slope = rows @ rows.T @ v + 1e-3 * v + rows @ g
        # Karush-Kuhn-Tucker: at a bound the objective rises, elsewhere it is flat.
        assert float(v.min()) > gamma - 1e-5
        assert float(slope.min()) > -1e-3
        assert float((slope * (v - gamma)).abs().max()) < 1e-3
        assert float((past @ found).min()) > -0.05


def test_with_one_past_experience_and_no_margin_it_is_agem():
    for seed in range(10):
        gradient, past = vectors(seed, 1)
        torch.testing.assert_close(
            project(gradient, past, gamma=0.0), agem.project(gradient, past[0]), rtol=0, atol=1e-4
        )


def test_each_experience_has_a_part_of_the_memory():
    strategy = GEM(capacity=12)
    memory = after(strategy, samples(0, 15), samples(15, 17), samples(30, 60))
    buffer = memory["buffer"].view(3, 4).tolist()
    assert set(buffer[0]) <= set(range(15))
    assert len(set(buffer[0])) == 4
    assert sorted(buffer[1]) == [EMPTY, EMPTY, 15, 16]
    assert set(buffer[2]) <= set(range(30, 60))
    assert max(buffer[0]) > 3  # drawn, not the first that came


def test_an_experience_without_samples_leaves_its_part_empty():
    strategy = GEM(capacity=6)
    memory = after(strategy, samples(0, 0), samples(15, 30))
    assert memory["buffer"].view(3, 2)[0].tolist() == [EMPTY, EMPTY]
    assert memory["buffer"].view(3, 2)[1].min() >= 15
    assert memory["ended"].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [({}, 198), ({"capacity": 7}, 6), ({"capacity": 1}, 3), ({"memory_kib": 0.1}, 6)],
)
def test_the_size_of_the_memory(kwargs, expected):
    assert GEM(**kwargs).declare(MODEL, FACTS)["buffer"].capacity == expected


def test_a_step_against_the_gradient_of_each_past_experience():
    strategy = GEM(capacity=12, gamma=0.2)
    memory = after(strategy, samples(0, 15), samples(0, 0))
    memory = strategy.finish(MODEL, PARAMS, samples(15, 30), memory, torch.Generator())
    batch = strategy.extend(samples(30, 60).batch(slice(0, 10)), memory, torch.Generator())
    assert (len(batch), batch.num_past) == (18, 8)

    def gradient_of(ids):
        leaf, own = PARAMS.clone().requires_grad_(), STORE.batch(ids)
        loss = F.cross_entropy(MODEL(leaf, own.x), own.y)
        return loss, torch.autograd.grad(loss, leaf)[0]

    rows = memory["buffer"].view(3, 4)
    present, gradient = gradient_of(torch.arange(30, 40))
    references = torch.stack([gradient_of(rows[k])[1] for k in (0, 2)])
    assert bool((references @ gradient < 0).any())
    loss, found = strategy.gradient(MODEL, PARAMS, batch, memory)
    torch.testing.assert_close(loss, present.detach())
    expected = project(gradient, references, gamma=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, gradient)


def test_without_a_past_the_batch_is_as_it_is():
    strategy, batch = GEM(), samples(0, 4).batch()
    assert strategy.extend(batch, after(strategy), torch.Generator()) is batch
    _, found = strategy.gradient(MODEL, PARAMS, batch, after(strategy))
    leaf = PARAMS.clone().requires_grad_()
    F.cross_entropy(MODEL(leaf, batch.x), batch.y).backward()
    torch.testing.assert_close(found, leaf.grad)


def test_a_missing_solver_is_named_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "quadprog", None)
    with pytest.raises(ExtraMissingError, match=r"'gem'.*quadprog.*edgelearn\[avalanche\]"):
        GEM()


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_projection_equals_avalanche(gamma):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        plugins = pytest.importorskip("avalanche.training.plugins")
    for seed in range(10):
        gradient, past = vectors(seed, 4)
        plugin = plugins.GEMPlugin(patterns_per_experience=1, memory_strength=gamma)
        plugin.G = past
        expected = plugin.solve_quadprog(gradient)
        if bool((past @ gradient < 0).any()):
            found = project(gradient, past, gamma=gamma)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert not np.allclose(found.numpy(), gradient.numpy())


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"gamma": -0.1}, "gamma is -0.1; at least 0"),
        ({"capacity": -1}, "not below 0"),
        ({"capacity": 1, "memory_kib": 1}, "not both"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        GEM(**kwargs)
