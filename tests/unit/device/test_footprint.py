"""The sum of what a device needs, by hand where that is possible, and beside what is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgelearn.continual.ewc import EWC
from edgelearn.continual.gdumb import GDumb
from edgelearn.continual.naive import Naive
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.allocated import allocated_peak
from edgelearn.device.counting import Count
from edgelearn.device.footprint import Round, count_steps, needs
from edgelearn.device.learner import Learner
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.scenario.spec import ClientSpec
from edgelearn.testing.toy import toy_facts

SHAPE, BATCH = (1, 8, 8), 16
STATE = torch.default_generator.get_state().nbytes


def samples() -> Samples:
    x = torch.arange(BATCH * 64, dtype=torch.int64).remainder(251).to(torch.uint8)
    y = torch.arange(BATCH) % 4
    store = SharedSamples(x.view(BATCH, *SHAPE), y, Encoding(1 / 255))
    return Samples(store, torch.arange(BATCH, dtype=torch.int32))


def learner_of(strategy: ClientStrategy, module: nn.Module, **spec: Any) -> Learner:
    client = ClientSpec(strategy="toy", lr=0.1, batch_size=BATCH, **spec)
    model = FlatModel(module)
    return Learner(model=model, strategy=strategy, spec=client, facts=toy_facts(), seed=0)


def small_mlp() -> nn.Module:
    return mlp(input_shape=SHAPE, num_classes=4, hidden=(32, 32))


def small_cnn() -> nn.Module:
    return cnn(input_shape=SHAPE, num_classes=4, channels=(16, 32), hidden=32)


def test_what_lives_is_counted_and_what_is_freed_is_not() -> None:
    given = torch.ones(100)
    with Count() as count:
        given.add_(1.0)
        view = given.view(10, 10)
        first = view + 1.0  # 400 bytes
        second = first * 2.0  # 800
        del first
        third = second + second  # 800 again
        del second, third
    assert count.peak == 800
    assert sorted(storage.num_bytes for storage in count.at_peak) == [400, 400]


def wide_mlp() -> nn.Module:
    return mlp(input_shape=SHAPE, num_classes=4, hidden=(256, 256))


def test_components_of_a_step_of_the_last_layer_by_hand() -> None:
    learner = learner_of(Naive(), wide_mlp(), train="last:1", momentum=0.9)
    size, hidden = learner.model.layout.size, 4 * BATCH * 256
    found = needs(learner, FloatRuntime(), samples(), overhead_bytes=1000).step.parts
    assert found == {
        "weights": 3 * 4 * size,  # as it came, the copy, the network's own
        "optimizer": 4 * (256 * 4 + 4),
        # In a frozen layer, what comes in and what goes out; behind it nothing is kept of that.
        "activations": 2 * hidden,
        "working": STATE,
        "batch": found["batch"],
        "served": 4 * size,
        "overhead": 1000,
    }
    assert 4 * BATCH * 64 <= found["batch"] <= 4 * BATCH * 64 + 9 * BATCH  # labels and ids


def test_biases_keep_what_relu_needs_and_no_inputs_of_layers() -> None:
    learner = learner_of(Naive(), wide_mlp(), train="bias", momentum=0.9)
    hidden = 4 * BATCH * 256
    found = count_steps(learner, samples())
    assert found["optimizer"] == 4 * (256 + 256 + 4)
    # The peak is at the upper ReLU: outputs of both, and derivatives by what it gives and gets.
    assert 2 * hidden <= found["activations"] < 2 * hidden + 100
    assert found["working"] == STATE + 2 * hidden


def test_momentum_adam_and_gradients_are_told_apart() -> None:
    sizes = {}
    for name, spec in {
        "sgd": {},
        "momentum": {"momentum": 0.9},
        "adam": {"optimizer": "adam"},
    }.items():
        sizes[name] = count_steps(learner_of(Naive(), small_mlp(), **spec), samples())
    vector = 4 * learner_of(Naive(), small_mlp()).model.layout.size
    assert "gradients" not in sizes["sgd"]  # written out: applied inside the weight product
    assert sizes["momentum"]["gradients"] == vector
    assert sizes["momentum"]["optimizer"] == vector
    assert sizes["adam"]["gradients"] == vector
    assert sizes["adam"]["optimizer"] == 2 * vector


def test_memory_of_a_strategy_is_in_the_sum() -> None:
    plain = needs(learner_of(Naive(), small_mlp()), FloatRuntime(), samples())
    ewc = learner_of(EWC(), small_mlp())
    found = needs(ewc, FloatRuntime(), samples())
    extra = found.step.parts["strategy"] - plain.step.parts.get("strategy", 0)
    vector = 4 * ewc.model.layout.size
    assert extra == ewc.memory_bytes + 3 * vector  # s F, 1 + s F, and their quotient
    replay = learner_of(Replay(capacity=10), small_mlp())
    found = needs(replay, FloatRuntime(), samples())
    assert found.step.parts["buffer"] == 10 * (4 + toy_facts().sample_bytes)
    # The replayed samples join the batch.
    assert found.step.parts["batch"] > 1.5 * plain.step.parts["batch"]


def test_sending_takes_the_update_and_a_copy_where_somebody_holds_the_parameters() -> None:
    plain = learner_of(Naive(), small_mlp())
    found, vector = needs(plain, FloatRuntime(), samples()), 4 * plain.model.layout.size
    assert found.sending.parts["weights"] == 3 * vector
    assert found.sending.parts["message"] == vector
    assert found.training.total == max(found.step.total, found.sending.total)
    held = learner_of(GDumb(capacity=8), small_mlp())
    found, vector = needs(held, FloatRuntime(), samples()), 4 * held.model.layout.size
    assert found.sending.parts["message"] == 2 * vector


OPTIONS: list[dict[str, Any]] = [
    {},
    {"train": "last:1"},
    {"train": "bias"},
    {"train": ("3",)},
    {"accumulate": 4},
    {"checkpoint": True},
    {"train": "last:2", "accumulate": 2, "checkpoint": True},
]


@pytest.mark.parametrize("network", [small_mlp, small_cnn])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_computed_is_close_to_allocated(network: Any, option: dict[str, Any]) -> None:
    learner = learner_of(Naive(), network(), momentum=0.9, **option)
    computed = sum(count_steps(learner, samples()).values())
    round_ = Round.of(learner, samples())
    round_.run()
    assert computed == pytest.approx(allocated_peak(round_.run), rel=0.15)


def test_each_option_needs_less_of_what_it_saves() -> None:
    def steps(**spec: Any) -> dict[str, int]:
        return count_steps(learner_of(Naive(), small_cnn(), momentum=0.9, **spec), samples())

    plain = steps()
    assert sum(steps(accumulate=8).values()) < 0.6 * sum(plain.values())
    assert steps(train="last:1")["optimizer"] == 4 * (32 * 4 + 4)
    assert "optimizer" in plain
    deep = nn.Sequential(
        nn.Flatten(), *(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh()) for _ in range(12))
    )
    kept = {
        again: count_steps(
            learner_of(Naive(), deep, train=("1", "12"), checkpoint=again), samples()
        )
        for again in (False, True)
    }
    assert kept[True]["activations"] < 0.7 * kept[False]["activations"]


def test_steps_leave_no_trace_in_the_network() -> None:
    learner = learner_of(Naive(), small_cnn(), checkpoint=True)
    before = learner.model.initial()
    count_steps(learner, samples())
    assert torch.equal(learner.model.initial(), before)
