"""Laws of replay buffers: bounded, without duplicates, balanced, whatever arrives and when."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelearn.continual.buffers import class_balanced, reservoir
from edgelearn.scenario.samples import EMPTY

NUM_CLASSES = 4
CAPACITIES = st.integers(0, 12)
# What arrives: calls with a list of labels each.
ARRIVALS = st.lists(st.lists(st.integers(0, NUM_CLASSES - 1), max_size=15), max_size=6)
SEEDS = st.integers(0, 2**32)


def arrive(arrivals):
    """Yield (ids, labels) of each call, with ids counted through."""
    start = 0
    for labels in arrivals:
        yield (
            torch.arange(start, start + len(labels), dtype=torch.int32),
            torch.tensor(labels).long(),
        )
        start += len(labels)


def assert_is_buffer(buffer, capacity, num_seen):
    held = buffer[buffer != EMPTY].tolist()
    assert buffer.shape == (capacity,)
    assert buffer.dtype == torch.int32
    assert len(held) == min(capacity, num_seen)
    assert len(set(held)) == len(held)
    assert all(0 <= sample < num_seen for sample in held)
    assert EMPTY not in buffer[: len(held)].tolist()  # filled from the front


@given(capacity=CAPACITIES, arrivals=ARRIVALS, seed=SEEDS)
def test_reservoir(capacity, arrivals, seed):
    generator = torch.Generator().manual_seed(seed)
    buffer, seen = torch.full((capacity,), EMPTY, dtype=torch.int32), 0
    for ids, _ in arrive(arrivals):
        buffer = reservoir(buffer, seen, ids, generator)
        seen += len(ids)
        assert_is_buffer(buffer, capacity, seen)


@given(capacity=CAPACITIES, arrivals=ARRIVALS, seed=SEEDS)
def test_class_balanced(capacity, arrivals, seed):
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((capacity,), EMPTY, dtype=torch.int32)
    seen, all_labels = torch.zeros(NUM_CLASSES, dtype=torch.int64), torch.zeros(0).long()
    for ids, labels in arrive(arrivals):
        all_labels = torch.cat([all_labels, labels])
        held = all_labels[buffer.clamp(min=0).long()] if len(all_labels) else buffer.long()
        buffer, seen = class_balanced(buffer, held, seen, ids, labels, generator)
        assert_is_buffer(buffer, capacity, len(all_labels))
        assert seen.tolist() == torch.bincount(all_labels, minlength=NUM_CLASSES).tolist()
        counts = torch.bincount(all_labels[buffer[buffer != EMPTY].long()], minlength=NUM_CLASSES)
        # A class has all that was seen of it, or is within one of the largest.
        short = counts < seen
        if short.any():
            assert int(counts.max() - counts[short].min()) <= 1


@given(capacity=CAPACITIES, arrivals=ARRIVALS, seed=SEEDS)
def test_the_generator_alone_decides(capacity, arrivals, seed):
    def run():
        generator = torch.Generator().manual_seed(seed)
        buffer, seen = torch.full((capacity,), EMPTY, dtype=torch.int32), 0
        for ids, _ in arrive(arrivals):
            buffer = reservoir(buffer, seen, ids, generator)
            seen += len(ids)
        return buffer.tolist()

    assert run() == run()
