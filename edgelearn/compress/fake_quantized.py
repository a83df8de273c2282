"""A network as its quantized layers see it: rounded weights, rounded inputs, gradients of neither.

The straight-through estimator of `quantize`, put into a whole network. What is quantized is what
the int8 runtime quantizes: `Linear` and `Conv2d`, but no subclass of them, whose weight may mean
something else.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn

from edgelearn.compress.quantize import fake_quantize_activation, fake_quantize_weight
from edgelearn.params import FlatModel


@final
class FakeQuantized(FlatModel):
    """A network whose layers see rounded weights, and rounded inputs.

    Args:
        model: The network.
        bits: Of a weight.
        rounds_inputs: Whether inputs are rounded too, to 8 bits over the batch's range.
    """

    def __init__(self, model: FlatModel, bits: int, *, rounds_inputs: bool) -> None:
        self.__dict__.update(model.__dict__)
        self._inner, self._bits = model, bits
        self._weights = quantized_weights(model)
        self._rounding = quantized_layers(model.module) if rounds_inputs else []

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Evaluate the network with rounding in it."""
        rounded = _rounded(self, params, self._weights, self._bits)
        with ExitStack() as hooks:
            for layer in self._rounding:
                hooks.callback(layer.register_forward_pre_hook(_round_input).remove)
            return self._inner.forward(rounded, x)


def on_grid(model: FlatModel, params: Tensor, *, bits: int) -> Tensor:
    """Return parameters [P] or [T] with quantized weights on the grid of so many bits."""
    return _rounded(model, params, quantized_weights(model), bits)


def quantized_layers(module: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers that are quantized."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and type(layer) in (nn.Linear, nn.Conv2d)
    ]


def quantized_weights(model: FlatModel) -> frozenset[str]:
    """Return the names of the trained weights of these layers."""
    weights = {id(layer.weight) for layer in quantized_layers(model.module)}
    named = model.module.named_parameters()
    return frozenset(name for name, p in named if id(p) in weights and p.requires_grad)


def _round_input(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_quantize_activation(inputs[0]), *inputs[1:])


def _rounded(model: FlatModel, params: Tensor, weights: frozenset[str], bits: int) -> Tensor:
    """Return parameters [P] or [T] with some weights rounded, differentiable by them."""
    pieces = [
        fake_quantize_weight(view, bits=bits).flatten() if name in weights else view.flatten()
        for name, view in model.layout.views(params).items()
    ]
    return torch.cat(pieces)
