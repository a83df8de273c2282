"""A real device keeps samples: those it still needs, those it remembers, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import edgelearn
from edgelearn.device.learners import make_learner
from edgelearn.device.resident import ResidentDevice
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.errors import DivergenceError, StateError
from edgelearn.fleet.workbench import SimulatedData
from edgelearn.runtime.protocol import make_runtime
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.world import World, build

CAPACITY = 5


@pytest.fixture(scope="module")
def world() -> World:
    return build(
        edgelearn.load(
            "split-digits",
            data={"max_train": 200, "max_test": 40},
            model={"args": {"hidden": [6]}},
            fleet={"num_devices": 3, "cohort": 3},
            stream={"num_experiences": 4, "rounds_per_experience": 2},
            client={"strategy": "replay", "args": {"capacity": CAPACITY}, "epochs": 1},
        )
    )


class Bench:
    """One resident device, and the simulated one with the same life beside it."""

    def __init__(self, world: World, folder: Path, device: int = 1) -> None:
        self.world, self.device = world, device
        self.learner = make_learner(world)
        self.store = DeviceStore(folder, digest=world.scenario.digest)
        runtime = make_runtime("int8", {})
        self.resident = ResidentDevice(world, self.learner, runtime, self.store, device=device)
        self.data = SimulatedData(world, device)
        self.state = self.learner.initial_state(world.train)
        self.params = self.learner.model.initial()

    def fit(self, position: int, server_round: int) -> Tensor:
        update, stored = self.resident.fit(
            self.params, position=position, server_round=server_round
        )
        self.resident.commit(stored)
        expected = self.learner.fit(
            self.state, self.params, self.data, position=position, server_round=server_round
        )
        self.state = expected.state
        ours = self.learner.model.layout.flatten(update.arrays)
        assert torch.equal(ours, self.learner.model.layout.flatten(expected.update.arrays))
        assert update.metrics == expected.update.metrics
        return ours

    def consolidate(self, position: int) -> int:
        count, stored = self.resident.consolidate(self.params, position=position)
        self.resident.commit(stored)
        self.state = self.learner.consolidate(self.state, self.params, self.data, upto=position + 1)
        return count

    def stored(self) -> Stored:
        found = self.store.load(self.learner.declaration, self.world.train.encoding)
        assert found is not None
        return found

    def num_shown(self, *positions: int) -> int:
        return sum(len(self.world.train_samples(self.device, p)) for p in positions)

    def check_memory(self) -> None:
        """The kept samples are those that the simulated device has indices of, in their order."""
        stored = self.stored()
        ours, theirs = stored.state.memory["buffer"], self.state.memory["buffer"]
        assert torch.equal(ours == -1, theirs == -1)
        kept = ours[ours != -1].long()
        assert torch.equal(stored.samples.x[kept], self.world.train.stored(theirs[theirs != -1]))
        assert (stored.state.begun, stored.state.consolidated) == (
            self.state.begun,
            self.state.consolidated,
        )


def test_samples_are_held_until_they_are_consolidated(world: World, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path)
    bench.params = bench.params + bench.fit(0, 1)
    assert bench.stored().samples.used.sum() == bench.num_shown(0)
    assert bench.consolidate(0) == bench.num_shown(0)
    stored = bench.stored()
    assert stored.samples.used.sum() == min(CAPACITY, bench.num_shown(0))
    assert not stored.pending
    assert not stored.samples.x[~stored.samples.used].any()
    bench.check_memory()
    bench.params = bench.params + bench.fit(1, 2)
    assert list(bench.stored().pending) == [1]
    assert bench.stored().samples.used.sum() == CAPACITY + bench.num_shown(1)


OPTIONS = {
    "online": {"stream.online": True, "stream.blur": 0.4},
    "late labels": {"labels.delay": 1, "labels.noise": 0.3, "labels.missing": 0.2},
    "relabel": {"stream.kind": "domain-incremental", "stream.transform": "relabel"},
    "gradual": {"stream.kind": "domain-incremental", "stream.drift": "gradual"},
    "cumulative": {"stream.cumulative": True},
    "untold": {
        "stream.boundaries": "detected",
        "stream.detector": "page-hinkley",
        "stream.detector_args": {"threshold": 3.0, "min_samples": 5},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_stream_is_the_same_on_a_real_device(world: World, tmp_path: Path, name: str) -> None:
    plain = world.scenario.as_dict()
    bench = Bench(build(from_dict(plain, overrides=OPTIONS[name])), tmp_path)
    for server_round in (1, 2, 3, 4, 8):
        position = bench.world.stream.position(server_round)
        bench.params = bench.params + 20 * bench.fit(position, server_round)
        if server_round == 2 and name != "untold":
            bench.consolidate(position)
        bench.check_memory()
    if name == "untold":
        stored = bench.stored()
        assert stored.state.consolidated > 0
        assert set(stored.pending) == set(range(stored.state.consolidated, 4))


def test_a_device_that_was_away_consolidates_what_it_missed(world: World, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path)
    bench.fit(0, 1)
    bench.fit(2, 5)  # position 1 passed without a word from the server
    assert list(bench.stored().pending) == [2]
    bench.check_memory()
    assert bench.consolidate(3) == bench.num_shown(3)
    assert not bench.stored().pending
    bench.check_memory()


def test_consolidating_again_changes_nothing(world: World, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path)
    bench.fit(0, 1)
    bench.consolidate(0)
    before = load_file(bench.store.path)
    assert bench.consolidate(0) == bench.num_shown(0)
    after = load_file(bench.store.path)
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_training_again_after_consolidation_keeps_no_samples(world: World, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path)
    bench.fit(0, 1)
    bench.consolidate(0)
    bench.fit(0, 2)
    assert not bench.stored().pending
    assert bench.stored().samples.used.sum() <= CAPACITY


def test_the_same_question_is_answered_alike_and_once(world: World, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path)
    first, stored = bench.resident.fit(bench.params, position=0, server_round=1)
    bench.resident.commit(stored)
    again, _ = bench.resident.fit(bench.params, position=0, server_round=1)
    assert all(torch.equal(first.arrays[name], again.arrays[name]) for name in first.arrays)
    other, _ = bench.resident.fit(bench.params + 0.01, position=0, server_round=1)
    assert not all(torch.equal(first.arrays[name], other.arrays[name]) for name in first.arrays)


def test_evaluation_is_that_of_the_simulator_and_stores_nothing(
    world: World, tmp_path: Path
) -> None:
    bench = Bench(world, tmp_path)
    counts, _ = bench.resident.evaluate(bench.params, position=0)
    assert not bench.store.path.exists()
    assert sum(counts.count) == sum(
        len(world.test_samples(bench.device, e)) for e in range(world.stream.num_experiences)
    )
    bench.params = bench.params + bench.fit(0, 1)
    before, _ = bench.resident.evaluate(bench.params, position=0)
    bench.consolidate(0)
    content = bench.store.path.read_bytes()
    assert bench.resident.evaluate(bench.params, position=0) == (before, None)
    assert bench.store.path.read_bytes() == content


def test_a_failure_leaves_the_device_as_it_was(world: World, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path)
    bench.fit(0, 1)
    before = bench.store.path.read_bytes()
    with pytest.raises(DivergenceError):
        bench.resident.fit(torch.full_like(bench.params, float("nan")), position=0, server_round=2)
    bench.resident.fit(bench.params, position=0, server_round=2)  # not committed
    assert bench.store.path.read_bytes() == before
    bench.fit(0, 2)


@pytest.mark.parametrize("device", [-1, 3])
def test_a_device_that_is_not_in_the_fleet(world: World, tmp_path: Path, device: int) -> None:
    with pytest.raises(StateError, match="its fleet has 3, counted from 0"):
        Bench(world, tmp_path, device)


def test_one_process_at_a_time(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("edgelearn.device.store._LOCK_WAIT_S", 0.1)
    store = DeviceStore(tmp_path, digest="d")
    with (
        store.locked(),
        pytest.raises(StateError, match="in use by another process"),
        DeviceStore(tmp_path, digest="d").locked(),
    ):
        pass
    with store.locked():
        pass
