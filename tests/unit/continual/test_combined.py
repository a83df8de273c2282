"""Several strategies as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edgelearn.continual.combined import Combined
from edgelearn.continual.ewc import EWC
from edgelearn.continual.local import LocalTask, Passage, Trained
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.naive import Naive
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy, Facts, make_strategy
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.subject import Subject
from edgelearn.testing.toy import toy_model


class Shrink(ClientStrategy):
    """Adds weight decay to the loss."""

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return super().loss(model, params, batch, memory) + self.strength * params.square().sum()


class Margin(ClientStrategy):
    """Has a loss of its own."""

    replaces_loss = True

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return torch.nn.functional.multi_margin_loss(model(params, batch.x), batch.y)


class Alone(ClientStrategy):
    """Trains by itself: not at all."""

    def fit(self, task: LocalTask) -> Trained:
        return Trained(task.params, task.memory, 0.0, 0, 0)


class Counts(ClientStrategy):
    """Counts rounds, beside the network too."""

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        return {"rounds": TensorSpec((1,)), "given": TensorSpec((1,), is_kept=False)}

    def shares(self, model: FlatModel, facts: Facts) -> dict[str, TensorSpec]:
        return {"rounds": TensorSpec((1,))}

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        assert float(memory["given"]) == 0  # of this round alone
        return params, memory.replace(given=model.layout.shared(params)["rounds"] + 1)

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        local = passage.local.clone()
        passage.model.layout.shared(local)["rounds"].copy_(memory["given"])
        return local, memory.replace(rounds=memory["rounds"] + 1)


def combined(*parts: ClientStrategy) -> Combined:
    return Combined({type(part).__name__.lower(): part for part in parts})


def batch_and_params() -> tuple[FlatModel, Tensor, Batch]:
    subject = Subject(Naive)
    return subject.learner.model, toy_model().initial(), subject.new_device().samples(0).batch()


@pytest.mark.parametrize(
    "parts",
    [(EWC(), Replay()), (Shrink(), Replay()), (Counts(), EWC(), Shrink()), (Margin(), Shrink())],
    ids=lambda parts: "+".join(type(part).__name__ for part in parts),
)
def test_the_contract_is_kept(parts: tuple[ClientStrategy, ...]) -> None:
    findings = check_strategy(lambda: combined(*parts))
    assert not [finding for finding in findings if finding.passed is False]


def test_declared_parts_stay_declared_so_that_compiled_engines_run_them() -> None:
    both = combined(EWC(strength=3.0), Replay())
    assert both.is_declared
    pull, rehearsal = both.pull(), both.rehearsal()
    assert pull is not None
    assert rehearsal is not None
    assert (pull.curvature, pull.strength, rehearsal.buffer) == ("ewc.fisher", 3.0, "replay.buffer")


def test_a_part_alone_trains_to_the_same_bits() -> None:
    alone, _ = Subject(Replay).run()
    both, _ = Subject(lambda: combined(Replay(), Naive())).run()
    assert torch.equal(alone, both)


def test_penalties_add_up_and_cross_entropy_counts_once() -> None:
    model, params, batch = batch_and_params()
    memory = Memory({})
    plain = Naive().loss(model, params, batch, memory)
    twice = Combined({"a": Shrink(0.1), "b": Shrink(0.2)}).loss(model, params, batch, memory)
    assert float(twice) == pytest.approx(float(plain + 0.3 * params.square().sum()), rel=1e-5)
    margin = Margin().loss(model, params, batch, memory)
    both = combined(Margin(), Shrink()).loss(model, params, batch, memory)
    assert float(both) == pytest.approx(float(margin + 0.1 * params.square().sum()), rel=1e-5)


def test_two_pulls_are_taken_in_turn() -> None:
    one, other = EWC(strength=2.0), EWC(strength=5.0)
    both = Combined({"a": one, "b": other})
    assert both.pull() is None
    assert both.overrides("proximal")
    params = torch.randn(4)
    memory = Memory(
        {
            f"{part}.{name}": torch.rand(4)
            for part in "ab"
            for name in ("fisher", "anchor", "constant")
        }
    )
    mine = [memory.select({n: f"{p}.{n}" for n in ("fisher", "anchor")}) for p in "ab"]
    expected = other.proximal(one.proximal(params, mine[0], lr=0.1), mine[1], lr=0.1)
    assert torch.equal(both.proximal(params, memory, lr=0.1), expected)


def test_what_is_shared_is_averaged_like_parameters() -> None:
    params, _ = Subject(Counts).run()
    layout = Subject(Counts).learner.model.layout
    assert layout.size == layout.num_network + 1
    assert float(layout.shared(params)["rounds"]) == 4.0  # two rounds of each of two experiences


def test_what_does_not_outlive_a_round_is_forgotten() -> None:
    subject = Subject(Counts)
    state, _ = subject.state_after_one(subject.new_device())
    assert float(state.memory["rounds"]) == 1.0
    assert float(state.memory["given"]) == 0.0


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((Replay(), Replay()), "replays"),
        ((Margin(), Margin()), "replaces the loss"),
        ((Alone(), Shrink()), "can't change the steps"),
        ((Alone(), Replay()), "can't change the steps"),
        ((EWC(), Alone()), "can't change the steps"),
        ((Alone(), Alone()), "trains by itself"),
    ],
)
def test_parts_that_want_the_same_place_are_refused(
    parts: tuple[ClientStrategy, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Combined({f"p{k}": part for k, part in enumerate(parts)})


def test_by_name_with_arguments_for_each() -> None:
    made = make_strategy("ewc+replay", {"ewc": {"strength": 7.0}})
    assert isinstance(made, Combined)
    pull = made.pull()
    assert pull is not None
    assert pull.strength == 7.0


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        ("ewc+replay", {"strength": 1.0}, "no part of 'ewc\\+replay'"),
        ("ewc+replay", {"ewc": {"strenth": 1.0}}, "did you mean"),
        ("replay+replay", {}, "same name twice"),
        ("ewc+nonsense", {}, "unknown name"),
    ],
)
def test_faults_are_named(reference: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ScenarioError, Exception), match=message):
        make_strategy(reference, arguments)


def test_a_passage_goes_through_all_parts() -> None:
    subject = Subject(lambda: Combined({"a": Counts(), "shrink": Shrink()}))
    device = subject.new_device()
    state, params = subject.at_start(device)
    fit = subject.fit(state, params, device, 0)
    assert float(fit.update.arrays["shared/rounds"]) == 1.0
    assert float(replace(fit).state.memory["a.rounds"]) == 1.0
