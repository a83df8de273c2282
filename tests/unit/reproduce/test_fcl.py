"""The comparison of federated continual learning: what is compared is what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelearn import plugins
from edgelearn.device.learners import make_learner
from edgelearn.reproduce import fcl
from edgelearn.scenario.datasets import fashion_mnist
from edgelearn.scenario.spec import DataSpec
from edgelearn.scenario.world import build

FASHION = Path("/usr/share/datasets/fashion-mnist")
INSTALLED = set(plugins.names(plugins.CLIENT_STRATEGIES))
RUNNABLE = [name for name, m in fcl.METHODS.items() if set(m.strategy.split("+")) <= INSTALLED]

pytestmark = pytest.mark.skipif(
    not FASHION.is_dir(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist"
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(fcl, "NUM_TRAIN", 300)
    monkeypatch.setattr(fcl, "NUM_TEST", 100)


@pytest.mark.parametrize("method", RUNNABLE)
def test_nobody_stores_more_than_the_budget(tiny, method):
    learner = make_learner(build(fcl.scenario(method)))
    assert learner.model.layout.num_network == 13_242
    assert learner.memory_bytes <= fcl.BUDGET_BYTES * 1.001
    if "capacity" in fcl.METHODS[method].args:  # and who stores samples makes use of it
        assert learner.memory_bytes > fcl.BUDGET_BYTES * 0.97


def test_candidates_are_tried_on_images_that_no_reported_run_sees(tiny):
    spare = fcl.spare_images(DataSpec(dataset="fashion-mnist"))
    whole = fashion_mnist(DataSpec(dataset="fashion-mnist"))
    reported = {image.tobytes() for image in whole.x_train[: fcl.NUM_TRAIN]}
    tests = {image.tobytes() for image in whole.x_test}
    training, held_out = (
        {image.tobytes() for image in images} for images in (spare.x_train, spare.x_test)
    )
    assert len(spare.y_train) == fcl.NUM_TRAIN
    assert len(spare.y_test) == fcl.NUM_TEST
    assert not training & (reported | tests | held_out)
    assert not held_out & (reported | tests)
    tried = fcl.scenario("FOT", args={"energy": 0.5}, is_choice=True)
    assert tried.data.dataset == "edgelearn.reproduce.fcl:spare_images"
    assert tried.client.args["energy"] == 0.5


def test_candidates_are_of_methods_and_hold_what_was_chosen():
    for method, candidates in fcl.CANDIDATES.items():
        chosen = fcl.METHODS[method].args
        assert any(candidate.items() <= chosen.items() for candidate in candidates)


def test_what_is_measured(tiny):
    found = fcl.run("FedAvg", 0)
    assert found["accuracy"] < 0.25  # the last classes alone
    assert found["forgetting"] > 0.5
    assert found["bytes stored"] == 0
    assert found["bytes sent"] > 4 * 13_242
    assert all(np.isfinite(value) for value in found.values())


def test_choosing_names_each_candidate(tiny, monkeypatch):
    monkeypatch.setitem(fcl.CANDIDATES, "FedAvg+ER", ({"capacity": 5}, {"capacity": 20}))
    found = fcl.choose("FedAvg+ER")
    assert list(found) == ["capacity 5", "capacity 20"]
    assert all(0 < value < 1 for value in found.values())


def test_an_unknown_method():
    with pytest.raises(KeyError, match="FedMagic"):
        fcl.scenario("FedMagic")
