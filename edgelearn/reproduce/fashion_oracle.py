"""Split Fashion-MNIST against an independent implementation: the oracle of the default tests."""

from __future__ import annotations

from typing import Any

from edgelearn.reproduce.centralised import EXEMPLARS, FASHION_MNIST, learn
from edgelearn.reproduce.table import Row, Table

CLASS, DOMAIN, TASK = "class-incremental", "domain-incremental", "task-incremental"
STEPS = 200
BASE: dict[str, Any] = {
    "dataset": FASHION_MNIST,
    "hidden": [256, 256],
    "client": {"optimizer": "adam", "lr": 1e-3, "batch_size": 64},
    "steps": STEPS,
}
_GATED = 3.0  # points; the oracle's two seeds differ by up to that
_EWC = {"strength": 1000.0, "mode": "separate", "step": "explicit", "max_fisher_samples": 1000}
_EMPIRICAL = "empirical Fisher; the oracle samples one label for each of 1000 samples (true Fisher)"


def _row(
    method: str,
    kind: str,
    reference: float,
    published: str,
    strategy: str,
    args: dict[str, Any] | None = None,
    tolerance: float | None = _GATED,
    **texts: str,
) -> Row:
    arguments = {**BASE, "kind": kind, "strategy": strategy, "args": args or {}}
    return Row(
        method=method,
        setting=kind,
        run=learn,
        arguments=arguments,
        metric="acc",
        reference=reference,
        published=published,
        tolerance=tolerance,
        **texts,
    )


TABLE = Table(
    name="fashion-oracle",
    title="Split Fashion-MNIST, against an independent implementation",
    about=(
        "Fashion-MNIST, five experiences of two classes each, inputs in [0, 1]; MLP 784-256-256-10 "
        "(task-incremental: ten outputs, masked; domain-incremental: two outputs for the place in "
        "the pair); Adam 1e-3, made anew for each experience; batch 64; 200 steps in each "
        "experience; one device, one round for each experience, float model. ACC after the last "
        "experience. The reference is lean code of our own that shares none with edgelearn, seeds "
        "0 and 1 (both are given); the tolerance is ±3 points around their mean."
    ),
    rule=(
        "taken over from the reference as they are (EWC lambda 1000, 10 or 100 exemplars per "
        "class); nothing was tuned on this stream."
    ),
    rows=(
        _row("naive", CLASS, 19.95, "19.95, 19.95", "naive", tolerance=0.1),
        _row("EWC", CLASS, 19.94, "19.94, 19.94", "ewc", _EWC, note=_EMPIRICAL),
        _row("ER, 10 per class", CLASS, 61.7, "60.5, 62.9", EXEMPLARS, {"per_class": 10}),
        _row("ER, 100 per class", CLASS, 80.45, "80.0, 80.9", EXEMPLARS, {"per_class": 100}),
        _row("naive", DOMAIN, 76.55, "74.6, 78.5", "naive"),
        _row("EWC", DOMAIN, 80.9, "79.3, 82.5", "ewc", _EWC, note=_EMPIRICAL),
        _row("ER, 10 per class", DOMAIN, 94.25, "93.8, 94.7", EXEMPLARS, {"per_class": 10}),
        _row("ER, 100 per class", DOMAIN, 96.35, "96.3, 96.4", EXEMPLARS, {"per_class": 100}),
        _row("naive", TASK, 79.9, "81.2, 78.6", "naive"),
        _row("EWC", TASK, 96.1, "96.1", "ewc", _EWC, note=_EMPIRICAL),
        _row("ER, 10 per class", TASK, 98.8, "98.8", EXEMPLARS, {"per_class": 10}),
        _row("ER, 100 per class", TASK, 98.8, "98.8", EXEMPLARS, {"per_class": 100}),
    ),
    minutes=1.5,
    quick={"steps": 20, "max_train": 3000, "max_test": 1000},
)
