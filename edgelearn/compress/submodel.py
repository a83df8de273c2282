"""Sub-models: networks of which a device holds the first channels of each hidden layer.

A sub-model of width r in (0, 1] keeps the first ceil(r n) of the n channels (or units) of every
hidden layer, and all inputs and outputs of the network (Diao, Ding, Tarokh, "HeteroFL: Computation
and Communication Efficient Federated Learning for Heterogeneous Clients", ICLR 2021,
arXiv:2010.01264, section 3). It is a network of its own, physically narrow; each of its tensors is
the leading block of the whole network's tensor of the same name, and a narrower sub-model lies
within a wider one.

Left out of the paper, here and in training:

- the scaler, which divides activations by r in training and not in use. Where no norm follows, as
  in the networks that can be cut here, the served network would compute something else than what
  was trained;
- static batch norm: networks with norms are refused;
- masked cross-entropy, which trains a device on the logits of its own labels alone. A client
  strategy may do so (`er-ace` does for the labels of a batch).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel, Layout
from edgelearn.stack import Stack, leaves


@dataclass(frozen=True, slots=True)
class Part:
    """Which numbers of the global parameters [P] a sub-model holds.

    Attributes:
        layout: The sub-model's own, of p numbers.
        places: Where its numbers lie among all [p], int64, rising.
    """

    layout: Layout
    places: Tensor

    @classmethod
    def of(cls, whole: Layout, layout: Layout) -> Part:
        """Find the leading blocks of tensors in the whole network's.

        Example:
            >>> whole = Layout(("w", "b"), ((2, 3), (2,)), 2)
            >>> Part.of(whole, Layout(("w", "b"), ((1, 2), (1,)), 2)).places.tolist()
            [0, 1, 6]
        """
        blocks = []
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            full, place = whole.shapes[whole.names.index(name)], whole.places[name]
            numbers = torch.arange(place.start, place.stop).view(full)
            blocks.append(numbers[tuple(map(slice, shape))].reshape(-1))
        return cls(layout, torch.cat(blocks))

    def take(self, params: Tensor) -> Tensor:
        """Return the sub-model's numbers [p] of the global parameters [P]."""
        return params[self.places]


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who holds which part of the global parameters.

    Attributes:
        widths: Of each device; none if all hold the whole.
        parts: By width, below 1.
    """

    widths: Sequence[float] = ()
    parts: Mapping[float, Part] = field(default_factory=lambda: MappingProxyType({}))

    def of_device(self, device: int) -> Part | None:
        """Return the part that a device holds; None if it holds the whole."""
        return self.parts.get(self.widths[device]) if self.widths else None


def channels(count: int, width: float) -> int:
    """Return how many of a hidden layer's channels a sub-model holds.

    Example:
        >>> channels(10, 0.7), channels(64, 0.3), channels(3, 0.01)
        (7, 20, 1)
    """
    return math.ceil(width * count - 1e-9)


def narrowed(model: FlatModel, width: float, input_shape: tuple[int, ...]) -> FlatModel:
    """Return a sub-model as a network of its own, with the values that it has in the whole one.

    Args:
        model: The whole network, a plain stack of layers (`edgelearn.stack`).
        width: r, above 0 and at most 1.
        input_shape: Shape of one sample.

    Raises:
        NotAStackError: If the network is anything else; the layer is named.
    """
    Stack.of(model, input_shape)
    module = copy.deepcopy(model.module)
    layers = [leaf for _, leaf in leaves(module) if isinstance(leaf, nn.Linear | nn.Conv2d)]
    total = held = input_shape[0]  # channels that go into the next layer
    for layer in layers:
        whole = len(layer.weight)
        kept = whole if layer is layers[-1] else channels(whole, width)
        if isinstance(layer, nn.Linear):  # behind a Flatten, each channel is a run of its inputs
            layer.in_features = layer.in_features // total * held
            layer.out_features, inputs = kept, layer.in_features
        else:
            layer.in_channels, layer.out_channels, inputs = held, kept, held
        layer.weight = nn.Parameter(layer.weight.detach()[:kept, :inputs].clone())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[:kept].clone())
        total, held = whole, kept
    return FlatModel(module)
