"""One device learns one stream: the setting of most papers on continual learning.

A single device, one round for each experience, plain averaging of its one update, and the float
model: the federation is there, and does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.load import from_dict

FASHION_MNIST = "edgelearn.reproduce.datasets:fashion_mnist"
MNIST = "edgelearn.reproduce.datasets:mnist"
EXEMPLARS = "edgelearn.reproduce.exemplars:ExemplarReplay"

# name -> kind of stream, network
_KINDS = {
    "class-incremental": ("class-incremental", "mlp"),
    "task-incremental": ("task-incremental", "mlp"),
    # Pairs of classes, of which only the place in the pair is to be told (van de Ven et al. 2022).
    "domain-incremental": ("task-incremental", "edgelearn.reproduce.networks:shared_head"),
    "permuted": ("domain-incremental", "mlp"),
}


def learn(
    *,
    dataset: str,
    kind: str,
    strategy: str,
    hidden: Sequence[int],
    client: Mapping[str, Any],
    args: Mapping[str, Any] | None = None,
    num_experiences: int = 5,
    stream: Mapping[str, Any] | None = None,
    steps: int = 0,
    max_train: int = 0,
    max_test: int = 0,
    seed: int,
) -> dict[str, float]:
    """Learn a stream on one device.

    Args:
        dataset: Data set, as a scenario names it.
        kind: "class-incremental", "task-incremental", "domain-incremental" (from classes) or
            "permuted".
        strategy: Client strategy.
        hidden: Hidden units of the network's layers.
        client: Further values of `[client]`, such as optimizer, lr, batch size.
        args: Arguments of the strategy.
        num_experiences: Experiences.
        stream: Further values of `[stream]`.
        steps: Steps in each experience; 0 leaves it to the epochs.
        max_train: Training samples of the data set; 0 is all.
        max_test: Test samples; 0 is all.
        seed: Seed of everything random.

    Returns:
        In percent: ACC, forgetting, average incremental and learning accuracy.
    """
    stream_kind, model = _KINDS[kind]
    scenario = from_dict(
        {
            "name": f"centralised-{kind}",
            "seed": seed,
            "data": {"dataset": dataset, "max_train": max_train, "max_test": max_test},
            "model": {"name": model, "args": {"hidden": list(hidden)}},
            "fleet": {"num_devices": 1, "cohort": 1},
            "stream": {
                "kind": stream_kind,
                "num_experiences": num_experiences,
                "rounds_per_experience": 1,
                **(stream or {}),
            },
            "client": {
                "strategy": strategy,
                "args": dict(args or {}),
                "steps": steps,
                **client,
            },
            "runtime": {"name": "float"},
        }
    )
    scores = simulate(scenario, engine="reference").scores("float")
    return {
        "acc": 100 * scores.average_accuracy,
        "forgetting": 100 * scores.forgetting,
        "aia": 100 * scores.average_incremental_accuracy,
        "la": 100 * scores.learning_accuracy,
    }
