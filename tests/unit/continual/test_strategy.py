from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.continual.ewc import EWC
from edgelearn.continual.memory import Memory, TensorSpec
from edgelearn.continual.naive import Naive
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import (
    ClientStrategy,
    Facts,
    Update,
    make_strategy,
    supervised_loss,
)
from edgelearn.errors import PluginError, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]])
Y = torch.tensor([0, 1])
X = torch.zeros(2, 1)


# -- loss ------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy():
    expected = (math.log(1 + math.e + math.e**2) + math.log(1 + math.e + math.e**2)) / 2
    assert float(supervised_loss(LOGITS, Batch(X, Y))) == pytest.approx(expected)


def test_weights():
    single = F.cross_entropy(LOGITS, Y, reduction="none")
    weighted = supervised_loss(LOGITS, Batch(X, Y, torch.tensor([0.25, 0.75])))
    torch.testing.assert_close(weighted, 0.25 * single[0] + 0.75 * single[1])
    half = supervised_loss(LOGITS, Batch(X, Y, torch.tensor([0.5, 0.5])))
    torch.testing.assert_close(half, supervised_loss(LOGITS, Batch(X, Y)))


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 0.5])])
def test_masks_leave_out_the_classes_of_other_tasks(weight):
    logits = LOGITS.clone().requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    loss = supervised_loss(logits, Batch(X, Y, weight, mask))
    expected = (math.log(1 + math.e**2) + math.log(1 + math.e)) / 2
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[~mask].tolist() == [0, 0]
    assert LOGITS[0, 1] == 2  # the logits themselves stay


# -- the base class --------------------------------------------------------------------------------


def test_the_base_class_changes_nothing():
    strategy, memory, vector = ClientStrategy(), Memory({}), torch.zeros(3)
    model = FlatModel(nn.Linear(1, 3))
    batch, generator = Batch(X, Y), torch.Generator()
    assert strategy.declare(model, Facts(1, 3, 2)) == {}
    assert strategy.start(model, vector, memory, None) is memory
    assert strategy.rehearsal() is strategy.pull() is None
    assert strategy.is_declared
    assert strategy.is_frozen(memory) is False
    assert strategy.extend(batch, memory, generator) is batch
    assert strategy.adjust(vector, vector, memory) is vector
    assert strategy.proximal(vector, memory, lr=0.1) is vector
    assert strategy.after_step(vector, vector, vector, memory) is memory
    update = Update({"weight": vector}, {"loss": 1.0})
    assert strategy.upload(update, None, memory) is update
    assert strategy.finish(model, vector, None, memory, generator) is memory
    params = model.initial()
    torch.testing.assert_close(
        strategy.loss(model, params, batch, memory), F.cross_entropy(model.module(X), Y)
    )


HOOKS = (
    "declare",
    "start",
    "rehearsal",
    "pull",
    "extend",
    "loss",
    "adjust",
    "proximal",
    "after_step",
    "upload",
    "finish",
)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Naive(), set()),
        (Replay(), {"declare", "rehearsal", "finish"}),
        (EWC(), {"declare", "pull", "finish"}),
    ],
)
def test_engines_can_see_which_hooks_a_strategy_has(strategy, expected):
    assert {hook for hook in HOOKS if strategy.overrides(hook)} == expected


def test_a_hook_inherited_from_another_strategy_counts():
    class First(ClientStrategy):
        def adjust(self, gradients, params, memory):
            return -gradients

    class Second(First):
        pass

    assert Second().overrides("adjust")
    assert not Second().is_declared
    assert not Second().overrides("extend")


def test_the_example_of_the_docstring():
    class StayClose(ClientStrategy):
        def __init__(self, *, strength: float = 0.1) -> None:
            self.strength = strength

        def declare(self, model, facts):
            return {"anchor": TensorSpec((model.layout.num_trained,))}

        def start(self, model, params, memory, experience):
            return memory.replace(anchor=params.clone())

        def loss(self, model, params, batch, memory):
            distance = (params - memory["anchor"]).square().sum()
            return super().loss(model, params, batch, memory) + self.strength * distance

    model = FlatModel(nn.Linear(1, 3))
    strategy, params, batch = StayClose(strength=2.0), model.initial(), Batch(X, Y)
    memory = Memory.initial(strategy.declare(model, Facts(1, 3, 2)))
    memory = strategy.start(model, params, memory, None)
    far = strategy.loss(model, params + 1, batch, memory)
    torch.testing.assert_close(far, Naive().loss(model, params + 1, batch, memory) + 12)


# -- making one ------------------------------------------------------------------------------------


def test_make_a_strategy():
    strategy = make_strategy("ewc", {"strength": 3.0, "mode": "separate"})
    assert isinstance(strategy, EWC)
    assert (strategy.strength, strategy.mode) == (3.0, "separate")
    assert isinstance(make_strategy("edgelearn.continual.naive:Naive", {}), Naive)


def test_make_a_strategy_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from edgelearn.continual.strategy import ClientStrategy\n"
        "class Mine(ClientStrategy):\n"
        "    def __init__(self, *, size):\n"
        "        self.size = size\n"
    )
    assert make_strategy(f"{path}:Mine", {"size": 3}).size == 3
    with pytest.raises(ScenarioError, match="size"):
        make_strategy(f"{path}:Mine", {})


@pytest.mark.parametrize(
    ("reference", "arguments", "expected"),
    [
        (
            "ewc",
            {"strenght": 3, "moed": "x"},
            r"(?s)2 faults.*\[client.args\] strenght: EWC .* 'strength'.*allowed.*moed: .*'mode'",
        ),
        ("naive", {"x": 1}, "Naive does not take it; allowed: nothing"),
        ("ewc", {"mode": "x"}, r"\[client\] args: mode is 'x'; allowed: online"),
        ("ewc", {"strength": "much"}, r"\[client\] args: "),
        ("builtins:dict", {}, "not a subclass of edgelearn.ClientStrategy"),
        ("edgelearn.continual.ewc:MODES", {}, "not a subclass"),
    ],
)
def test_a_strategy_that_cannot_be_made(reference, arguments, expected):
    with pytest.raises(ScenarioError, match=expected):
        make_strategy(reference, arguments)


def test_an_unknown_strategy():
    with pytest.raises(PluginError, match="did you mean 'replay'"):
        make_strategy("repaly", {})
