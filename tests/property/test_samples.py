"""Laws of a device's own samples: what is kept is kept as it is, what is not is gone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelearn.scenario.samples import EMPTY, Batch, Encoding, OwnedSamples

# Each step adds so many samples, or keeps those samples whose number is in the set.
STEPS = st.lists(
    st.one_of(st.integers(0, 6), st.frozensets(st.integers(0, 30), max_size=12)), max_size=10
)


@given(steps=STEPS)
def test_a_store_is_a_dictionary(steps):
    store = OwnedSamples.empty((2,), torch.uint8, Encoding())
    kept: dict[int, int] = {}  # number of a sample, from 1 -> its id
    number = 0
    for step in steps:
        if isinstance(step, int):
            numbers = list(range(number + 1, number + 1 + step))
            number += step
            x = torch.tensor(numbers, dtype=torch.uint8)[:, None].repeat(1, 2)
            ids = store.add(x, torch.tensor(numbers).long() % 7)
            kept.update(zip(numbers, ids.tolist(), strict=True))
        else:
            kept = {n: i for n, i in kept.items() if n in step}
            store.retain(torch.tensor([EMPTY, *kept.values()], dtype=torch.int32))
        ids = torch.tensor(list(kept.values()), dtype=torch.int32)
        assert len(set(kept.values())) == len(kept)
        assert store.batch(ids).x[:, 0].tolist() == list(kept)
        assert store.labels(ids).tolist() == [n % 7 for n in kept]
        assert int(store.used.sum()) == len(kept)
        assert not store.x[~store.used].any()
        assert not store.y[~store.used].any()


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.floats(0, 1)), min_size=1, max_size=5))
def test_weights_sum_to_one_however_often_batches_are_joined(sizes):
    def some(count):
        return Batch(torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64))

    batch = some(2)
    for count, share in sizes:
        batch = batch.join(some(count), share=share)
        assert len(batch.weight) == len(batch)
        torch.testing.assert_close(batch.weight.sum(), torch.tensor(1.0))
        torch.testing.assert_close(batch.weight[-count:].sum(), torch.tensor(share).float())
