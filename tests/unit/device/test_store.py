"""The state of one real device: whole or the former one, and never another's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import Update
from edgelearn.device.state import DeviceState
from edgelearn.device.store import Answer, DeviceStore, Stored
from edgelearn.errors import StateError, StrategyError
from edgelearn.testing.toy import ENCODING, toy_images, toy_store

DECLARATION: Declaration = {
    "buffer": SampleSpec(3),
    "anchor": TensorSpec((2, 3)),
    "seen": TensorSpec((1,), torch.int64),
}


def stored(seed: int = 0) -> Stored:
    x, y = (torch.from_numpy(array) for array in toy_images(2))
    samples = toy_store()
    ids = samples.add(x, y)
    samples.retain(ids[[0, 3, 4, 7]])
    anchor = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    memory = Memory(
        {
            "buffer": torch.tensor([3, 0, -1], dtype=torch.int32),
            "anchor": anchor,
            "seen": torch.tensor([2**40 + seed]),
        },
        samples,
    )
    return Stored(DeviceState(memory, 2, 1), samples, {1: ids[[4, 7]]})


def assert_same(one: Stored, other: Stored) -> None:
    assert dict(one.state.memory).keys() == dict(other.state.memory).keys()
    for name, value in one.state.memory.items():
        assert torch.equal(value, other.state.memory[name])
        assert value.dtype == other.state.memory[name].dtype
    assert (one.state.begun, one.state.consolidated) == (
        other.state.begun,
        other.state.consolidated,
    )
    assert torch.equal(one.samples.used, other.samples.used)
    held = one.samples.used.nonzero().flatten()
    assert torch.equal(one.samples.batch(held).x, other.samples.batch(held).x)
    assert torch.equal(one.samples.labels(held), other.samples.labels(held))
    assert one.pending.keys() == other.pending.keys()
    for position, ids in one.pending.items():
        assert torch.equal(ids, other.pending[position])


def load(store: DeviceStore) -> Stored:
    found = store.load(DECLARATION, ENCODING)
    assert found is not None
    return found


def test_a_new_device_has_no_state(tmp_path: Path) -> None:
    assert DeviceStore(tmp_path / "device", digest="d").load(DECLARATION, ENCODING) is None


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(), DECLARATION)
    found = load(store)
    assert_same(found, stored())
    assert found.state.memory.store is found.samples
    assert found.answer is None


def test_the_answer_comes_back_to_be_sent_again(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, digest="d")
    update = Update({"w": torch.tensor([1.5, -2.0])}, {"num-examples": 3, "loss": 0.25})
    kept = stored()
    answered = Stored(kept.state, kept.samples, kept.pending, Answer(7, "question", update))
    store.save(answered, DECLARATION)
    answer = load(store).answer
    assert answer is not None
    assert (answer.server_round, answer.question) == (7, "question")
    assert torch.equal(answer.update.arrays["w"], update.arrays["w"])
    assert answer.update.metrics == update.metrics


def test_samples_can_be_forgotten_and_added_after_loading(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(), DECLARATION)
    found = load(store)
    found.samples.retain(torch.tensor([0], dtype=torch.int32))
    assert int(found.samples.used.sum()) == 1
    x, y = (torch.from_numpy(array) for array in toy_images(1))
    assert len(found.samples.add(x, y)) == 4
    assert_same(load(store), stored())  # the file is as it was


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    """A strategy may return a view of the parameters, or the same tensor under two names."""
    declaration: Declaration = {"a": TensorSpec((3,)), "b": TensorSpec((3,))}
    params = torch.arange(6.0, requires_grad=True)
    memory = Memory({"a": params[:3], "b": params[:3]})
    store = DeviceStore(tmp_path, digest="d")
    store.save(Stored(DeviceState(memory), toy_store()), declaration)
    found = store.load(declaration, ENCODING)
    assert found is not None
    assert found.state.memory["b"].tolist() == [0, 1, 2]


def test_a_save_replaces_the_former_state_and_leaves_no_other_file(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(1), DECLARATION)
    store.save(stored(2), DECLARATION)
    assert_same(load(store), stored(2))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_crash_while_saving_leaves_the_former_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(1), DECLARATION)

    def crash(_handle: int) -> None:
        raise OSError("power failure")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="power failure"):
        store.save(stored(2), DECLARATION)
    monkeypatch.undo()
    assert_same(load(store), stored(1))


def test_damage_anywhere_in_the_file_is_noticed(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(), DECLARATION)
    whole = store.path.read_bytes()
    for place in [*range(8, len(whole), 37), len(whole) - 1]:
        store.path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(StateError, match=r"state\.safetensors"):
            store.load(DECLARATION, ENCODING)
    store.path.write_bytes(whole)
    assert_same(load(store), stored())


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_file_is_noticed(tmp_path: Path, left: int) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(), DECLARATION)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:left])
    with pytest.raises(StateError, match=r"state\.safetensors: damaged or truncated"):
        store.load(DECLARATION, ENCODING)


def test_the_state_of_another_scenario_is_refused(tmp_path: Path) -> None:
    DeviceStore(tmp_path, digest="one").save(stored(), DECLARATION)
    with pytest.raises(StateError, match=r"belongs to the scenario one.*this run's is other"):
        DeviceStore(tmp_path, digest="other").load(DECLARATION, ENCODING)


def test_a_later_run_starts_anew_and_an_earlier_one_is_over(tmp_path: Path) -> None:
    first = DeviceStore(tmp_path, digest="d", run="20260101T000000-a")
    second = DeviceStore(tmp_path, digest="d", run="20260102T000000-a")
    first.save(stored(1), DECLARATION)
    assert second.load(DECLARATION, ENCODING) is None
    second.save(stored(2), DECLARATION)
    assert_same(load(second), stored(2))
    with pytest.raises(StateError, match="the device has moved on to the run 20260102"):
        first.load(DECLARATION, ENCODING)


def test_a_state_that_another_strategy_declared_is_refused(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, digest="d")
    store.save(stored(), DECLARATION)
    with pytest.raises(StrategyError, match="anchor"):
        store.load({**DECLARATION, "anchor": TensorSpec((9,))}, ENCODING)
