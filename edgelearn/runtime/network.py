"""A network as a list of operators, which can be written down for another engine.

Batch norm is folded into the layer before it, on copies: w' = w g / sqrt(v + eps),
b' = (b - m) g / sqrt(v + eps) + h, with the norm's weight g, bias h and running statistics m, v.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from edgelearn.errors import RunError
from edgelearn.params import FlatModel


class UnsupportedError(RunError):
    """A network does something that can't be written down for an engine; the operator is named."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm: where its tensors are in the layout, and its eps; None: it has none."""

    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """What a linear or convolution layer computes with: names in the layout, and a norm behind."""

    weight: str
    bias: str | None
    norm: Norm | None = None

    def folded(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return weight [out, ...] and bias [out], the norm folded in; new ones if there is one."""
        weight = tensors[self.weight]
        bias = weight.new_zeros(len(weight)) if self.bias is None else tensors[self.bias]
        norm = self.norm
        if norm is None:
            return weight, bias
        factor = torch.rsqrt(tensors[norm.variance].double() + norm.eps)
        if norm.weight is not None:
            factor = factor * tensors[norm.weight].double()
        shifted = (bias.double() - tensors[norm.mean].double()) * factor
        if norm.bias is not None:
            shifted = shifted + tensors[norm.bias].double()
        scaled = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
        return scaled.float(), shifted.float()


@dataclass(frozen=True, slots=True)
class Operator:
    """One step of a network.

    Attributes:
        kind: ONNX's name of it.
        name: The module's name, or that of the step.
        inputs: Values that it takes.
        output: The value that it makes.
        compute: The same in torch, of the inputs; with a layer, of them, its weight and its bias.
        attributes: ONNX's attributes.
        layer: Its parameters, if it has any.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    compute: Callable[..., Tensor]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    layer: Layer | None = None


Folded = Mapping[str, tuple[Tensor, Tensor]]  # by operator


@final
@dataclass(frozen=True, slots=True)
class Network:
    """Operators in order, from the value `input` to the value `output`."""

    operators: tuple[Operator, ...]
    input: str
    output: str

    def folded(self, model: FlatModel, params: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each layer's weight and bias of parameters [P], which stay as they are."""
        views = model.layout.views(params.detach())
        return {
            step.name: step.layer.folded(views) for step in self.operators if step.layer is not None
        }

    def evaluate(self, folded: Folded, x: Tensor) -> dict[str, Tensor]:
        """Return every value of the float network for inputs [B, ...], by name."""
        return dict(self.values(folded, x))

    def values(self, folded: Folded, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every value of the float network for inputs [B, ...], with its name."""

        def compute(step: Operator, taken: list[Tensor]) -> Tensor:
            return step.compute(*taken, *(folded[step.name] if step.layer is not None else ()))

        return self.walk(x, compute)

    def walk(
        self, x: Tensor, compute: Callable[[Operator, list[Tensor]], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every value with its name, in order; one that nothing takes any more is let go.

        Args:
            x: The network's input.
            compute: Makes an operator's output of its inputs.
        """
        uses = Counter(name for step in self.operators for name in step.inputs)
        values = {self.input: x}
        yield self.input, x
        for step in self.operators:
            made = values[step.output] = compute(step, [values[name] for name in step.inputs])
            uses.subtract(step.inputs)
            for name in {name for name in step.inputs if not uses[name]}:
                del values[name]
            yield step.output, made

    def consumers(self) -> dict[str, list[Operator]]:
        """Return who takes each value."""
        found: dict[str, list[Operator]] = {self.input: []}
        for step in self.operators:
            found[step.output] = []
            for name in step.inputs:
                found[name].append(step)
        return found
