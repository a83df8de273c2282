from __future__ import annotations

import pytest
import torch

from edgelearn.scenario.samples import (
    EMPTY,
    Batch,
    Domains,
    Encoding,
    OwnedSamples,
    Samples,
    SharedSamples,
)

X = torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def batch(count, *, start=0, weight=None, mask=None):
    x = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return Batch(x, torch.arange(start, start + count), weight, mask)


# -- batches ---------------------------------------------------------------------------------------


def test_join_without_a_share_weighs_all_alike():
    joined = batch(3).join(batch(2, start=10))
    assert joined.y.tolist() == [0, 1, 2, 10, 11]
    assert joined.x[:, 0].tolist() == [0, 1, 2, 10, 11]
    assert joined.weight is None
    assert len(joined) == 5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("mine", "others"), [(3, 2), (1, 1), (1, 7)])
def test_join_with_a_share(share, mine, others):
    weight = batch(mine).join(batch(others), share=share).weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.sum(), torch.tensor(1.0))
    torch.testing.assert_close(weight[mine:].sum(), torch.tensor(share))
    assert weight[:mine].unique().numel() == weight[mine:].unique().numel() == 1


def test_join_keeps_weights_that_are_there():
    first = batch(1).join(batch(1), share=0.25)
    again = first.join(batch(2), share=0.5)
    torch.testing.assert_close(again.weight, torch.tensor([0.375, 0.125, 0.25, 0.25]))


@pytest.mark.parametrize("other", [None, batch(0)])
@pytest.mark.parametrize("share", [None, 0.5])
def test_join_with_nothing(other, share):
    mine = batch(3)
    assert mine.join(other, share=share) is mine


def test_nothing_joined_with_something():
    other = batch(2)
    assert batch(0).join(other, share=0.5) is other


def test_join_keeps_masks():
    joined = batch(1, mask=torch.tensor([[True, False]])).join(
        batch(1, mask=torch.tensor([[False, True]]))
    )
    assert joined.mask.tolist() == [[True, False], [False, True]]


# -- encoding --------------------------------------------------------------------------------------


def test_encoding():
    encoding = Encoding(scale=1 / 255, mean=0.5, std=0.25)
    stored = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    decoded = encoding.decode(stored, torch.tensor([0]))
    torch.testing.assert_close(decoded.x, torch.tensor([[-2.0, -1.2, 2.0]]))
    assert decoded.x.dtype == torch.float32
    assert decoded.mask is None
    assert decoded.weight is None


def test_encoding_leaves_stored_floats_alone():
    stored = torch.ones(2, 3)
    assert Encoding(scale=3.0).decode(stored, torch.tensor([0, 0])).x.unique().tolist() == [3]
    assert stored.unique().tolist() == [1]


def test_encoding_looks_up_the_task_of_each_label():
    masks = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    decoded = Encoding(task_masks=masks).decode(torch.zeros(2, 1), torch.tensor([2, 0]))
    assert decoded.mask.tolist() == [[False, False, True], [True, True, False]]


# -- shared samples --------------------------------------------------------------------------------


def test_shared_samples():
    store = SharedSamples(X, Y, Encoding(scale=0.5))
    ids = torch.tensor([5, 0, 5], dtype=torch.int32)
    assert store.labels(ids).tolist() == [2, 0, 2]
    assert torch.equal(store.batch(ids).x, X[[5, 0, 5]].float() / 2)
    assert store.batch(ids).y.tolist() == [2, 0, 2]
    assert store.sample_bytes == 4 + 1
    assert len(store.batch(ids[:0])) == 0


def test_shared_samples_of_domains():
    flip = torch.stack([torch.arange(4), torch.arange(3, -1, -1)])[:, None]
    domains = Domains(flip, torch.ones(flip.shape))
    store = SharedSamples(X, Y, Encoding(), domains)
    ids = torch.tensor([1, 6 + 1, 6 + 5], dtype=torch.int32)  # domain * N + index
    assert store.labels(ids).tolist() == [1, 1, 2]
    assert store.stored(ids).flatten(1).tolist() == [[4, 5, 6, 7], [7, 6, 5, 4], [23, 22, 21, 20]]
    assert store.stored(ids).dtype == torch.uint8
    assert torch.equal(store.batch(ids).x, store.stored(ids).float())


