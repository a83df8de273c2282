"""Measures of federated learning, and settings that are what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgelearn.federated.record import RunRecord
from edgelearn.reproduce import federated
from edgelearn.scenario.world import build

FASHION = Path("/usr/share/datasets/fashion-mnist")


def record(*curve: tuple[int, float], kind: str = "round") -> RunRecord:
    """A record with these accuracies after these rounds, of two experiences of unequal size."""
    lines: list[dict[str, Any]] = [{"kind": "run"}]
    for server_round, accuracy in curve:
        right = round(400 * accuracy)
        first = min(100, right)
        seen = {"count": [100, 300], "float": [first, right - first], "served": [0, 0]}
        lines.append({"kind": kind, "round": server_round, "accuracy": seen})
    lines.insert(2, {"kind": "round", "round": 1, "accuracy": None})  # not every round is measured
    return RunRecord(tuple(lines))


def test_all_test_samples_count_alike() -> None:
    assert federated.learning_curve(record((5, 0.5), (10, 0.25))) == [(5, 0.5), (10, 0.25)]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(10, 0.2), (20, 0.6)], 17.5),  # between two evaluations
        ([(10, 0.4), (20, 0.2), (30, 0.6)], 25.0),  # the best so far is 0.4, at the last one
        ([(10, 0.5)], 10.0),
        ([(4, 0.9)], 4 * 0.5 / 0.9),
        ([(10, 0.2), (20, 0.4)], math.inf),
    ],
)
def test_rounds_to_a_target(curve: list[tuple[int, float]], expected: float) -> None:
    assert federated.rounds_to(record(*curve), 0.5) == pytest.approx(expected)


def test_the_end_is_a_mean_of_the_last_evaluations() -> None:
    found = record((1, 0.0), (2, 0.5), (3, 0.75))
    assert federated.accuracy_at_the_end(found, evaluations=2) == pytest.approx(0.625)
    assert federated.accuracy_at_the_end(found) == pytest.approx(1.25 / 3)


def test_settings_of_federated_averaging() -> None:
    for setting in federated.FEDAVG:
        scenario = federated.fedavg_scenario(**setting, seed=3)
        assert scenario.seed == 3
        assert scenario.num_rounds == setting["num_rounds"]
        assert scenario.fleet.cohort / scenario.fleet.num_devices == 0.1
        assert 60_000 / scenario.fleet.num_devices == federated.ALL
        if setting["epochs"] == 1:
            key = (setting["partition"], setting["batch_size"] == federated.ALL)
            assert key in federated.FEDAVG_PUBLISHED


@pytest.fixture
def on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Fashion-MNIST, which not every machine has, by digits."""
    plain = federated._plain_federated

    def on_digits(name: str, num_rounds: int, seed: int, _dataset: str) -> dict[str, Any]:
        return plain(name, num_rounds, seed, "digits")

    monkeypatch.setattr(federated, "_plain_federated", on_digits)


SOME = [s for s in federated.LABEL_SKEW if s["strategy"] == "naive" or s["skew"] == "dirichlet"]


@pytest.mark.parametrize("setting", SOME, ids=lambda s: f"{s['strategy']} {s['skew']}")
@pytest.mark.usefixtures("on_digits")
def test_every_rival_runs_on_skewed_labels(setting: dict[str, Any]) -> None:
    found = federated.label_skew(seed=1, **{**setting, "num_rounds": 6})
    assert found["accuracy"] > 15  # chance is 10
    assert found["mib_up"] > 0
    world = build(federated.label_skew_scenario(**setting))
    labels = [
        len(world.train_samples(device, 0).labels.unique()) / world.num_classes
        for device in range(20)
    ]
    assert sum(labels) / 20 < 0.6


@pytest.mark.usefixtures("on_digits")
def test_averaging_learns() -> None:
    setting = {"partition": "iid", "batch_size": 5, "epochs": 5, "lr": 0.1, "num_rounds": 25}
    found = federated.fedavg(seed=0, **setting)
    assert found["rounds"] < 25
    assert found["accuracy"] > 80


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not on this machine")
def test_hyperparameters_are_chosen_on_training_images_alone() -> None:
    spec = federated.fedavg_scenario(**federated.FEDAVG[0]).data
    reported, spare = federated.fashion_mnist(spec), federated.held_out(spec)
    assert (len(spare.y_train), len(spare.y_test)) == (50_000, 10_000)
    assert (spare.x_test == reported.x_train[-10_000:]).all()
    few = federated.held_out(replace(spec, max_train=6_000))
    assert (few.x_train == reported.x_train[:6_000]).all()
