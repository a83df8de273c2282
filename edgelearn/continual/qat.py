"""QAT: quantization-aware training, so that a device trains what it is going to serve."""

from __future__ import annotations

from typing import final

from torch import Generator, Tensor

from edgelearn.compress.fake_quantized import FakeQuantized, on_grid
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
        return FakeQuantized(model, self.bits, rounds_inputs=self.activations == "int8")

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,  # noqa: ARG002
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Return the global parameters with weights on the grid of so many bits."""
        return on_grid(model, params, bits=self.bits)
