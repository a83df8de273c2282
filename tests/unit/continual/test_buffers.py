from __future__ import annotations

import pytest
import torch

from edgelearn.continual.buffers import class_balanced, herding, quotas, reservoir
from edgelearn.scenario.samples import EMPTY


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def empty(capacity):
    return torch.full((capacity,), EMPTY, dtype=torch.int32)


def ids(start, stop):
    return torch.arange(start, stop, dtype=torch.int32)


class Balanced:
    """A class-balanced buffer that is fed a stream, some samples per call."""

    def __init__(self, capacity, num_classes):
        self.ids = empty(capacity)
        self.seen = torch.zeros(num_classes, dtype=torch.int64)
        self.labels = torch.empty(0, dtype=torch.int64)

    def feed(self, labels, *, chunk, generator):
        start = len(self.labels)
        self.labels = torch.cat([self.labels, labels])
        for piece in torch.arange(start, start + len(labels)).split(chunk):
            held = self.labels[self.ids.clamp(min=0).long()]
            self.ids, self.seen = class_balanced(
                self.ids, held, self.seen, piece.int(), self.labels[piece], generator
            )
        return self

    @property
    def counts(self):
        kept = self.labels[self.ids[self.ids != EMPTY].long()]
        return torch.bincount(kept, minlength=len(self.seen)).tolist()


# -- reservoir -------------------------------------------------------------------------------------


def test_a_reservoir_fills_from_the_front():
    buffer = reservoir(empty(5), 0, ids(0, 3), generator())
    assert buffer.tolist() == [0, 1, 2, EMPTY, EMPTY]
    assert buffer.dtype == torch.int32
    assert reservoir(buffer, 3, ids(3, 5), generator()).tolist() == [0, 1, 2, 3, 4]


def test_a_reservoir_changes_nothing_that_it_was_given():
    before = ids(0, 5)
    reservoir(before, 5, ids(5, 50), generator())
    assert before.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("chunk", [100, 7])
def test_every_sample_is_kept_with_the_same_probability(chunk):
    trials, capacity, total = 2000, 10, 100
    kept = torch.zeros(total)
    source = generator(1)
    for _ in range(trials):
        buffer, seen = empty(capacity), 0
        for piece in ids(0, total).split(chunk):
            buffer = reservoir(buffer, seen, piece, source)
            seen += len(piece)
        assert buffer.unique().numel() == capacity
        kept[buffer.long()] += 1
    # Binomial(2000, 0.1): mean 200, standard deviation 13.4
    assert (kept - 200).abs().max() < 4.5 * 13.4
    chi_squared = ((kept - 200) ** 2 / 200 / 0.9).sum()
    assert 50 < chi_squared < 150  # 99 degrees of freedom: mean 99, standard deviation 14


def test_one_place_for_three_samples():
    source = generator(3)
    kept = torch.zeros(3)
    for _ in range(3000):
        kept[reservoir(empty(1), 0, ids(0, 3), source).long()] += 1
    assert (kept - 1000).abs().max() < 4.5 * 26  # standard deviation 26


def test_a_reservoir_without_room_or_without_arrivals():
    assert reservoir(empty(0), 0, ids(0, 5), generator()).tolist() == []
    assert reservoir(ids(0, 3), 9, ids(0, 0), generator()).tolist() == [0, 1, 2]


def test_buffers_depend_on_their_generator_alone():
    def run(seed):
        torch.manual_seed(seed + 100)  # the global generator does not matter
        a = reservoir(ids(0, 10), 10, ids(10, 60), generator(seed))
        b = Balanced(10, 3).feed(torch.arange(60) % 3, chunk=9, generator=generator(seed)).ids
        return a.tolist(), b.tolist()

    assert run(0) == run(0)
    assert run(0) != run(1)


# -- class-balanced --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 13, 1000])
def test_balance_of_an_imbalanced_stream(chunk):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((500, 100, 20, 3))])
    shuffled = labels[torch.randperm(len(labels), generator=generator())]
    for stream in (labels, shuffled):
        buffer = Balanced(40, 4).feed(stream, chunk=chunk, generator=generator())
        counts = buffer.counts
        assert sum(counts) == 40
        assert counts[3] == 3  # everything of the rarest
        assert max(counts[:3]) - min(counts[:3]) <= 1  # the others alike
        assert buffer.seen.tolist() == [500, 100, 20, 3]


