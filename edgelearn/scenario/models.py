"""Small networks that scenarios name; anything else comes as `module:factory`.

A factory takes `input_shape` (C, H, W or features), `num_classes` and the scenario's `[model]`
arguments, and returns an `nn.Module` that maps [B, *input_shape] to logits [B, num_classes].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn


def mlp(
    *, input_shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (64,)
) -> nn.Module:
    """Fully connected network with ReLU."""
    sizes = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def cnn(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: Sequence[int] = (8, 16),
    hidden: int = 64,
    kernel_size: int = 3,
) -> nn.Module:
    """Convolutions with ReLU and 2x2 max pooling, then one hidden layer."""
    if len(input_shape) != 3:
        raise ValueError(f"cnn needs images [C, H, W], samples are {input_shape}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd")
    depth, height, width = input_shape
    layers: list[nn.Module] = []
    for after in channels:
        layers += [
            nn.Conv2d(depth, after, kernel_size, padding=kernel_size // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        depth, height, width = after, height // 2, width // 2
    if height == 0 or width == 0:
        raise ValueError(f"{len(channels)} poolings leave nothing of samples of {input_shape}")
    layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))
