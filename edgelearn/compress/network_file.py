"""A network from a file that `edgelearn compress` wrote, as a scenario's model.

    [model]
    name = "stored"
    args = { file = "runs/small/2-distill.safetensors" }

So what a pipeline has made, channels taken out and all, is what a fleet begins with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgelearn import plugins
from edgelearn.compress.stored import Stored, read
from edgelearn.compress.structured import resized
from edgelearn.compress.tune import loaded
from edgelearn.errors import StateError
from edgelearn.files import read_checked

STORED = "stored"  # the name of `stored` in a scenario
_NEEDED = ("model", "args", "dataset")


@dataclass(frozen=True, slots=True)
class NetworkFile:
    """What a file holds, and what network that is of.

    Attributes:
        stored: Tensors, and what the file says of itself.
        model: Name of the network's factory. It is called, and may be anybody's code: do not open
            a file that you would not run.
        args: Its arguments.
        dataset: The data set that it was made for.
    """

    stored: Stored
    model: str
    args: Mapping[str, Any]
    dataset: str


def read_network(path: Path) -> NetworkFile:
    """Read a file that says what network it holds.

    Raises:
        StateError: If it is missing or damaged, or does not say so.
    """
    found = read(read_checked(path), source=str(path))
    if missing := [key for key in _NEEDED if key not in found.facts]:
        raise StateError(f"{path}: it does not say its {missing[0]}, so the network is not known")
    try:
        args = json.loads(found.facts["args"])
    except ValueError as error:
        raise StateError(f"{path}: damaged: its args are not JSON: {error}") from error
    if not isinstance(args, dict):
        raise StateError(f"{path}: damaged: its args are no table")
    return NetworkFile(found, found.facts["model"], args, found.facts["dataset"])


def rebuilt(module: nn.Module, found: Stored, *, source: str) -> nn.Module:
    """Return a network with the sizes and values of a file.

    Args:
        module: The network as its factory makes it; it stays as it is.
        found: What the file holds.
        source: Where it comes from, for the error.

    Raises:
        StateError: If the file is of another network.
    """
    shapes = {name: tuple(value.shape) for name, value in found.tensors.items()}
    try:
        sized = resized(module, shapes)
    except StateError as error:
        raise StateError(f"{source}: {error}") from error
    return loaded(sized, found.tensors)


def refuse_other_samples(
    module: nn.Module, shape: tuple[int, ...], num_classes: int, *, source: str
) -> None:
    """Refuse a network that can't answer samples; sizes of layers alone don't make it one.

    Args:
        module: The network, in eval mode.
        shape: Of a sample.
        num_classes: Number of labels.
        source: Where it comes from, for the error.

    Raises:
        StateError: If it answers something else, or nothing.
    """
    wanted = f"{source}: the network does not fit samples {tuple(shape)} of {num_classes} classes"
    try:
        with torch.no_grad():
            found = tuple(module(torch.zeros(1, *shape)).shape)
    except RuntimeError as error:  # layers of other sizes
        raise StateError(f"{wanted}: {error}") from error
    if found != (1, num_classes):
        raise StateError(f"{wanted}: it answers {found}")


def stored(*, input_shape: tuple[int, ...], num_classes: int, file: str) -> nn.Module:
    """Return the network of a file, with its weights; quantized ones as what they stand for.

    Args:
        input_shape: Of the scenario's samples; those of the file's have to be like them.
        num_classes: Number of labels, as many as the file's network has.
        file: Path of the file (.safetensors).

    Raises:
        StateError: If it is missing, damaged, or of a network for other samples.
    """
    path = Path(file).expanduser()
    found = read_network(path)
    factory = plugins.resolve(found.model, plugins.MODELS)
    module = factory(input_shape=input_shape, num_classes=num_classes, **found.args)
    made = rebuilt(module, found.stored, source=str(path))
    refuse_other_samples(made, input_shape, num_classes, source=str(path))
    return made
