"""Online learning: one pass, one sample at a time, is `epochs = 1` and `batch_size = 1`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgelearn
from edgelearn.continual.combined import Combined
from edgelearn.continual.naive import Naive
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.learner import steps_seed
from edgelearn.device.learners import make_learner
from edgelearn.device.loop import DeviceLoop
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.world import build
from edgelearn.seeds import permutation, split
from edgelearn.testing.toy import toy_devices, toy_learner, toy_model, toy_scenario

ONLINE = {"epochs": 1, "batch_size": 1}


class ByAutograd(ClientStrategy):
    """As naive, but no engine knows that."""

    def loss(self, model, params, batch, memory):
        return super().loss(model, params, batch, memory)


def one_by_one(order, data, lr=0.1):
    """SGD with one sample at a time, by a module and torch's optimizer: parameters [T]."""
    module = toy_model().module
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    for place in order:
        batch = data.batch(place[None])
        optimizer.zero_grad()
        F.cross_entropy(module(batch.x), batch.y).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("strategy", [Naive(), ByAutograd()])
def test_each_sample_is_a_step_and_is_met_once(strategy):
    learner, device = toy_learner(strategy, **ONLINE), toy_devices()[0]
    params, data = learner.model.initial(), device.samples(0)
    fit = learner.fit(
        learner.initial_state(device.store), params, device, position=0, server_round=1
    )
    assert fit.update.metrics["num-steps"] == fit.num_samples == len(data) == 10
    order = permutation(split(steps_seed(0, 1, device.device), 0), len(data))
    expected = one_by_one(torch.from_numpy(order), data) - params
    delta = learner.model.layout.flatten(fit.update.arrays)
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_replay_adds_its_samples_to_each_of_them():
    class Counting(ClientStrategy):
        sizes: list[tuple[int, int]] = []  # noqa: RUF012

        def loss(self, model, params, batch, memory):
            self.sizes.append((len(batch), batch.num_past))
            return super().loss(model, params, batch, memory)

    replay = Replay(capacity=6, replay_batch=3)
    strategy = Combined({"replay": replay, "count": Counting()})
    learner, device = toy_learner(strategy, **ONLINE), toy_devices()[0]
    state, params = learner.initial_state(device.store), learner.model.initial()
    for position in range(2):
        fit = learner.fit(state, params, device, position=position, server_round=position + 1)
        state = learner.consolidate(fit.state, params, device, upto=position + 1)
    assert Counting.sizes == [(1, 0)] * 10 + [(4, 3)] * 10


@pytest.mark.parametrize("strategy", ["naive", "replay", "maml", "slda"])
def test_a_fleet_learns_online(strategy):
    scenario = toy_scenario(
        client={"strategy": strategy, "lr": 0.2, **ONLINE},
        stream={"num_experiences": 2, "rounds_per_experience": 1},
    )
    record = edgelearn.simulate(scenario, engine="reference")
    first, last = (line["accuracy"] for line in record.rounds)
    assert len(record.rounds) == 2
    assert first["served"][0] >= 0.8 * first["count"][0]
    assert last["served"][1] > 0  # classes that it has met in one pass alone
    assert sum(last["served"]) >= 0.7 * sum(last["count"])


@pytest.mark.parametrize("engine", ["pool", "batched"])
def test_engines_agree(engine):
    def losses(engine):
        scenario = toy_scenario(client={"strategy": "replay", **ONLINE})
        return [line["loss"] for line in edgelearn.simulate(scenario, engine=engine).rounds]

    assert losses(engine) == pytest.approx(losses("reference"), rel=1e-5)


def test_a_device_answers_with_a_class_as_soon_as_it_was_told(tmp_path):
    world = build(toy_scenario(client={"strategy": "slda", "args": {"frozen_after": 0}}))
    device = DeviceLoop(
        make_learner(world),
        Int8Runtime(),
        tmp_path,
        encoding=world.train.encoding,
        sample_shape=world.sample_shape,
    )
    x, y = world.train.x, world.train.y
    seen: set[int] = set()
    for label in (2, 0, 3):
        rows = (y == label).nonzero().flatten()[:12]
        device.feedback(x[rows], y[rows])  # not a step was taken
        seen.add(label)
        told = torch.isin(y, torch.tensor(sorted(seen)))
        answers = device.infer(x[told])
        assert set(answers.tolist()) == seen
        assert (answers == y[told]).float().mean() > 0.8
