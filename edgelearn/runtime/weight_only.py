"""Integer weights under float activations: less to store and to load, and nothing to calibrate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from edgelearn.compress.quantize import LARGEST_CODE, quantize_weight, stored_bytes
from edgelearn.params import FlatModel
from edgelearn.runtime.float import SamePredictor
from edgelearn.runtime.int8_forms import weights_of
from edgelearn.runtime.protocol import GroupPrepared, Rows


@final
@dataclass(frozen=True, slots=True)
class WeightOnlyPredictor(GroupPrepared):
    """A network whose linear and convolution layers multiply floats by what codes stand for.

    Attributes:
        model: The network.
        params: [P], weights of these layers as their codes stand for them.
        model_bytes: Codes, scales, and the rest in float.
    """

    model: FlatModel
    params: Tensor
    model_bytes: int

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

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self.model(self.params, x)

    def calibrated(self, calibration: Tensor) -> WeightOnlyPredictor:  # noqa: ARG002
        """Nothing to calibrate."""
        return self

    def calibrated_group(
        self,
        calibration: Iterable[Rows],  # noqa: ARG002
        *,
        num_devices: int,  # noqa: ARG002
    ) -> SamePredictor:
        """Nothing to calibrate."""
        return SamePredictor(self)
