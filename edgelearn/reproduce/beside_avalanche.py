"""edgelearn's strategies beside Avalanche's own, on the same stream, network, steps and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelearn.reproduce.centralised import FASHION_MNIST, learn
from edgelearn.reproduce.table import Row, Table

CLASS, TASK = "class-incremental", "task-incremental"
BASE: dict[str, Any] = {
    "dataset": FASHION_MNIST,
    "hidden": [256],
    "client": {"optimizer": "sgd", "lr": 0.05, "batch_size": 32, "epochs": 2},
    "max_train": 12_000,
}


def difference(
    *, seed: int, ours: Mapping[str, Any], theirs: Mapping[str, Any], **setting: Any
) -> dict[str, float]:
    """Return ACC of both, and ours - theirs, in percent and points.

    Args:
        seed: Seed of both.
        ours: Strategy and arguments.
        theirs: The same of Avalanche's.
        **setting: What else `learn` takes.
    """
    mine = learn(**setting, **ours, seed=seed)["acc"]
    other = learn(**setting, **theirs, seed=seed)["acc"]
    return {"ours": mine, "avalanche": other, "difference": mine - other}


def _row(
    method: str,
    kind: str,
    ours: tuple[str, dict[str, Any]],
    theirs: tuple[str, dict[str, Any]],
    **texts: Any,
) -> Row:
    pair = {
        side: {"strategy": strategy, "args": args}
        for side, (strategy, args) in (("ours", ours), ("theirs", theirs))
    }
    return Row(
        method=method,
        setting=kind,
        run=difference,
        arguments={**BASE, "kind": kind, **pair},
        metric="difference",
        reference=0.0,
        tolerance=3.0,
        **texts,
    )


_BATCH = "Avalanche squares the gradient of a batch: lambda 100 with batches of 32 is 6.25 here"
_ROUND_OFF = "the buffer takes in an experience when it has ended, as Avalanche's does"
_EWC = {"strength": 2 * 100 / 32, "mode": "separate", "step": "explicit"}

TABLE = Table(
    name="beside-avalanche",
    title="The same runs with Avalanche's own strategies",
    about=(
        "Split Fashion-MNIST, 12,000 images, five experiences of two classes, MLP 784-256-10, SGD "
        "0.05, batch 32, two epochs, one device: edgelearn's strategy and Avalanche's (0.6, "
        "through the adapter) with the same seed, data, initial network and number of steps. "
        "The number is the difference of ACC, ours - theirs; the draws of samples differ."
    ),
    rule="defaults of Avalanche's examples, the same on both sides; nothing was tuned.",
    rows=(
        _row("naive", CLASS, ("naive", {}), ("avalanche:Naive", {})),
        _row(
            "replay, 200", CLASS, ("replay", {"capacity": 200}),
            ("avalanche:Replay", {"mem_size": 200}), note=_ROUND_OFF,
        ),
        _row(
            "GDumb, 500", CLASS, ("gdumb", {"capacity": 500}),
            ("avalanche:GDumb", {"mem_size": 500}),
            note="the network that ours begins an experience with is the untrained one",
            reason=(
                "Avalanche resets its network too, but the adapter then loads the global "
                "parameters over it, so theirs goes on from what it knew"
            ),
        ),
        _row(
            "A-GEM, 200", CLASS, ("agem", {"capacity": 200, "replay_batch": 32}),
            ("avalanche:AGEM", {"patterns_per_exp": 50, "sample_size": 32}),
        ),
        _row(
            "GEM, 50 an experience", CLASS, ("gem", {"capacity": 250}),
            ("avalanche:GEM", {"patterns_per_exp": 50}),
        ),
        _row("EWC", TASK, ("ewc", _EWC), ("avalanche:EWC", {"ewc_lambda": 100.0}), note=_BATCH),
        _row(
            "LwF", TASK, ("lwf", {"alpha": 1.0, "temperature": 2.0}),
            ("avalanche:LwF", {"alpha": 1.0, "temperature": 2.0}),
        ),
        _row("naive", TASK, ("naive", {}), ("avalanche:Naive", {})),
    ),
    minutes=4.0,
    unit="points",
    num_seeds=3,
    quick={"max_train": 1000, "max_test": 500},
)  # fmt: skip
