"""Sketches of moments, and their principal subspaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.layers import layers_of, observe
from edgelearn.continual.subspace import (
    principal_subspace,
    project_out,
    random_directions,
    sketches,
)
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.seeds import derive, split


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModel(
            nn.Sequential(
                nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
            ).eval()
        )


def samples(seed, num=150):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (num, 1, 4, 4), generator=generator, dtype=torch.uint8)
    store = SharedSamples(x, torch.zeros(num, dtype=torch.int64), Encoding(1 / 255))
    return Samples(store, torch.arange(num, dtype=torch.int32))


def moment(eigenvalues, width=40):
    """A matrix with these eigenvalues, and its eigenvectors [D, k]."""
    generator = torch.Generator().manual_seed(5)
    vectors, _ = torch.linalg.qr(torch.randn(width, len(eigenvalues), generator=generator))
    return vectors @ torch.diag(torch.tensor(eigenvalues)) @ vectors.t(), vectors


def test_a_full_sketch_is_the_second_moment_of_trace_1():
    model, data = network(), samples(1)
    layers = layers_of(model)
    found = sketches(model, model.initial(), data, layers, 100)
    _, inputs = observe(model, model.initial(), data.batch().x, layers)
    for layer, seen, sketch in zip(layers, inputs, found, strict=True):
        total = torch.zeros(layer.width, layer.width)
        for row in layer.columns(seen.detach()).flatten(0, 1):
            total += torch.outer(row, row)
        torch.testing.assert_close(sketch, total / total.trace(), rtol=1e-4, atol=1e-6)
        assert float(sketch.trace()) == pytest.approx(1.0, abs=1e-4)


def test_a_small_sketch_is_the_moment_times_the_directions():
    model, data = network(), samples(1)
    layers = layers_of(model)
    full = sketches(model, model.initial(), data, layers, 100)
    small = sketches(model, model.initial(), data, layers, 6)
    for layer, whole, part in zip(layers, full, small, strict=True):
        assert part.shape == (layer.width, 6)
        expected = whole @ random_directions(layer.width, 6)
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-5)


def test_directions_are_signs_alike_on_every_machine():
    omega = random_directions(7, 4)
    assert torch.equal(omega, random_directions(7, 4))
    assert torch.equal(omega.abs(), torch.full((7, 4), 0.5))
    seed = derive(0, "sketch", 7, 4)
    by_hand = [
        [1 - (split(seed, 4 * row + column) >> 63) for column in range(4)] for row in range(7)
    ]
    assert (omega > 0).int().tolist() == by_hand
    assert torch.equal(random_directions(4, 4), torch.eye(4))
    assert torch.equal(random_directions(4, 9), torch.eye(4))


@pytest.mark.parametrize("rank", [8, 40, 64])
def test_a_subspace_smaller_than_the_sketch_is_found_exactly(rank):
    matrix, vectors = moment([0.5, 0.3, 0.2])
    sketch = matrix @ random_directions(40, rank)
    basis = principal_subspace(sketch, trace=1.0, energy=1.0)
    assert basis.shape == (40, 3)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis @ basis.t(), vectors @ vectors.t(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("energy", "directions"), [(0.0, 1), (0.5, 1), (0.51, 2), (0.8, 2), (1, 3)]
)
def test_as_many_directions_as_the_energy_needs(energy, directions):
    matrix, vectors = moment([0.5, 0.3, 0.2])
    basis = principal_subspace(matrix, trace=1.0, energy=energy)
    kept = vectors[:, :directions]
    torch.testing.assert_close(basis @ basis.t(), kept @ kept.t(), atol=1e-4, rtol=0)


def test_a_sketch_has_no_more_directions_than_columns():
    matrix, _ = moment([1 / 40] * 40)
    assert principal_subspace(matrix @ random_directions(40, 5), trace=1.0, energy=0.9).shape == (
        40,
        5,
    )


def test_nothing_seen_is_no_subspace():
    assert principal_subspace(torch.zeros(9, 4), trace=1.0, energy=0.9).shape == (9, 0)
    matrix = torch.ones(2, 9)
    assert torch.equal(project_out(matrix, torch.zeros(9, 0)), matrix)


def test_what_is_projected_maps_nothing_of_the_basis():
    _, vectors = moment([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(2)
    matrix, across = torch.randn(5, 40, generator=generator), torch.randn(40, generator=generator)
    out = project_out(matrix, vectors)
    torch.testing.assert_close(out @ vectors, torch.zeros(5, 3), atol=1e-5, rtol=0)
    across = across - vectors @ (vectors.t() @ across)
    torch.testing.assert_close(out @ across, matrix @ across, atol=1e-4, rtol=1e-4)
