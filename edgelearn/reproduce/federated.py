"""Federated averaging and its rivals, measured again on Fashion-MNIST.

Nothing here is continual: a stream of one experience is plain federated learning. Accuracy is that
of the float model over the fleet's pooled test samples, which are the whole test set.

- `fedavg` counts the rounds that federated averaging takes to a target, for data dealt out evenly
  and by shards, with small batches and with a single batch of all (McMahan et al. 2017, table 1).
- `label_skew` trains FedAvg, FedProx, SCAFFOLD, FedCurv and MOON on devices that hold few labels.

`FEDAVG` and `LABEL_SKEW` are the settings, as arguments of these functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgelearn.errors import RunError
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.datasets import Dataset, fashion_mnist
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.spec import DataSpec, Scenario

# -- measures --------------------------------------------------------------------------------------


def learning_curve(record: RunRecord) -> list[tuple[int, float]]:
    """Return the accuracy of the float model over all test samples, by round from 0."""
    curve = []
    for line in record.lines:
        if line["kind"] in ("start", "round") and line.get("accuracy") is not None:
            seen = line["accuracy"]
            curve.append((int(line.get("round", 0)), sum(seen["float"]) / sum(seen["count"])))
    return curve


def rounds_to(record: RunRecord, target: float) -> float:
    """Return the rounds to an accuracy, as McMahan et al. count them.

    The curve is made monotone by taking the best accuracy so far; between two evaluations it is
    interpolated linearly. Infinity if the run ends below the target.
    """
    before_round, best = 0, 0.0
    for server_round, accuracy in learning_curve(record):
        if accuracy >= target:
            part = (target - best) / (accuracy - best)
            return before_round + part * (server_round - before_round)
        before_round, best = server_round, max(best, accuracy)
    return math.inf


def accuracy_at_the_end(record: RunRecord, *, evaluations: int = 5) -> float:
    """Return the mean accuracy of the last evaluations; one alone is noisy where labels are few."""
    return float(np.mean([accuracy for _, accuracy in learning_curve(record)[-evaluations:]]))


def _numbers(record: RunRecord, target: float) -> dict[str, float]:
    return {
        "rounds": rounds_to(record, target),
        "accuracy": 100 * accuracy_at_the_end(record),
        "mib_up": sum(record.end["bytes_up"]) / 2**20,
    }


# -- federated averaging ---------------------------------------------------------------------------

ALL = 600  # samples of a device: its batch is all that it has
FEDAVG_TARGET = 0.84
RATES = (0.03, 0.1, 0.3)
# Learning rates by `choose_rate`, as the paper optimizes that of each row.
FEDAVG: tuple[Mapping[str, Any], ...] = (
    {"partition": "iid", "batch_size": ALL, "epochs": 1, "lr": 0.3, "num_rounds": 400},
    {"partition": "iid", "batch_size": 10, "epochs": 1, "lr": 0.1, "num_rounds": 60},
    {"partition": "iid", "batch_size": 10, "epochs": 5, "lr": 0.1, "num_rounds": 30},
    {"partition": "shards", "batch_size": ALL, "epochs": 1, "lr": 0.3, "num_rounds": 600},
    {"partition": "shards", "batch_size": 10, "epochs": 1, "lr": 0.1, "num_rounds": 350},
    {"partition": "shards", "batch_size": 10, "epochs": 5, "lr": 0.1, "num_rounds": 150},
)
# Rounds to 97 % on MNIST in table 1, for the same network, C = 0.1 and E = 1, by partition and
# whether the batch is all.
FEDAVG_PUBLISHED: Mapping[tuple[str, bool], int] = {
    ("iid", True): 1474,
    ("iid", False): 87,
    ("shards", True): 1796,
    ("shards", False): 664,
}


def fedavg_scenario(
    *,
    partition: str,
    batch_size: int,
    epochs: int,
    lr: float,
    num_rounds: int,
    seed: int = 0,
    dataset: str = "fashion-mnist",
) -> Scenario:
    """100 devices with 600 samples each, ten in a round; two hidden layers of 200.

    Args:
        partition: "iid", or "shards": two of 200 label-sorted shards for each device.
        batch_size: B.
        epochs: E.
        lr: Learning rate.
        num_rounds: Rounds of the run.
        seed: Seed of the run.
        dataset: Data set.
    """
    raw = _plain_federated("fedavg", num_rounds, seed, dataset) | {
        "model": {"name": "mlp", "args": {"hidden": [200, 200]}},
        "fleet": {"num_devices": 100, "cohort": 10},
        "partition": {"kind": partition, "shards_per_device": 2},
        "client": {"strategy": "naive", "epochs": epochs, "batch_size": batch_size, "lr": lr},
        "evaluate": {"every_rounds": 1 if num_rounds <= 100 else 5},
    }
    return from_dict(raw, source=f"fedavg, {partition}")


def fedavg(*, seed: int, **setting: Any) -> dict[str, float]:
    """Return the rounds to 84 %, the accuracy in percent at the end, and MiB sent by all devices.

    The paper's network reaches its target, 97 % of MNIST, where its curves flatten; so does this
    one at 84 % of Fashion-MNIST. What can be compared is how settings relate: IID, small batches
    take 17 times fewer rounds than one step on all, and devices of two labels 7.6 times more.

    Args:
        seed: Seed of the run.
        **setting: One of `FEDAVG`.
    """
    return _numbers(simulate(fedavg_scenario(**setting, seed=seed)), FEDAVG_TARGET)


# -- devices that hold few labels ------------------------------------------------------------------

# One learning rate for all; FedCurv's strength by `choose_strength`, of the others the first value.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
RIVALS: Mapping[str, Mapping[str, Any]] = {
    "naive": {},
    "fedprox": {"mu": 0.1},
    "scaffold": {},
    "fedcurv": {"strength": 1.0},
    "moon": {"mu": 1.0},
}
SKEWS: Mapping[str, Mapping[str, Any]] = {
    "dirichlet": {"kind": "dirichlet", "alpha": 0.1},
    "shards": {"kind": "shards", "shards_per_device": 2},
}
LABEL_SKEW: tuple[Mapping[str, Any], ...] = tuple(
    {"strategy": strategy, "skew": skew, "num_rounds": 40} for skew in SKEWS for strategy in RIVALS
)
LABEL_SKEW_TARGET = 0.78


def label_skew_scenario(
    *,
    strategy: str,
    skew: str,
    num_rounds: int,
    seed: int = 0,
    dataset: str = "fashion-mnist",
    **arguments: float,
) -> Scenario:
    """20 devices with 300 samples each on average, ten in a round; five epochs, one hidden layer.

    Args:
        strategy: One of `RIVALS`.
        skew: One of `SKEWS`.
        num_rounds: Rounds of the run.
        seed: Seed of the run.
        dataset: Data set.
        **arguments: Of the strategy, in place of those in `RIVALS`.
    """
    raw = _plain_federated("label-skew", num_rounds, seed, dataset) | {
        "model": {"name": "mlp", "args": {"hidden": [100]}},
        "fleet": {"num_devices": 20, "cohort": 10},
        "partition": dict(SKEWS[skew]),
        "client": {
            "strategy": strategy,
            "args": {**RIVALS[strategy], **arguments},
            "epochs": 5,
            "batch_size": 20,
            "lr": 0.05,
        },
    }
    raw["data"]["max_train"] = 6_000
    return from_dict(raw, source=f"label skew, {strategy}, {skew}")


def label_skew(*, seed: int, **setting: Any) -> dict[str, float]:
    """Return the rounds to 78 %, the accuracy in percent at the end, and MiB sent by all devices.

    Args:
        seed: Seed of the run.
        **setting: One of `LABEL_SKEW`.
    """
    return _numbers(simulate(label_skew_scenario(**setting, seed=seed)), LABEL_SKEW_TARGET)


# -- hyperparameters -------------------------------------------------------------------------------

_SEED_OF_CHOICE = 1_000
_HELD_OUT = 10_000


def held_out(spec: DataSpec) -> Dataset:
    """Return training images alone: the last 10,000 stand in for the test images."""
    whole = fashion_mnist(replace(spec, max_train=0, max_test=0))
    limit = spec.max_train or len(whole.y_train) - _HELD_OUT
    return replace(
        whole,
        x_train=whole.x_train[:limit],
        y_train=whole.y_train[:limit],
        x_test=whole.x_train[-_HELD_OUT:],
        y_test=whole.y_train[-_HELD_OUT:],
    )


def choose_rate(setting: Mapping[str, Any]) -> dict[float, float]:
    """Return what each learning rate reaches on held-out images, in percent at the end.

    Args:
        setting: One of `FEDAVG`.

    Returns:
        NaN for a rate with which no device of a cohort could train any more.
    """
    found = {}
    for lr in RATES:
        tried = {**setting, "lr": lr, "seed": _SEED_OF_CHOICE, "dataset": _CHOICE}
        try:
            found[lr] = 100 * accuracy_at_the_end(simulate(fedavg_scenario(**tried)))
        except RunError:
            found[lr] = math.nan
    return found


def choose_strength() -> dict[float, float]:
    """Return what each of FedCurv's strengths reaches on held-out images, mean over both skews."""
    found = {}
    for strength in STRENGTHS:
        runs = [
            simulate(
                label_skew_scenario(
                    strategy="fedcurv",
                    skew=skew,
                    num_rounds=40,
                    seed=_SEED_OF_CHOICE,
                    dataset=_CHOICE,
                    strength=strength,
                )
            )
            for skew in SKEWS
        ]
        found[strength] = 100 * float(np.mean([accuracy_at_the_end(run) for run in runs]))
    return found


_CHOICE = "edgelearn.reproduce.federated:held_out"


def _plain_federated(name: str, num_rounds: int, seed: int, dataset: str) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "data": {"dataset": dataset},
        "stream": {
            "kind": "class-incremental",
            "num_experiences": 1,
            "rounds_per_experience": num_rounds,
        },
        "runtime": {"name": "float"},  # one pass serves for both models
    }
