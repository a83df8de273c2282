"""FedCurv against the sum of quadratics that it stands for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edgelearn.continual.fedcurv import FedCurv
from edgelearn.continual.fisher import empirical_fisher
from edgelearn.continual.memory import Memory
from edgelearn.continual.naive import Naive
from edgelearn.device.learner import Learner
from edgelearn.device.state import DeviceState
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.subject import Subject
from edgelearn.testing.toy import ToyDevice, toy_devices, toy_learner

SIZES = (3, 10, 6)


def uneven_devices() -> list[ToyDevice]:
    return [
        replace(device, ids=tuple(ids[:size] for ids in device.ids))
        for device, size in zip(toy_devices(), SIZES, strict=True)
    ]


class Fleet:
    """Three devices with unequal data, and a server that averages as FedAvg does."""

    def __init__(self, strategy: FedCurv, cohort: int) -> None:
        learner = toy_learner(strategy)
        facts = replace(learner.facts, num_devices=3, cohort=cohort)
        self.learner: Learner = replace(learner, facts=facts)
        self.devices = uneven_devices()
        self.states: list[DeviceState] = [
            self.learner.initial_state(device.store) for device in self.devices
        ]
        self.params = self.learner.model.initial()
        self.rounds = 0

    def play(self, cohort: list[int]) -> dict[int, Tensor]:
        """Play a round; return where each device came to [T]."""
        self.rounds += 1
        layout = self.learner.model.layout
        total = sum(SIZES[k] for k in cohort)
        mean, came_to = torch.zeros(layout.size), {}
        for k in cohort:
            fit = self.learner.fit(
                self.states[k], self.params, self.devices[k], position=0, server_round=self.rounds
            )
            self.states[k] = fit.state
            delta = layout.flatten(fit.update.arrays)
            came_to[k] = (self.params + delta)[: layout.num_trained]
            mean += SIZES[k] / total * delta
        self.params = self.params + mean
        return came_to

    def entered(self, k: int) -> Memory:
        strategy, model = self.learner.strategy, self.learner.model
        return strategy.enter(model, self.params, self.states[k].memory)[1]


def penalty(strategy: FedCurv, memory: Memory, theta: Tensor) -> float:
    pull = strategy.pull()
    distance = (theta - memory[pull.anchor]).square()
    return float(pull.strength / 2 * (memory[pull.curvature] * distance).double().sum())


def test_it_is_the_sum_over_the_other_devices() -> None:
    strategy = FedCurv(strength=0.3)
    fleet = Fleet(strategy, cohort=3)
    fleet.play([0, 1, 2])
    came_to = fleet.play([0, 1, 2])  # a second round, so that there is something to replace
    model = fleet.learner.model
    fishers = {
        k: empirical_fisher(model, theta, fleet.devices[k].samples(0))
        for k, theta in came_to.items()
    }
    one, other = (torch.randn(model.layout.num_trained) for _ in range(2))
    for k in range(3):
        memory = fleet.entered(k)
        rest = [j for j in range(3) if j != k]
        expected_curvature = sum(fishers[j] for j in rest)
        found = memory["curvature"]
        torch.testing.assert_close(found, expected_curvature, rtol=1e-3, atol=1e-5)

        def by_hand(theta: Tensor, rest: list[int] = rest) -> float:
            terms = [(fishers[j] * (theta - came_to[j]).square()).double().sum() for j in rest]
            return float(0.3 * sum(terms))

        difference = penalty(strategy, memory, one) - penalty(strategy, memory, other)
        assert difference == pytest.approx(by_hand(one) - by_hand(other), rel=1e-3)


def test_who_was_not_in_the_last_cohort_subtracts_nothing() -> None:
    fleet = Fleet(FedCurv(), cohort=2)
    fleet.play([0, 1])
    came_to = fleet.play([1, 2])
    model = fleet.learner.model
    fishers = {
        k: empirical_fisher(model, theta, fleet.devices[k].samples(0))
        for k, theta in came_to.items()
    }
    everyone = fishers[1] + fishers[2]
    torch.testing.assert_close(fleet.entered(0)["curvature"], everyone, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fleet.entered(1)["curvature"], fishers[2], rtol=1e-3, atol=1e-5)


def test_nothing_pulls_at_first_nor_ever_on_a_lone_device() -> None:
    fleet = Fleet(FedCurv(), cohort=1)
    assert not fleet.entered(0)["curvature"].any()
    fleet.play([0])
    fleet.play([0])
    assert not fleet.entered(0)["curvature"].any()
    assert fleet.entered(1)["curvature"].any()


def test_it_pulls_devices_towards_what_others_need() -> None:
    ends = {}
    for strength in (0.0, 30.0):
        fleet = Fleet(FedCurv(strength=strength), cohort=3)
        fleet.play([0, 1, 2])
        memory = fleet.entered(0)
        (theta,) = fleet.play([0]).values()
        ends[strength] = penalty(FedCurv(strength=1.0), memory, theta)
    assert ends[30.0] < 0.5 * ends[0.0]


def test_without_strength_it_trains_as_usual() -> None:
    curved, _ = Subject(lambda: FedCurv(strength=0.0)).run()
    plain, _ = Subject(Naive).run()
    torch.testing.assert_close(curved[: len(plain)], plain, rtol=0, atol=1e-6)


def test_what_travels_and_what_stays() -> None:
    learner = toy_learner(FedCurv())
    layout = learner.model.layout
    assert layout.size == 3 * layout.num_network + 2
    kept = sum(spec.stored_bytes for spec in learner.declaration.values() if spec.is_kept)
    assert kept == 8 * layout.num_trained + 4


def test_it_joins_others() -> None:
    from edgelearn.continual.strategy import make_strategy

    findings = check_strategy(lambda: make_strategy("replay+fedcurv", {}))
    assert not [finding for finding in findings if finding.passed is False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength is -1.0; at least 0"),
        ({"strength": math.inf}, "strength is inf"),
        ({"max_fisher_samples": -2}, "max_fisher_samples is -2; at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedCurv(**arguments)
