"""A number of steps in place of whole epochs."""

from __future__ import annotations

import pytest
import torch

from edgelearn.continual.local import LocalTask, Trained
from edgelearn.continual.naive import Naive
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.learners import make_learner
from edgelearn.errors import ScenarioError
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.world import build
from edgelearn.testing.toy import toy_devices, toy_learner

PER_EPOCH = 3  # ten samples in batches of four


def fit(strategy=None, **spec):
    learner = toy_learner(strategy or Naive(), **spec)
    (device, *_) = toy_devices()
    assert len(device.samples(0)) == 10
    state = learner.initial_state(device.store)
    return learner.fit(state, learner.model.initial(), device, position=0, server_round=1)


def same(one, other):
    return all(torch.equal(one.update.arrays[n], v) for n, v in other.update.arrays.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_whole_epochs_of_steps_are_epochs(optimizer):
    by_steps = fit(steps=2 * PER_EPOCH, epochs=5, optimizer=optimizer)
    by_epochs = fit(epochs=2, optimizer=optimizer)
    assert same(by_steps, by_epochs)
    assert by_steps.update.metrics == by_epochs.update.metrics


@pytest.mark.parametrize(("steps", "samples"), [(1, 4), (3, 10), (4, 14), (7, 24)])
def test_so_many_steps_and_no_more(steps, samples):
    found = fit(steps=steps)
    assert found.update.metrics["num-steps"] == steps
    assert found.num_samples == samples
    assert not same(found, fit(steps=steps + 1))


def test_replay_goes_along():
    assert fit(Replay(capacity=8), steps=5).update.metrics["num-steps"] == 5


class ByItself(ClientStrategy):
    def fit(self, task: LocalTask) -> Trained:
        return Trained(task.params.clone(), task.memory, 0.0, 1, 1)


def test_a_strategy_that_trains_by_itself_counts_its_own(raw):
    raw["client"] |= {"strategy": f"{__file__}:ByItself", "steps": 3}
    with pytest.raises(ScenarioError, match="counts its own steps; leave it at 0"):
        make_learner(build(from_dict(raw)))
    raw["client"]["steps"] = 0
    make_learner(build(from_dict(raw)))
