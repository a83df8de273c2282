"""Settings and results of ContinualAI's continual-learning-baselines, on MNIST."""

from __future__ import annotations

from typing import Any

from edgelearn.reproduce.centralised import learn
from edgelearn.reproduce.table import Row, Table

_SOURCE = "continual-learning-baselines, results table"
_TOLERANCE = 3.0
_PERMUTED: dict[str, Any] = {"dataset": "mnist", "kind": "permuted", "num_experiences": 10}
_CLASSES: dict[str, Any] = {"dataset": "mnist", "kind": "class-incremental"}
_TASKS: dict[str, Any] = {"dataset": "mnist", "kind": "task-incremental"}
_ONE_PASS: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "batch_size": 10}
_17_TASKS: dict[str, Any] = {**_PERMUTED, "num_experiences": 17, "max_train": 1000}


def _row(
    method: str,
    setting: str,
    measured: float,
    target: str,
    stream: dict[str, Any],
    hidden: list[int],
    client: dict[str, Any],
    strategy: str,
    args: dict[str, Any] | None = None,
    **texts: Any,
) -> Row:
    return Row(
        method=method,
        setting=setting,
        run=learn,
        arguments={
            **stream,
            "hidden": hidden,
            "client": client,
            "strategy": strategy,
            "args": args or {},
        },
        metric="acc",
        reference=measured,
        published=f"{measured:g}, target {target}",
        tolerance=_TOLERANCE,
        source=_SOURCE,
        **texts,
    )


TABLE = Table(
    name="avalanche-baselines",
    title="continual-learning-baselines (Avalanche), split and permuted MNIST",
    about=(
        "Single-device settings of ContinualAI's baselines, rerun with edgelearn's own strategies "
        "on one device, one round for each experience, float model; ACC after the last "
        "experience. The reference is what that project **measured**, the target is what it aimed "
        "at; where they differ it says itself that the target was not reproduced. All rows need "
        "MNIST on this machine. Networks have no dropout here. MNIST is normalized to mean 0 and "
        "standard deviation 1."
    ),
    rule=(
        "the baselines' own; only EWC's lambda is converted, since Avalanche squares the gradient "
        "of a batch and has no factor 1/2: lambda 1 with batches of 256 is 2/256 here."
    ),
    rows=(
        _row(
            "EWC", "permuted MNIST, 10", 83.0, "94 (not reproduced there)", _PERMUTED, [512],
            {"optimizer": "sgd", "lr": 1e-3, "batch_size": 256, "epochs": 10},
            "ewc", {"strength": 2 / 256, "mode": "separate", "step": "explicit"},
        ),
        _row(
            "SI", "permuted MNIST, 10", 83.0, "95 (not reproduced there)", _PERMUTED, [1000],
            {"optimizer": "adam", "lr": 1e-3, "batch_size": 256, "epochs": 10},
            "si", {"c": 10.0, "xi": 0.1, "step": "explicit"},
        ),
        _row(
            "A-GEM, 250 per experience", "permuted MNIST, 17", 81.0, "81", _17_TASKS, [100, 100],
            _ONE_PASS, "agem", {"capacity": 250 * 17, "replay_batch": 256},
        ),
        _row(
            "GEM, 1000 per experience", "permuted MNIST, 17", 80.0, "83", _17_TASKS, [100, 100],
            _ONE_PASS, "gem", {"capacity": 1000 * 17},
        ),
        _row(
            "GDumb, 4400", "split MNIST", 97.0, "97", _CLASSES, [400, 400],
            {"optimizer": "sgd", "lr": 0.1, "batch_size": 16, "epochs": 10},
            "gdumb", {"capacity": 4400},
        ),
        _row(
            "LwF", "split MNIST", 23.0, "23", _CLASSES, [200],
            {"optimizer": "sgd", "lr": 1e-3, "batch_size": 128, "epochs": 21},
            "lwf", {"alpha": 1.0, "temperature": 2.0},
            note="alpha 1, there 0, 0.5, 1.33, 2.25, 3.2; learning rate of another version",
        ),
        _row(
            "SI", "split MNIST, task-incremental", 97.0, "97", _TASKS, [256, 256],
            {"optimizer": "adam", "lr": 1e-3, "batch_size": 64, "epochs": 10},
            "si", {"c": 1.0, "xi": 0.1, "step": "explicit"},
        ),
        _row(
            "replay, 1000", "split MNIST, one pass", 92.0, "92", _CLASSES, [512], _ONE_PASS,
            "replay", {"capacity": 1000, "replay_batch": 10},
            note="the buffer takes in an experience when it has ended, not batch by batch",
        ),
    ),
    minutes=15.0,
    num_seeds=3,
    quick={"max_train": 1000, "max_test": 500},
)  # fmt: skip
