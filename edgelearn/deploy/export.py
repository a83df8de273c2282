"""A finished run's model as one file for devices that have neither edgelearn nor torch.

Ranges of activations come from training samples of the run's devices, never from test samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edgelearn
from edgelearn.deploy import executorch
from edgelearn.device.learners import make_learner
from edgelearn.errors import RunError
from edgelearn.federated.rundir import read_model, scenario_of
from edgelearn.files import write_atomic
from edgelearn.params import FlatModel
from edgelearn.runtime.observers import ARGUMENTS as CALIBRATION
from edgelearn.runtime.onnx_session import engine
from edgelearn.runtime.onnxruntime import OnnxRuntime, with_facts
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import World, build
from edgelearn.seeds import numpy_generator


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        num_bytes: Its size.
        num_calibration: Training samples that the ranges come from.
        facts: What the file says about itself.
    """

    path: Path
    num_bytes: int
    num_calibration: int
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Served:
    """What a finished run's devices answer with."""

    world: World
    model: FlatModel
    params: Tensor
    calibration: Samples


def export_onnx(
    directory: Path, out: Path, *, num_calibration: int = 256, weight_bits: int = 7
) -> Exported:
    """Write the model of a finished run as an ONNX file.

    Ranges are taken as the run's devices take them (`calibration_of`).

    Args:
        directory: Directory of the run.
        out: The file; one that is there is replaced.
        num_calibration: Training samples for the ranges, at least 1, drawn over all devices and
            experiences; fewer if there are fewer.
        weight_bits: 7 is exact on every processor; 8 on ARM and on x86 with VNNI; 32 is float.

    Raises:
        ExtraMissingError: If onnxruntime or onnx is not installed.
        StateError: If the run is damaged or not finished.
        RunError: If the network can't be written down, or no device answers with this model.
    """
    if weight_bits == 0:
        raise RunError("weight_bits is 0 (this processor's); name those of the device: 7, 8 or 32")
    engine("onnxruntime")  # before anything else is done
    served = _served(directory, num_calibration)
    runtime = OnnxRuntime(weight_bits=weight_bits, **calibration_of(served.world))
    prepared = runtime.prepare(served.model, served.params)
    artefact = prepared.artefact(served.calibration.batch().x)
    facts = _facts(served, weight_bits)
    data = with_facts(artefact, facts)
    write_atomic(out, data)
    return Exported(out, len(data), len(served.calibration), facts)


def export_pte(
    directory: Path, out: Path, *, num_calibration: int = 256, weight_bits: int = 8
) -> Exported:
    """Write the model of a finished run as an ExecuTorch file, for batches of one.

    Such a file holds no metadata, so they are written beside it, to `out` with `.json` behind.

    Args:
        directory: Directory of the run.
        out: The file; one that is there is replaced.
        num_calibration: Training samples for the ranges, as for ONNX.
        weight_bits: 8, or 32 for float.

    Raises:
        ExtraMissingError: If executorch is not installed.
        StateError: If the run is damaged or not finished.
        RunError: If the network can't be lowered, or no device answers with this model.
    """
    if weight_bits not in (8, 32):
        raise RunError(f"weight_bits is {weight_bits}; an ExecuTorch file has 8, or 32 (float)")
    executorch.require()
    served = _served(directory, num_calibration)
    data = executorch.lower(
        served.model,
        served.params,
        served.calibration.batch().x,
        is_quantized=weight_bits == 8,
    )
    facts = {**_facts(served, weight_bits), "batch": "1"}
    write_atomic(out.with_name(f"{out.name}.json"), f"{json.dumps(facts, indent=1)}\n".encode())
    write_atomic(out, data)
    return Exported(out, len(data), len(served.calibration), facts)


EXPORTS: Mapping[str, Callable[..., Exported]] = {"onnx": export_onnx, "pte": export_pte}


def _served(directory: Path, num_calibration: int) -> _Served:
    if num_calibration < 1:
        raise RunError(f"{num_calibration} samples for calibration; at least 1 is needed")
    world, model, params = final_model(directory)
    return _Served(world, model, params, calibration_samples(world, num_calibration))


def final_model(directory: Path) -> tuple[World, FlatModel, Tensor]:
    """Return a finished run's world, its network and the final global parameters [P].

    Raises:
        StateError: If the run is damaged or not finished.
        RunError: If its devices answer with parameters of their own.
    """
    scenario = scenario_of(directory)
    world = build(scenario)
    learner = make_learner(world)
    if learner.serves_own:
        raise RunError(
            f"{directory}: with the client strategy {scenario.client.strategy!r} each device "
            "answers with parameters of its own; the run's model alone is not what they serve"
        )
    return world, learner.model, read_model(directory, learner.model.layout)


def _facts(served: _Served, weight_bits: int) -> dict[str, str]:
    """Return what a file says about itself."""
    scenario, encoding = served.world.scenario, served.world.train.encoding
    count = len(served.calibration)
    return {
        "edgelearn": edgelearn.__version__,
        "scenario": scenario.name,
        "digest": scenario.digest,
        "weight_bits": str(weight_bits),
        "calibration": "none" if weight_bits == 32 else f"{count} training samples",
        "input": "(stored * scale - mean) / std",
        "input.scale": repr(encoding.scale),
        "input.mean": repr(encoding.mean),
        "input.std": repr(encoding.std),
    }


def calibration_of(world: World) -> dict[str, Any]:
    """Return the runtime's arguments that say how ranges are taken.

    Those of the devices; where these differ by profile, what `[runtime]` says.
    """

    def of(args: Mapping[str, Any]) -> dict[str, Any]:
        return {name: args[name] for name in CALIBRATION if name in args}

    first, *others = (of(kind.runtime_args) for kind in world.kinds.kinds)
    differ = any(other != first for other in others)
    return of(world.scenario.runtime.args) if differ else first


def calibration_samples(world: World, most: int) -> Samples:
    """Draw training samples of all devices and experiences, the same for every call."""
    devices = np.arange(len(world.train_parts))
    positions = range(world.stream.num_experiences)
    everything = np.unique(np.concatenate([world.train_ids(devices, p)[0] for p in positions]))
    if not len(everything):
        raise RunError(f"{world.scenario.name}: no device has a training sample to calibrate with")
    generator = numpy_generator(world.scenario.seed, "export-calibration")
    count = min(most, len(everything))
    ids = np.sort(generator.choice(everything, count, replace=False))
    return Samples(world.train, torch.from_numpy(ids.astype(np.int32)))
