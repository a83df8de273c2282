"""A network from a file that `edgelearn compress` wrote, as a scenario's model.

    [model]
    name = "stored"
    args = { file = "runs/small/2-distill.safetensors" }

So what a pipeline has made, channels taken out and all, is what a fleet begins with.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from edgelearn import plugins
from edgelearn.compress.stored import Stored, read
from edgelearn.compress.structured import resized
from edgelearn.compress.tune import loaded
from edgelearn.errors import StateError
from edgelearn.files import read_checked

_NEEDED = ("model", "args", "dataset")


def read_network(path: Path) -> Stored:
    """Read a file that says what network it holds.

    Raises:
        StateError: If it is missing or damaged, or does not say so.
    """
    found = read(read_checked(path), source=str(path))
    if missing := [key for key in _NEEDED if key not in found.facts]:
        raise StateError(f"{path}: it does not say its {missing[0]}, so the network is not known")
    return found


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
    factory = plugins.resolve(found.facts["model"], plugins.MODELS)
    args = json.loads(found.facts["args"])
    module = factory(input_shape=input_shape, num_classes=num_classes, **args)
    return rebuilt(module, found, source=str(path))
