from __future__ import annotations

import pickle

import pytest
import torch

from edgelearn.continual.memory import Memory, SampleSpec, TensorSpec, check
from edgelearn.errors import StrategyError
from edgelearn.scenario.samples import EMPTY, Encoding, SharedSamples

DECLARED = {
    "fisher": TensorSpec((3, 2)),
    "seen": TensorSpec((4,), torch.int64),
    "flag": TensorSpec((), torch.bool),
    "buffer": SampleSpec(5),
}


def store(num=10):
    return SharedSamples(
        torch.arange(num, dtype=torch.uint8)[:, None], torch.arange(num) % 3, Encoding()
    )


def with_buffer(ids):
    memory = Memory.initial(DECLARED, store())
    return memory.replace(buffer=torch.tensor(ids, dtype=torch.int32))


def test_bytes():
    assert DECLARED["fisher"].stored_bytes == 24
    assert DECLARED["seen"].stored_bytes == 32
    assert DECLARED["flag"].stored_bytes == 1
    assert DECLARED["buffer"].stored_bytes == 20
    assert DECLARED["fisher"].device_bytes(100) == 24
    assert DECLARED["buffer"].device_bytes(100) == 5 * 104  # a device stores the samples


def test_the_beginning():
    memory = Memory.initial(DECLARED)
    check(memory, DECLARED)
    assert list(memory) == list(DECLARED)
    assert len(memory) == 4
    assert memory["buffer"].tolist() == [EMPTY] * 5
    assert not memory["fisher"].any()
    assert memory["flag"].shape == ()


def test_replace_gives_another_memory():
    memory = Memory.initial(DECLARED, store())
    other = memory.replace(seen=torch.ones(4, dtype=torch.int64))
    assert memory["seen"].sum() == 0
    assert other["seen"].sum() == 4
    assert other["fisher"] is memory["fisher"]
    assert other.store is memory.store
    with pytest.raises(StrategyError, match="memory has no sen; declared: fisher, seen, flag"):
        memory.replace(sen=torch.ones(4))
    with pytest.raises(TypeError):
        memory["seen"] = torch.ones(4)


def test_a_memory_is_not_tied_to_the_dictionary_it_was_made_of():
    tensors = {"a": torch.zeros(1)}
    memory = Memory(tensors)
    tensors["b"] = torch.zeros(1)
    assert list(memory) == ["a"]


def test_a_memory_without_a_store():
    with pytest.raises(StrategyError, match="no sample store"):
        _ = Memory.initial(DECLARED).store


def test_a_memory_survives_pickling():
    back = pickle.loads(pickle.dumps(with_buffer([3, 4, -1, -1, -1])))
    assert back["buffer"].tolist() == [3, 4, -1, -1, -1]
    assert back.store.labels(torch.tensor([4])).tolist() == [1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fisher": None}, "lacks the declared fisher"),
        ({"more": torch.zeros(1)}, "has more, which is not declared"),
        ({"fisher": torch.zeros(6)}, r"'fisher' is \(6,\) torch.float32, declared \(3, 2\)"),
        ({"seen": torch.zeros(4)}, r"'seen' is \(4,\) torch.float32, declared \(4,\) torch.int64"),
        ({"buffer": torch.zeros(6, dtype=torch.int32)}, r"'buffer' is \(6,\)"),
        ({"buffer": torch.zeros(5, dtype=torch.int64)}, "declared .* torch.int32"),
    ],
)
def test_check(change, expected):
    tensors = {**dict(Memory.initial(DECLARED)), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(StrategyError, match=expected):
        check(Memory(tensors), DECLARED)


def test_draw_without_replacement():
    memory = with_buffer([7, 2, EMPTY, 5, EMPTY])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = memory.draw("buffer", 2, generator).x.flatten().tolist()
        assert len(set(x)) == 2
        assert set(x) <= {7, 2, 5}
    drawn = memory.draw("buffer", 99, torch.Generator())
    assert sorted(drawn.x.flatten().tolist()) == [2, 5, 7]
    assert sorted(drawn.y.tolist()) == [1, 2, 2]


def test_draw_is_uniform():
    memory = with_buffer([7, 2, EMPTY, 5, 9])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([memory.draw("buffer", 1, generator).x.flatten() for _ in range(2000)])
    counts = torch.bincount(drawn.long(), minlength=10)[[7, 2, 5, 9]]
    assert (counts - 500).abs().max() < 100  # standard deviation 19


def test_draw_nothing():
    assert with_buffer([EMPTY] * 5).draw("buffer", 3, torch.Generator()) is None
    assert with_buffer([1, 2, 3, 4, 5]).draw("buffer", 0, torch.Generator()) is None


def test_draw_depends_on_the_generator():
    memory = with_buffer([1, 2, 3, 4, 5])
    first, again, other = (
        memory.draw("buffer", 5, torch.Generator().manual_seed(seed)).x.tolist()
        for seed in (0, 0, 1)
    )
    assert first == again != other
