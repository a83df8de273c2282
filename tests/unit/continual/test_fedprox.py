"""FedProx on the device."""

from __future__ import annotations

import math

import pytest
import torch

from edgelearn.continual.fedprox import FedProx
from edgelearn.continual.naive import Naive
from edgelearn.continual.strategy import make_strategy
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.subject import Subject
from edgelearn.testing.toy import toy_learner


def test_it_is_declared_so_that_compiled_engines_run_it() -> None:
    assert FedProx(mu=0.3).is_declared
    assert FedProx(mu=0.3).proximity() == 0.3


def test_the_same_bits_as_the_servers_mu() -> None:
    device = Subject(Naive).new_device()
    mine, theirs = toy_learner(FedProx(mu=0.7), momentum=0.5), toy_learner(Naive(), momentum=0.5)
    params, state = mine.model.initial(), mine.initial_state(device.store)
    place = {"position": 0, "server_round": 1}
    one = mine.fit(state, params, device, **place)
    other = theirs.fit(state, params, device, **place, proximal_mu=0.7)
    plain = theirs.fit(state, params, device, **place)
    for name, value in one.update.arrays.items():
        assert torch.equal(value, other.update.arrays[name])
        assert not torch.equal(value, plain.update.arrays[name])


def test_both_mu_add_up() -> None:
    device = Subject(Naive).new_device()
    learner = toy_learner(FedProx(mu=0.5))
    params, state = learner.model.initial(), learner.initial_state(device.store)
    both = learner.fit(state, params, device, position=0, server_round=1, proximal_mu=0.25)
    once = toy_learner(FedProx(mu=0.75)).fit(state, params, device, position=0, server_round=1)
    for name, value in both.update.arrays.items():
        assert torch.equal(value, once.update.arrays[name])


def test_it_joins_others() -> None:
    both = make_strategy("replay+fedprox", {"fedprox": {"mu": 0.2}, "replay": {"capacity": 4}})
    assert both.is_declared
    assert both.proximity() == 0.2
    assert both.rehearsal() is not None
    findings = check_strategy(lambda: both)
    assert not [finding for finding in findings if finding.passed is False]


@pytest.mark.parametrize("mu", [-0.1, math.nan, math.inf])
def test_bad_arguments(mu: float) -> None:
    with pytest.raises(ValueError, match=r"mu is .*at least 0"):
        FedProx(mu=mu)
