"""QAT: quantization-aware training, so that a device trains what it is going to serve."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Generator, Tensor, nn

from edgelearn.compress.quantize import fake_quantize_activation, fake_quantize_weight
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples

BITS = (4, 8)
ACTIVATIONS = ("int8", "float")


@final
class QAT(ClientStrategy):
    r"""Train through the rounding of the model that is served.

    A device keeps float weights, and so does the server; in each step linear and convolution layers
    see w_q s_w and (x_q - z) s_x in place of w and x, with q = 2^(bits - 1) - 1 and

        w_q = clip(round(w / s_w), -q, q),        s_w = max|w| / q of an output channel,
        x_q = clip(round(x / s_x) + z, 0, 255),   s_x and z from the range of the batch,

    which is the grid of the int8 runtime. The gradient passes straight through the rounding
    (Bengio, Leonard, Courville, 2013, arXiv:1308.3432). This holds whatever the loss is: other
    strategies joined with it (`ewc+qat`, `replay+qat`) see the same network, also where they ask it
    for old parameters, such as those of a teacher. What looks at the network outside of steps
    (Fisher information, prototypes) sees float weights; weights that are not trained stay float.

    With 8 bits the device serves what it always serves, the int8 model of the global parameters.
    With 4 bits it serves their weights on the 4-bit grid; the int8 runtime then stores these in 8
    bits each, on its own finer grid, which moves a weight by at most half an int8 step, a 36th of a
    4-bit one: it shows the accuracy of 4-bit weights, not their size.

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877. We differ: weights are
    quantized symmetrically per output channel, as the runtime does it; the range of activations is
    that of the batch, not a moving average, which would be memory of its own on each device, and is
    quantized from the first step on; batch norm is not folded, as the runtime does not fold it;
    biases stay float (the runtime has 32 bits for them).

    It trains device by device, in no stack of devices: two engines whose sums differ in the last
    bit would round to different codes now and then.

    Args:
        bits: Of a weight, 4 or 8.
        activations: What layers see of their inputs: "int8" or "float".
    """

    def __init__(self, *, bits: int = 8, activations: str = "int8") -> None:
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations is {activations!r}; allowed: {', '.join(ACTIVATIONS)}")
        self.bits = bits
        self.activations = activations

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; 8 bits are served by the runtime itself."""
        return super().overrides(hook) and (hook != "serve" or self.bits != 8)

    def view(self, model: FlatModel) -> FlatModel:
        """Return the network with rounding in it."""
        return _FakeQuantized(model, self.bits, rounds_inputs=self.activations == "int8")

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,  # noqa: ARG002
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Return the global parameters with weights on the grid of so many bits."""
        return _rounded(model, params, _weights(model), self.bits)


class _FakeQuantized(FlatModel):
    """A network whose layers see rounded weights, and rounded inputs."""

    def __init__(self, model: FlatModel, bits: int, *, rounds_inputs: bool) -> None:
        self.__dict__.update(model.__dict__)
        self._inner, self._bits = model, bits
        self._weights = _weights(model)
        self._rounding = _layers(model.module) if rounds_inputs else []

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        rounded = _rounded(self, params, self._weights, self._bits)
        with ExitStack() as hooks:
            for layer in self._rounding:
                hooks.callback(layer.register_forward_pre_hook(_round_input).remove)
            return self._inner.forward(rounded, x)


def _round_input(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_quantize_activation(inputs[0]), *inputs[1:])


def _layers(module: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers that the int8 runtime quantizes; a subclass stays float there."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and type(layer) in (nn.Linear, nn.Conv2d)
    ]


def _weights(model: FlatModel) -> frozenset[str]:
    """Return the names of the trained weights of these layers."""
    weights = {id(layer.weight) for layer in _layers(model.module)}
    named = model.module.named_parameters()
    return frozenset(name for name, p in named if id(p) in weights and p.requires_grad)


def _rounded(model: FlatModel, params: Tensor, weights: frozenset[str], bits: int) -> Tensor:
    """Return parameters [P] or [T] with some weights rounded, differentiable by them."""
    pieces = [
        fake_quantize_weight(view, bits=bits).flatten() if name in weights else view.flatten()
        for name, view in model.layout.views(params).items()
    ]
    return torch.cat(pieces)
