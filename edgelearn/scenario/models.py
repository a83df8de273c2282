"""Small networks that scenarios name; anything else comes as `module:factory`.

A factory takes `input_shape` (C, H, W or features), `num_classes` and the scenario's `[model]`
arguments, and returns an `nn.Module` that maps [B, *input_shape] to logits [B, num_classes].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def mlp(
    *, input_shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (64,)
) -> nn.Module:
    """Fully connected network with ReLU."""
    sizes = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, sizes[1:], strict=False):
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
    depth, height, width = input_shape
    layers: list[nn.Module] = []
    for after in channels:
        layers += [
            nn.Conv2d(depth, after, kernel_size, padding=kernel_size // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        depth, height, width = after, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))
