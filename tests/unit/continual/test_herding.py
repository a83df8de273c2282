from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from edgelearn.continual.buffers import herding


def herded(features, count):
    """Herd as iCaRL does, on features of length 1."""
    return herding(F.normalize(features.double(), dim=1), count)


def points(seed, n=30, d=6):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def slow(features, count):
    """Algorithm 4 of the paper, word by word; a sample is chosen once."""
    unit = [f / f.norm() for f in features.double()]
    mean = sum(unit) / len(unit)
    chosen = []
    for k in range(1, count + 1):
        total = sum((unit[i] for i in chosen), torch.zeros_like(mean))
        distance = {
            i: float((mean - (total + phi) / k).norm())
            for i, phi in enumerate(unit)
            if i not in chosen
        }
        chosen.append(min(distance, key=distance.get))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_algorithm_of_the_paper(seed):
    features = points(seed) + 1.0
    assert herded(features, 12).tolist() == slow(features, 12)


def test_the_first_are_the_best_at_any_length():
    features = points(0)
    whole = herded(features, 30)
    assert sorted(whole.tolist()) == list(range(30))
    for count in (1, 5, 29):
        assert torch.equal(herded(features, count), whole[:count])


def test_the_mean_of_few_is_closer_than_that_of_random_ones():
    features = points(1, n=200) + 0.5
    unit = F.normalize(features, dim=1)

    def distance(chosen):
        return float((unit[chosen].mean(0) - unit.mean(0)).norm())

    assert distance(herded(features, 10)) < 0.5 * distance(torch.arange(10))


def test_edges():
    assert herded(points(0), 0).tolist() == []
    assert herded(points(0)[:0], 5).tolist() == []
    assert sorted(herded(points(0)[:3], 5).tolist()) == [0, 1, 2]
    assert herded(torch.ones(4, 2), 2).tolist() == [0, 1]  # ties
    assert herded(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]]), 3).dtype == torch.int64


def test_length_does_not_count():
    features = points(2)
    scaled = features * torch.rand(30, 1, generator=torch.Generator().manual_seed(3)).add(0.1)
    assert torch.equal(herded(features, 10), herded(scaled, 10))


@pytest.mark.slow
def test_it_equals_avalanche_on_normalized_features():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        policies = pytest.importorskip("avalanche.training.storage_policy")
    strategy = policies.HerdingSelectionStrategy(torch.nn.Sequential(torch.nn.ReLU()), "0")
    for seed in range(3):
        unit = F.normalize(points(seed).double() + 0.5, dim=1)
        theirs = strategy.make_sorted_indices_from_features(unit)
        assert herded(unit, 20).tolist() == theirs[:20]