def test_samples_are_ids_into_a_store():
    samples = Samples(SharedSamples(X, Y, Encoding()), torch.tensor([4, 2], dtype=torch.int32))
    assert len(samples) == 2
    assert samples.labels.tolist() == [1, 2]
    assert samples.batch().y.tolist() == [1, 2]
    assert samples.batch(slice(1, 9)).y.tolist() == [2]
    assert samples.batch(torch.tensor([1, 0, 1])).y.tolist() == [2, 1, 2]


# -- owned samples ---------------------------------------------------------------------------------


def owned():
    store = OwnedSamples.empty((1, 2, 2), torch.uint8, Encoding(scale=0.5))
    return store, store.add(X, Y)


def test_add_and_gather():
    store, ids = owned()
    assert ids.dtype == torch.int32
    assert ids.unique().numel() == 6
    assert torch.equal(store.batch(ids).x, X.float() / 2)
    assert store.labels(ids).tolist() == Y.tolist()
    assert store.used.all()


def test_an_empty_store_knows_the_size_of_a_sample():
    store = OwnedSamples.empty((1, 2, 2), torch.uint8, Encoding())
    assert store.sample_bytes == 5
    assert SharedSamples(X[:0], Y[:0], Encoding()).sample_bytes == 5
    assert store.add(X[:0], Y[:0]).tolist() == []
    store.retain(torch.tensor([EMPTY], dtype=torch.int32))


def test_what_is_forgotten_is_erased():
    store, ids = owned()
    store.retain(torch.tensor([int(ids[1]), EMPTY, int(ids[4])], dtype=torch.int32))
    assert int(store.used.sum()) == 2
    gone = ~store.used
    assert gone.sum() == 4
    assert not store.x[gone].any()
    assert not store.y[gone].any()
    assert torch.equal(store.batch(ids[[1, 4]]).x, X[[1, 4]].float() / 2)
    assert store.labels(ids[[1, 4]]).tolist() == [1, 1]


def test_retaining_nothing_erases_everything():
    store, _ = owned()
    store.retain(torch.tensor([], dtype=torch.int32))
    assert not store.x.any()
    assert not store.y.any()
    assert not store.used.any()


def test_slots_are_used_again():
    store, ids = owned()
    store.retain(ids[[1, 4]])
    new = store.add(X[:5] + 100, Y[:5])
    assert len(store.y) == 7  # four freed slots and one more
    assert not set(new.tolist()) & set(ids[[1, 4]].tolist())
    assert torch.equal(store.batch(new).x, (X[:5] + 100).float() / 2)
    assert torch.equal(store.batch(ids[[1, 4]]).x, X[[1, 4]].float() / 2)


def test_ids_stay_while_the_store_grows():
    store, ids = owned()
    for _ in range(3):
        store.add(X, Y)
    assert torch.equal(store.batch(ids).x, X.float() / 2)
    assert len(store.y) == 24


def test_a_store_never_changes_its_dtype():
    store = OwnedSamples.empty((1, 2, 2), torch.uint8, Encoding())
    with pytest.raises(RuntimeError):
        store.add(X.float(), Y)
    assert store.x.dtype == torch.uint8
    assert not store.used.any()


def test_samples_given_at_the_start_are_in_use():
    store = OwnedSamples(X.clone(), Y.clone(), Encoding())
    new = store.add(X[:1], Y[:1])
    assert new.tolist() == [6]


def test_restore():
    store, ids = owned()
    store.retain(ids[[1, 4]])
    back = OwnedSamples.restore(
        store.x.clone(), store.y.clone(), store.used.to(torch.uint8), store.encoding
    )
    assert back.used.dtype == torch.bool
    assert torch.equal(back.used, store.used)
    assert torch.equal(back.batch(ids[[1, 4]]).x, store.batch(ids[[1, 4]]).x)
    # It goes on as the one that was saved.
    assert torch.equal(back.add(X[:3], Y[:3]), store.add(X[:3], Y[:3]))
    assert torch.equal(back.x, store.x)


def test_a_fingerprint_tells_samples_and_their_order_apart():
    store = OwnedSamples.empty((2,), torch.uint8, Encoding())
    made = [Samples(store, torch.tensor(ids, dtype=torch.int32)) for ids in ([1, 2], [2, 1], [1])]
    prints = [samples.fingerprint for samples in made]
    assert len(set(prints)) == 3
    assert all(0 < number < 2**63 for number in prints)
    assert Samples(store, torch.tensor([1, 2])).fingerprint == prints[0]  # whatever the dtype
