from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from edgelearn import seeds as seeds_module
from edgelearn.seeds import derive, numpy_generator, permutation, subset, torch_generator


def test_the_same_numbers_on_every_machine():
    assert derive(0, "shuffle") == 4801200160671820428
    assert derive(7, "shuffle", 1, 2) == 3439179196174997392
    assert numpy_generator(7, "shuffle", 1, 2).integers(1000, size=4).tolist() == [
        306,
        973,
        751,
        382,
    ]
    assert torch_generator(7, "shuffle", 1, 2).initial_seed() == 3439179196174997392


def test_seeds_differ_by_seed_purpose_and_each_coordinate():
    seeds = {
        derive(seed, purpose, *coordinates)
        for seed in range(5)
        for purpose in ("shuffle", "partition")
        for coordinates in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0)]
    }
    assert len(seeds) == 5 * 2 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numpy_integers_count_as_integers():
    assert derive(np.int64(3), "x", np.int32(4)) == derive(3, "x", 4)


def test_generators_are_recomputed_not_shared():
    first = torch_generator(1, "x", 2)
    drawn = torch.rand(3, generator=first)
    assert torch.equal(torch.rand(3, generator=torch_generator(1, "x", 2)), drawn)
    assert not torch.equal(torch.rand(3, generator=first), drawn)
    a, b = numpy_generator(1, "x", 2), numpy_generator(1, "x", 2)
    assert np.array_equal(a.random(3), b.random(3))


def test_no_global_random_state_is_touched():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global one is what this is about
    torch.rand(3, generator=torch_generator(0, "x"))
    numpy_generator(0, "x").random(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_seeds_and_plugins_do_not_import_torch():
    code = "import sys, edgelearn.seeds, edgelearn.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (7, 0), (7, 3), (100, 99), (100, 100)])
def test_a_subset_is_the_beginning_of_the_permutation(size, count):
    for seed in range(5):
        assert subset(seed, size, count).tolist() == sorted(permutation(seed, size)[:count])


def test_of_equal_words_the_first_are_in_the_subset(monkeypatch):
    words = np.array([5, 2, 5, 5, 1], np.uint64)
    monkeypatch.setattr(seeds_module, "split_all", lambda seed, places: words[places])
    assert [subset(0, 5, count).tolist() for count in range(1, 6)] == [
        sorted(permutation(0, 5)[:count].tolist()) for count in range(1, 6)
    ]
