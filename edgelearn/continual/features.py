"""Features of a network: what its last linear layer, its head, makes classes of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel

_ADVICE = (
    "methods that work on features need a network that ends in nn.Linear, the last of its layers "
    "to be defined and to be called: put softmax and the like into the loss"
)


@dataclass(frozen=True, slots=True)
class Head:
    """Where a network's last linear layer lies in a vector of trained parameters [T].

    Attributes:
        weight: Place of W [C, d].
        bias: Place of b [C]; None without one.
        num_features: d.
        num_classes: C.
    """

    weight: slice
    bias: slice | None
    num_features: int
    num_classes: int

    def weights(self, params: Tensor) -> Tensor:
        """Return W [C, d], a view of a vector [T] or [P]."""
        return params[self.weight].view(self.num_classes, self.num_features)

    def biases(self, params: Tensor) -> Tensor | None:
        """Return b [C], a view of a vector [T] or [P]; None without one."""
        return None if self.bias is None else params[self.bias]


def last_linear(model: FlatModel) -> Head:
    """Return where a network's last linear layer lies.

    Args:
        model: The network; the last of its layers that has parameters must be `nn.Linear`.

    Raises:
        StrategyError: If it is not, or is not trained.
    """
    name, layer = _last(model)
    layout, prefix = model.layout, f"{name}." if name else ""
    trained = layout.names[: layout.num_trained_tensors]
    places = {tensor: layout.places[tensor] for tensor in trained}
    if f"{prefix}weight" not in places:
        raise StrategyError(f"the head {name!r} has no weight of its own that is trained")
    return Head(
        weight=places[f"{prefix}weight"],
        bias=places.get(f"{prefix}bias"),
        num_features=layer.in_features,
        num_classes=layer.out_features,
    )


def features(model: FlatModel, params: Tensor, x: Tensor) -> Tensor:
    """Return what goes into the last linear layer [B, d], differentiable by `params`.

    Args:
        model: The network, evaluated in the mode that it is in; see `last_linear`.
        params: Vector [P], or its trained part [T].
        x: Inputs [B, ...].

    Raises:
        StrategyError: If what the layer gives is not what the network gives, or has no [B, d].

    Example:
        >>> import torch
        >>> model = FlatModel(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> features(model, model.initial(), torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """
    return features_and_logits(model, params, x)[0]


def features_and_logits(model: FlatModel, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features [B, d] and the logits [B, C] of one forward pass; see `features`."""
    name, layer = _last(model)
    with _watched(layer) as calls:
        # A network that remembers its answers, as combined strategies share one, must give another.
        logits = FlatModel.__call__(model, params, x)
    if not calls or calls[-1][1] is not logits:
        raise StrategyError(f"the network does not end in its layer {name!r}: {_ADVICE}")
    found = calls[-1][0]
    if found.ndim != 2:
        raise StrategyError(
            f"the layer {name!r} gets {tuple(found.shape)}, not one row of features per sample"
        )
    return found, logits


@contextmanager
def _watched(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Note input and output of each call."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_layer: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((inputs[0], output))

    handle = layer.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def _last(model: FlatModel) -> tuple[str, nn.Linear]:
    """Return the last layer that has parameters, with its name."""
    layers = [
        (name, layer)
        for name, layer in model.module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    if not layers:
        raise StrategyError(f"the network has no layer with parameters; {_ADVICE}")
    name, layer = layers[-1]
    if not isinstance(layer, nn.Linear):
        raise StrategyError(
            f"the last layer with parameters is {name!r}, a {type(layer).__name__}; {_ADVICE}"
        )
    return name, layer
