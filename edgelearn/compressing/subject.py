"""What `edgelearn compress` is given: a model's name, a file of weights, or a run's directory.

Each becomes a network with samples to train and to test on. Of a run it is the final global model,
with the training samples that its devices held, all in one place: a simulation has them. A real
federation has not; there, name a data set that may be seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from edgelearn import plugins
from edgelearn.compress.network_file import STORED, read_network, rebuilt, refuse_other_samples
from edgelearn.compress.pipeline import Factory
from edgelearn.compress.tune import loaded
from edgelearn.deploy.export import calibration_samples, final_model
from edgelearn.errors import DatasetError, DatasetMissingError, RunError
from edgelearn.federated.rundir import holds_a_run
from edgelearn.params import SHARED, FlatModel
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import ModelSpec, Scenario, plain
from edgelearn.scenario.world import World, build

AFTERWARDS = "prune(0.8) | quantize | pack"
FROM_SCRATCH = f"train(20) | {AFTERWARDS}"
_DATASET = "digits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A network and its samples.

    Attributes:
        module: The network.
        train: Samples that stages train on.
        test: Samples that accuracy is measured on.
        factory: Makes another network for the same samples.
        facts: What it is, for files and reports.
        pipeline: Stages, where nobody names others.
        seed: Of everything random, where nobody names another.
    """

    module: nn.Module
    train: Samples
    test: Samples
    factory: Factory
    facts: Mapping[str, str]
    pipeline: str
    seed: int


def find(
    target: str,
    *,
    dataset: str = "",
    root: str = "",
    args: Mapping[str, Any] = MappingProxyType({}),
    max_train: int = 0,
    max_test: int = 0,
    seed: int | None = None,
) -> Subject:
    """Return what a target stands for.

    Args:
        target: Directory of a finished run, a file that `edgelearn compress` wrote, or a model as
            scenarios name it.
        dataset: As scenarios name it; "" is the run's or the file's own, and digits for a model.
        root: Folder of the data set, for those that need one named (`image-folder`).
        args: Arguments of the model, where the target is one.
        max_train: Use at most this many training samples; 0 is all. Not with a run's own samples.
        max_test: The same of test samples.
        seed: Of everything random; None is the run's, else 0.

    Raises:
        ScenarioError: If there is no such model or data set, or one does not fit the other.
        DatasetError: If the data is missing or damaged.
        StateError: If the file or run is damaged, or of another network.
        RunError: If the run has no single model that its devices answer with.
    """
    cuts = {"max_train": max_train, "max_test": max_test, "root": root}
    path = Path(target)
    if holds_a_run(path) or (path.is_dir() and target not in plugins.names(plugins.MODELS)):
        if args:
            raise RunError(f"{target} is a run; its model has its arguments already")
        return _of_run(path, dataset, cuts, seed)
    if path.suffix == ".safetensors":
        if args:
            raise RunError(f"{target} is a file; its model has its arguments already")
        return _of_file(path, dataset, cuts, seed or 0)
    world = _built(_scenario(target, args, dataset or _DATASET, cuts, seed or 0))
    return _subject(world, world.model().module, FROM_SCRATCH)


def _of_run(directory: Path, dataset: str, cuts: Mapping[str, Any], seed: int | None) -> Subject:
    world, network, params = final_model(directory)
    scenario, views = world.scenario, network.layout.views(params)
    tensors = {name: value for name, value in views.items() if not name.startswith(SHARED)}
    if dataset:
        model, chosen = scenario.model, scenario.seed if seed is None else seed
        other = _scenario(model.name, model.args, dataset, cuts, chosen)
        world = _built(other)
        shapes = FlatModel(world.model().module).layout.shapes
        if shapes != tuple(tuple(value.shape) for value in tensors.values()):
            raise RunError(f"{directory}: its network does not fit samples of {dataset!r}")
    elif given := [key for key, value in cuts.items() if value]:
        raise RunError(
            f"{directory}: samples of a run are all used, so {given[0]} means nothing; name a data "
            "set to go with it"
        )
    elif world.train.encoding.task_masks is not None:
        raise RunError(
            f"{directory}: in a task-incremental run an answer is one of the task's classes, which "
            "a pipeline does not know; name a data set to use its samples without tasks"
        )
    elif seed is not None:
        world = replace(world, scenario=replace(scenario, seed=seed))
    pipeline = scenario.compress.pipeline or AFTERWARDS
    subject = _subject(world, loaded(world.model().module, tensors), pipeline)
    facts = {**subject.facts, "scenario": scenario.name, "digest": scenario.digest}
    return replace(subject, facts=facts)


def _of_file(path: Path, dataset: str, cuts: Mapping[str, Any], seed: int) -> Subject:
    found = read_network(path)
    scenario = _scenario(found.model, found.args, dataset or found.dataset, cuts, seed)
    world = _built(scenario)
    module = rebuilt(world.model().module, found.stored, source=str(path))
    refuse_other_samples(
        module, world.sample_shape, world.num_classes, source=f"{path}, {scenario.data.dataset}"
    )
    return _subject(world, module, AFTERWARDS)


def _scenario(
    model: str, args: Mapping[str, Any], dataset: str, cuts: Mapping[str, Any], seed: int
) -> Scenario:
    """Return a scenario of one device, which has all samples: of it, data and model count."""
    raw = {
        "name": "compress",
        "seed": seed,
        "data": {"dataset": dataset, **cuts},
        "model": {"name": model, "args": plain(args)},
        "fleet": {"num_devices": 1, "cohort": 1},
        "stream": {"kind": "new-instances", "num_experiences": 1, "rounds_per_experience": 1},
        "client": {"strategy": "naive", "lr": 0.1},
    }
    return from_dict(raw, source="compress")


def _built(scenario: Scenario) -> World:
    """Load a data set that an option of the command named."""
    try:
        return build(scenario)
    except DatasetMissingError as error:
        raise DatasetError(error.told(root="--root DIR")) from error


def _subject(world: World, module: nn.Module, pipeline: str) -> Subject:
    scenario = world.scenario

    def factory(name: str, args: Mapping[str, Any]) -> nn.Module:
        spec = ModelSpec(name=name or scenario.model.name, args=args)
        return replace(world, scenario=replace(scenario, model=spec)).model().module

    encoding, spec = world.train.encoding, scenario.model
    if spec.name == STORED:  # a file is to say what its network is, not where another file lay
        known = read_network(Path(spec.args["file"]).expanduser())
        spec = ModelSpec(name=known.model, args=known.args)
    return Subject(
        module=module,
        train=calibration_samples(world, sys.maxsize),
        test=_test_samples(world),
        factory=factory,
        facts={
            "model": spec.name,
            "args": json.dumps(plain(spec.args)),
            "dataset": scenario.data.dataset,
            "input": "(stored * scale - mean) / std",
            "input.scale": repr(encoding.scale),
            "input.mean": repr(encoding.mean),
            "input.std": repr(encoding.std),
        },
        pipeline=pipeline,
        seed=scenario.seed,
    )


def _test_samples(world: World) -> Samples:
    """Return the test samples of all devices and experiences, each once."""
    experiences = range(world.stream.num_experiences)
    devices = range(len(world.test_parts))
    ids = [world.test_samples(d, e).ids.numpy() for d in devices for e in experiences]
    everything = np.unique(np.concatenate(ids)).astype(np.int32)
    return Samples(world.test, torch.from_numpy(everything))
