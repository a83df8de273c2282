"""The float model in service: the yardstick beside which quantized models are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from edgelearn.params import FlatModel


@final
@dataclass(frozen=True, slots=True)
class FloatPredictor:
    """Float parameters, executed by torch."""

    model: FlatModel
    params: Tensor

    @property
    def model_bytes(self) -> int:
        """Four bytes for each parameter."""
        return 4 * self.model.layout.size

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self.model(self.params, x)

    def calibrated(self, calibration: Tensor) -> FloatPredictor:  # noqa: ARG002
        """Nothing to calibrate."""
        return self


@final
class FloatRuntime:
    """Serve the float parameters as they are."""

    def prepare(self, model: FlatModel, params: Tensor) -> FloatPredictor:
        """Copy the parameters [P]."""
        return FloatPredictor(model, params.clone())
