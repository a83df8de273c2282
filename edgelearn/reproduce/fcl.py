"""Federated continual learning at equal memory, class by class on Fashion-MNIST.

The papers' setting, scaled down: new classes in five experiences, devices with Dirichlet shares of
each class, no labels of experiences at the end. TARGET (ICCV 2023) has 5 devices, CIFAR-100 and a
ResNet-18; Re-Fed (CVPR 2024) and FedSSI (ICML 2025) 20 devices and the same network; FOT (ICLR
2024) 125 clients and an AlexNet, with labels of experiences. Here ten devices hold 600 images each,
all take part in every round, and the network has 13,242 parameters. Orders of methods can be
compared with the papers', numbers can't.

A device may store `BUDGET_BYTES`, as much as two vectors of parameters, which is what EWC and
FedSSI need; methods that store samples get as many as fit.

**Rule.** `choose` ran each candidate of `CANDIDATES` once, with another seed and hence other shares
of the data, on training images that no reported run uses (6,000 to train on, 5,000 to answer);
the best average accuracy decided. The test images and the reported seeds had no part in it. The
other methods keep their defaults: no strength of EWC or SI is known to help where samples have no
label of their experience. Learning rate, batch size, rounds and epochs are the same for all, set
once by hand and not tuned for any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgelearn.device.learners import make_learner
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.datasets import Dataset, fashion_mnist
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.spec import DataSpec, Scenario
from edgelearn.scenario.world import build

NUM_TRAIN, NUM_TEST = 6_000, 5_000
BUDGET_BYTES = 2 * 4 * 13_242
SAMPLE_BYTES = 28 * 28 + 1
_CAPACITY = BUDGET_BYTES // (SAMPLE_BYTES + 4)  # a stored sample and its id
_MADE = (BUDGET_BYTES - 4_096) // (SAMPLE_BYTES - 1 + 4 * 10)  # with logits, beside statistics
_SEED_OF_CHOICE = 1_000


@dataclass(frozen=True, slots=True)
class Method:
    """A method, as it is compared.

    Attributes:
        strategy: Client strategy.
        args: Its arguments.
    """

    strategy: str
    args: Mapping[str, Any]


METHODS: Mapping[str, Method] = {
    "FedAvg": Method("naive", {}),
    "FedAvg+ER": Method("replay", {"capacity": _CAPACITY}),
    "FedEWC": Method("ewc", {}),
    "FedLwF": Method("lwf", {}),
    "Re-Fed": Method("re-fed", {"capacity": _CAPACITY}),
    "Re-Fed balanced": Method("re-fed", {"capacity": _CAPACITY, "is_balanced": True}),
    "FOT": Method("fot", {"energy": 0.9}),
    "FOT+ER": Method("fot+replay", {"fot": {"energy": 0.5}, "replay": {"capacity": _CAPACITY}}),
    "FedSSI": Method("fedssi", {}),
    "TARGET on device": Method("target", {"capacity": _MADE, "distill": 1.0}),
}

CANDIDATES: dict[str, tuple[Mapping[str, Any], ...]] = {
    "FOT": tuple({"energy": value} for value in (0.8, 0.9, 0.95)),
    "FOT+ER": tuple({"fot": {"energy": value}} for value in (0.5, 0.7, 0.9)),
    "TARGET on device": tuple({"distill": value} for value in (1.0, 5.0, 25.0)),
}


def scenario(
    method: str, *, seed: int = 0, args: Mapping[str, Any] | None = None, is_choice: bool = False
) -> Scenario:
    """Return what is run.

    Args:
        method: A name of `METHODS`.
        seed: Of everything random.
        args: Arguments to replace.
        is_choice: Whether hyperparameters are being chosen: on other images, see `spare_images`.

    Raises:
        KeyError: If there is no such method.
    """
    chosen = METHODS[method]
    dataset = "edgelearn.reproduce.fcl:spare_images" if is_choice else "fashion-mnist"
    raw: dict[str, Any] = {
        "name": f"fcl-{chosen.strategy.replace('+', '-')}",
        "title": f"{method}, class by class on Fashion-MNIST",
        "seed": seed,
        "data": {"dataset": dataset, "max_train": NUM_TRAIN, "max_test": NUM_TEST},
        "model": {"name": "cnn", "args": {"channels": [4, 8], "hidden": 32}},
        "fleet": {"num_devices": 10, "cohort": 10},
        "partition": {"kind": "dirichlet", "alpha": 0.5},
        "stream": {
            "kind": "class-incremental",
            "num_experiences": 5,
            "rounds_per_experience": 5,
        },
        "client": {
            "strategy": chosen.strategy,
            "args": {**chosen.args, **(args or {})},
            "epochs": 2,
            "batch_size": 16,
            "lr": 0.1,
        },
        "evaluate": {"every_rounds": 5},
    }
    return from_dict(raw, source=f"fcl, {method}")


def spare_images(spec: DataSpec) -> Dataset:
    """Return training images that no reported run uses: some to train on, others as test images."""
    whole = fashion_mnist(replace(spec, max_train=0, max_test=0))
    train = slice(NUM_TRAIN, 2 * NUM_TRAIN)
    test = slice(2 * NUM_TRAIN, 2 * NUM_TRAIN + NUM_TEST)
    return replace(
        whole,
        x_train=whole.x_train[train],
        y_train=whole.y_train[train],
        x_test=whole.x_train[test],
        y_test=whole.y_train[test],
    )


def run(method: str, seed: int) -> dict[str, float]:
    """Measure a method once.

    Args:
        method: A name of `METHODS`.
        seed: Of everything random.

    Returns:
        Of the float model, as papers have it: `accuracy` (ACC), `incremental accuracy` (AIA),
        `forgetting` and `learning accuracy`; `served accuracy`, ACC of the int8 model that devices
        answer with; `worst device`, ACC of the device that fares worst; and in bytes what a device
        stores, and on average sends and gets in a round, all messages counted.
    """
    ran = scenario(method, seed=seed)
    return measures(ran, simulate(ran))


def measures(ran: Scenario, record: RunRecord) -> dict[str, float]:
    """Return the numbers of a run; see `run`."""
    scores = record.scores("float")
    visits = len(record.rounds) * ran.fleet.cohort
    return {
        "accuracy": scores.average_accuracy,
        "incremental accuracy": scores.average_incremental_accuracy,
        "forgetting": scores.forgetting,
        "learning accuracy": scores.learning_accuracy,
        "served accuracy": record.scores().average_accuracy,
        "worst device": record.device_accuracy("float").worst,
        "bytes stored": float(make_learner(build(ran)).memory_bytes),
        "bytes sent": sum(line["bytes_up"] for line in record.rounds) / visits,
        "bytes received": sum(line["bytes_down"] for line in record.rounds) / visits,
    }


def choose(method: str) -> dict[str, float]:
    """Return the average accuracy of each candidate, on images that no reported run uses.

    Args:
        method: A name of `CANDIDATES`.
    """
    found = {}
    for candidate in CANDIDATES[method]:
        tried = scenario(method, seed=_SEED_OF_CHOICE, args=candidate, is_choice=True)
        found[_label(candidate)] = simulate(tried).scores("float").average_accuracy
    return found


def _label(values: Mapping[str, Any]) -> str:
    parts = (
        f"{key} {_label(value)}" if isinstance(value, Mapping) else f"{key} {value:g}"
        for key, value in values.items()
    )
    return ", ".join(parts)
