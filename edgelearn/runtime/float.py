"""The float model in service: the yardstick beside which quantized models are measured."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self, final

from torch import Tensor

from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import GroupPrepared, Predictor, Rows


@dataclass(frozen=True, slots=True)
class TorchPredictor(GroupPrepared):
    """Parameters [P] that torch executes as they are: nothing of them is calibrated."""

    model: FlatModel
    params: Tensor

    @property
    @abstractmethod
    def model_bytes(self) -> int:
        """Bytes of all that the device keeps to answer."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self.model(self.params, x)

    def calibrated(self, calibration: Tensor) -> Self:  # noqa: ARG002
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


@final
@dataclass(frozen=True, slots=True)
class FloatPredictor(TorchPredictor):
    """Float parameters."""

    serves_float: ClassVar[bool] = True

    @property
    def model_bytes(self) -> int:
        """Four bytes for each parameter."""
        return 4 * self.model.layout.num_network


@final
@dataclass(frozen=True, slots=True)
class SamePredictor:
    """A group whose devices all answer with the same model, as nothing of it is calibrated."""

    alone: Predictor

    @property
    def model_bytes(self) -> int:
        """Bytes of all that one device keeps to answer."""
        return self.alone.model_bytes

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C]."""
        return self.alone(rows.x)


@final
class FloatRuntime:
    """Serve the float parameters as they are."""

    def prepare(self, model: FlatModel, params: Tensor) -> FloatPredictor:
        """Copy the parameters [P]."""
        return FloatPredictor(model, params.clone())
