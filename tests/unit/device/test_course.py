"""From one experience to the next: what is consolidated, what begins, and what was missed."""

from __future__ import annotations

from typing import Any

import torch

from edgelearn.continual.ewc import EWC
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.learner import Learner
from edgelearn.device.state import Fit
from edgelearn.params import FlatModel
from edgelearn.testing.toy import ToyDevice, toy_devices, toy_learner


def trained(learner: Learner, device: ToyDevice, *, position: int = 0) -> Fit:
    state, params = learner.initial_state(device.store), learner.model.initial()
    return learner.fit(state, params, device, position=position, server_round=3)


def test_consolidating_twice_does_nothing() -> None:
    learner, device = toy_learner(EWC()), toy_devices()[0]
    done = trained(learner, device)
    params = learner.model.initial()
    once = learner.consolidate(done.state, params, device, upto=1)
    twice = learner.consolidate(once, params + 1, device, upto=1)
    assert twice is once
    assert once.consolidated == 1
    assert float(once.memory["fisher"].sum()) > 0


def test_a_missed_consolidation_is_made_up_before_the_next_experience() -> None:
    learner, device = toy_learner(EWC(strength=5.0)), toy_devices()[0]
    params = learner.model.initial()
    done = trained(learner, device)
    missed = learner.fit(done.state, params, device, position=1, server_round=9)
    present = learner.consolidate(done.state, params, device, upto=1)
    expected = learner.fit(present, params, device, position=1, server_round=9)
    assert (missed.state.begun, missed.state.consolidated) == (2, 1)
    for name, array in expected.update.arrays.items():
        assert torch.equal(missed.update.arrays[name], array), name
    assert torch.equal(missed.state.memory["fisher"], expected.state.memory["fisher"])


class Diary(ClientStrategy):
    """Writes down which experiences it began and which it finished."""

    def declare(self, model: FlatModel, facts: Any) -> Declaration:
        return {"began": TensorSpec((2,)), "finished": TensorSpec((2,)), "held": TensorSpec((2,))}

    def start(self, model: Any, params: Any, memory: Memory, experience: Any) -> Memory:
        began = memory["began"].clone()
        began[experience.position] += 1
        return memory.replace(began=began)

    def finish(self, model: Any, params: Any, data: Any, memory: Memory, gen: Any) -> Memory:
        place = int(memory["finished"].sum())
        finished, held = memory["finished"].clone(), memory["held"].clone()
        finished[place] += 1
        held[place] = len(data)
        return memory.replace(finished=finished, held=held)


def test_a_device_that_was_away_begins_and_finishes_what_it_missed() -> None:
    learner, device = toy_learner(Diary()), toy_devices()[0]
    params = learner.model.initial()
    late = trained(learner, device, position=1)
    assert late.state.memory["began"].tolist() == [1, 1]
    assert late.state.memory["finished"].tolist() == [1, 0]
    end = learner.consolidate(late.state, params, device, upto=2)
    assert end.memory["finished"].tolist() == [1, 1]
    assert end.memory["held"].tolist() == [10, 10]
    never = learner.consolidate(learner.initial_state(), params, device, upto=2)
    assert (never.begun, never.consolidated) == (2, 2)
    assert never.memory["began"].tolist() == [1, 1]


def test_an_experience_begins_once_however_many_rounds_it_lasts() -> None:
    learner, device = toy_learner(Diary()), toy_devices()[0]
    state = learner.initial_state()
    for server_round in (1, 2, 3):
        state = learner.fit(
            state, learner.model.initial(), device, position=0, server_round=server_round
        ).state
    assert state.memory["began"].tolist() == [1, 0]
    assert state.memory["finished"].tolist() == [0, 0]


def test_an_empty_experience_is_finished_too() -> None:
    device = toy_devices()[0]
    empty = ToyDevice(0, device.store, tuple(ids[:0] for ids in device.ids))
    for strategy in (EWC(), Replay(capacity=3), Diary()):
        learner = toy_learner(strategy)
        done = trained(learner, empty)
        assert done.update.metrics == {"num-examples": 0, "loss": 0.0, "num-steps": 0}
        assert all(not array.any() for array in done.update.arrays.values())
        after = learner.consolidate(done.state, learner.model.initial(), empty, upto=1)
        assert after.consolidated == 1
