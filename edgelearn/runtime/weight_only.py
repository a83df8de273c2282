"""Integer weights under float activations: less to store and to load, and nothing to calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from edgelearn.compress.quantize import LARGEST_CODE, quantize_weight, stored_bytes
from edgelearn.params import FlatModel
from edgelearn.runtime.float import TorchPredictor
from edgelearn.runtime.int8_forms import weights_of


@final
@dataclass(frozen=True, slots=True)
class WeightOnlyPredictor(TorchPredictor):
    """A network whose linear and convolution layers multiply floats by what codes stand for.

    Attributes:
        num_bytes: Codes, scales, and the rest in float.
    """

    num_bytes: int

    @property
    def model_bytes(self) -> int:
        """Bytes of all that the device keeps to answer."""
        return self.num_bytes

    @classmethod
    def of(cls, model: FlatModel, params: Tensor, *, weight_bits: int) -> WeightOnlyPredictor:
        """Quantize the weights of parameters [P], which stay as they are."""
        own = params.detach().clone()
        num_bytes = 4 * model.layout.num_network
        weights = (weight for weight, _ in weights_of(model, own).values())
        for weight in {id(weight): weight for weight in weights}.values():  # tied ones once
            codes, scale = quantize_weight(weight, largest=LARGEST_CODE[weight_bits])
            weight.copy_(codes * scale.view(-1, *[1] * (weight.dim() - 1)))  # a view of `own`
            num_bytes += stored_bytes(weight.numel(), weight_bits) + 4 * len(scale)
            num_bytes -= 4 * weight.numel()
        return cls(model, own, num_bytes)
