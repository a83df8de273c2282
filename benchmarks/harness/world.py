"""A workload made concrete by edgelearn, and written down so that peers train on the same.

The file holds samples as they are stored, who has which, whom each round asks, and the initial
parameters. Peers need numpy to read it, nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgelearn.federated.server import seeded
from edgelearn.scenario.load import load
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import World, build
from edgelearn.seeds import derive
from harness.paths import DATA, WORKLOADS

from flwr.serverapp.strategy.strategy_utils import sample_nodes  # isort: skip

_ROUNDS = 1000
_CHECKED = 20  # rounds whose cohorts a child compares with these
_FORMAT = 2  # of the file; another number makes it anew


class _Nodes:
    """The part of a grid that sampling asks."""

    def __init__(self, count: int) -> None:
        self._nodes = [device + 1 for device in range(count)]

    def get_node_ids(self) -> list[int]:
        return self._nodes


def scenario(workload: str, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Load a workload, with some values replaced."""
    return load(WORKLOADS / f"{workload}.toml", overrides)


def cohorts(spec: Scenario, rounds: int = _ROUNDS) -> np.ndarray:
    """Return whom edgelearn asks in each round [R, C]: Flower's own sampling, seeded alike."""
    flower = logging.getLogger("flwr")
    nodes, fleet = _Nodes(spec.fleet.num_devices), spec.fleet
    level, found = flower.level, []
    flower.setLevel(logging.ERROR)
    for server_round in range(1, rounds + 1):
        with seeded(derive(spec.seed, "server-configure_train", server_round)):
            chosen, _ = sample_nodes(nodes, fleet.cohort, fleet.cohort)
        found.append([node - 1 for node in chosen])
    flower.setLevel(level)
    return np.array(found, np.int32)


@lru_cache(maxsize=1)
def _built(spec: Scenario) -> World:
    return build(spec)


def world_of(workload: str, overrides: Mapping[str, Any] | None = None) -> World:
    """Build a workload's world; the last one is kept."""
    return _built(scenario(workload, overrides))


@dataclass(frozen=True)
class Facts:
    """What the parent knows of a workload, to make figures of what a child timed.

    Attributes:
        sizes: Samples of each device in the experience that is timed.
        cohorts: Whom the first rounds ask.
        flops_per_sample: See `train_flops`.
        parameters: Size of the network.
    """

    sizes: list[int]
    cohorts: list[list[int]]
    flops_per_sample: float
    parameters: int


_FACTS: dict[tuple[str, int], Facts] = {}


def facts(workload: str, overrides: Mapping[str, Any] | None = None, position: int = 0) -> Facts:
    """Return the facts of a workload at a position of its stream."""
    spec = scenario(workload, overrides)
    if (spec.digest, position) not in _FACTS:
        made = _built(spec)
        devices = range(spec.fleet.num_devices)
        _FACTS[spec.digest, position] = Facts(
            [len(made.train_samples(device, position)) for device in devices],
            cohorts(spec, _CHECKED).tolist(),
            train_flops(made),
            made.model().layout.size,
        )
    return _FACTS[spec.digest, position]


def dump(workload: str, overrides: Mapping[str, Any] | None = None) -> Path:
    """Write a workload down, unless this very one has been; return the file."""
    spec = scenario(workload, overrides)
    path = DATA / f"{workload}-{spec.digest}-{_FORMAT}.npz"
    if path.is_file():
        return path
    DATA.mkdir(parents=True, exist_ok=True)
    made = _built(spec)
    model, encoding = made.model(), made.train.encoding
    sizes = [len(part) for part in made.train_parts]
    if min(sizes) == 0:
        raise ValueError(f"{workload}: a device has no samples; peers can't train on nothing")
    facts = {
        "workload": workload,
        "model": spec.model.name,
        "model_args": spec.as_dict()["model"]["args"],
        "input_shape": made.sample_shape,
        "num_classes": made.num_classes,
        "lr": spec.client.lr,
        "batch_size": spec.client.batch_size,
        "epochs": spec.client.epochs,
        "scale": encoding.scale,
        "mean": encoding.mean,
        "std": encoding.std,
        "seed": spec.seed,
        "rounds_per_experience": spec.stream.rounds_per_experience,
        "num_experiences": spec.stream.num_experiences,
        "flops_per_sample": train_flops(made),
    }
    initial = model.layout.views(model.initial())
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        facts=json.dumps(facts),
        x=made.train.x.numpy(),
        y=made.train.y.numpy(),
        x_test=made.test.x.numpy(),
        y_test=made.test.y.numpy(),
        ids=np.concatenate(made.train_parts),
        sizes=np.array(sizes),
        cohorts=cohorts(spec),
        **{f"init/{name}": view.detach().numpy() for name, view in initial.items()},
    )
    partial.replace(path)
    return path


def train_flops(made: World) -> float:
    """Return floating-point operations of a forward and backward pass of one sample.

    Two per weight and place where it is applied; three passes (forward, gradient of weights,
    gradient of inputs), of which the first layer needs only two. ReLU, pooling and bias are left
    out, and nothing is subtracted for gradients known to be zero.
    """
    module = made.model().module.eval()
    found: list[float] = []

    def count(layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        found.append(2.0 * layer.weight.numel() * output.numel() / len(layer.weight))

    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(torch.zeros(1, *made.sample_shape))
    return 3 * sum(found) - found[0]