def test_a_new_class_takes_room_from_the_largest():
    buffer = Balanced(10, 3).feed(
        torch.zeros(100, dtype=torch.int64), chunk=9, generator=generator()
    )
    assert buffer.counts == [10, 0, 0]
    buffer.feed(torch.ones(100, dtype=torch.int64), chunk=9, generator=generator())
    assert buffer.counts == [5, 5, 0]
    buffer.feed(torch.full((2,), 2), chunk=9, generator=generator())
    assert buffer.counts[2] == 2
    assert sorted(buffer.counts) == [2, 4, 4]


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_within_a_class_every_sample_is_kept_with_the_same_probability(chunk):
    # Five places for two classes: one of them has fewer places and must not take in every newcomer.
    trials, total = 600, 40
    kept = torch.zeros(total)
    source = generator(2)
    labels = torch.arange(total) % 2
    for _ in range(trials):
        buffer = Balanced(5, 2).feed(labels, chunk=chunk, generator=source)
        assert sorted(buffer.counts) == [2, 3]
        kept[buffer.ids.long()] += 1
    assert kept.sum() == 5 * trials
    expected = 5 * trials / total  # 75, standard deviation 8.1
    quarters = kept.reshape(4, 10).sum(1) / 10
    assert (quarters - expected).abs().max() < 10
    assert (kept - expected).abs().max() < 40


def test_a_balanced_buffer_without_room_or_without_arrivals():
    labels = torch.arange(6) % 2
    assert Balanced(0, 2).feed(labels, chunk=6, generator=generator()).seen.tolist() == [3, 3]
    buffer = Balanced(3, 2).feed(labels, chunk=6, generator=generator())
    before = buffer.ids.tolist()
    buffer.feed(labels[:0], chunk=6, generator=generator())
    assert buffer.ids.tolist() == before


def test_a_balanced_buffer_changes_nothing_that_it_was_given():
    before, seen = ids(0, 4), torch.tensor([4, 0])
    class_balanced(
        before,
        torch.zeros(4, dtype=torch.int64),
        seen,
        ids(4, 9),
        torch.ones(5).long(),
        generator(),
    )
    assert before.tolist() == [0, 1, 2, 3]
    assert seen.tolist() == [4, 0]


def test_labels_of_empty_places_do_not_matter():
    for filler in (-1, 1):
        buffer, seen = class_balanced(
            empty(3),
            torch.full((3,), filler),
            torch.zeros(2, dtype=torch.int64),
            ids(0, 2),
            torch.tensor([0, 1]),
            generator(),
        )
        assert buffer.tolist() == [0, 1, EMPTY]
        assert seen.tolist() == [1, 1]
        assert (buffer.dtype, seen.dtype) == (torch.int32, torch.int64)


# -- herding ---------------------------------------------------------------------------------------


def slow_herding(features, count, mean):
    """Algorithm 4 of iCaRL, one sample after another, without choosing one twice."""
    chosen = []
    for k in range(1, count + 1):
        best, nearest = None, None
        for n, phi in enumerate(features):
            if n in chosen:
                continue
            average = (phi + sum(features[j] for j in chosen)) / k
            distance = float((mean - average).norm())
            if nearest is None or distance < nearest:
                best, nearest = n, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_herding_is_the_papers_loop(count):
    features = torch.randn(20, 5, generator=generator(), dtype=torch.float64)
    assert herding(features, count).tolist() == slow_herding(features, count, features.mean(0))
    mean = torch.ones(5, dtype=torch.float64)
    assert herding(features, count, mean=mean).tolist() == slow_herding(features, count, mean)


def test_herding_comes_nearer_to_the_mean_than_chance():
    features = torch.randn(200, 8, generator=generator())
    mean = features.mean(0)
    for count in (5, 20, 50):
        chosen = (features[herding(features, count)].mean(0) - mean).norm()
        others = [
            (features[torch.randperm(200, generator=generator(seed))[:count]].mean(0) - mean).norm()
            for seed in range(20)
        ]
        assert chosen < min(others) / 2


def test_the_first_of_the_chosen_are_a_choice_of_fewer():
    features = torch.randn(30, 4, generator=generator())
    assert herding(features, 12)[:5].tolist() == herding(features, 5).tolist()


def test_herding_of_fewer_than_wanted_takes_all():
    features = torch.randn(3, 4, generator=generator())
    assert sorted(herding(features, 10).tolist()) == [0, 1, 2]
    assert herding(features[:0], 10).tolist() == []


@pytest.mark.parametrize(
    ("available", "capacity", "expected"),
    [
        ([9, 9], 8, [4, 4]),
        ([9, 9, 9], 8, [3, 3, 2]),
        ([9, 1, 0, 9], 8, [4, 1, 0, 3]),
        ([2, 3], 8, [2, 3]),
        ([5, 5], 0, [0, 0]),
        ([0, 0], 4, [0, 0]),
        ([100, 1, 1, 1], 50, [47, 1, 1, 1]),
        ([5, 5, 5, 5], 2, [1, 1, 0, 0]),
    ],
)
def test_quotas(available, capacity, expected):
    assert quotas(torch.tensor(available), capacity).tolist() == expected
