"""Devices with the same parameters in one session of ONNX Runtime: their ranges are its inputs.

Such devices have the same integer weights; what differs are steps, zero points, and the biases at
their scales. The kernels are those that one device's own session runs on the same integers, so the
answers have the same bits; but a session is opened once for all devices instead of once for each,
which is a large part of what a small network's evaluation costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from edgelearn.runtime.network import Folded
from edgelearn.runtime.onnx_graph import CLIP_LIMITS
from edgelearn.runtime.onnx_session import Session, ask, open_with_inputs
from edgelearn.runtime.protocol import Rows
from edgelearn.runtime.qdq import Array, Ranges, Template, quantized_numbers

Answer = Callable[[Tensor], Tensor]

# A step of 1 and a zero point of 128: with these, no ReLU or clipping is the quantization itself.
_ORDINARY = (torch.tensor(-128.0), torch.tensor(127.0))


@final
@dataclass(frozen=True)
class SharedModel:
    """The integers of one set of parameters in a session that takes ranges as inputs.

    Attributes:
        template: The graph.
        folded: Weights and biases, float.
        weights: Codes and scales of the weights.
        session: The session.
        names: Its inputs beside the samples.
    """

    template: Template
    folded: Folded
    weights: Mapping[str, Array]
    session: Session
    names: frozenset[str]

    @classmethod
    def of(
        cls, template: Template, folded: Folded, weights: Mapping[str, Array]
    ) -> SharedModel | None:
        """Open the session; None if the engine computed some of its inputs away beforehand."""
        ordinary = {point.name: _ORDINARY for point in template.points}
        numbers = quantized_numbers(template, folded, weights, ordinary, is_calibrated=True)
        names = template.stored - weights.keys() - CLIP_LIMITS.keys()
        session, found = open_with_inputs(template.artefact(numbers), names)
        if found != names:
            return None
        return cls(template, folded, weights, session, found)

    def numbers(self, ranges: Ranges) -> dict[str, Array]:
        """Return what the session takes for the ranges of a device."""
        found = quantized_numbers(
            self.template, self.folded, self.weights, ranges, is_calibrated=True
        )
        return {name: found[name] for name in self.names}


def ranges_of_each(
    ranges: Ranges, *, num_devices: int
) -> list[dict[str, tuple[Tensor, Tensor]] | None]:
    """Return the ranges of each device, from those of all [D]; None for one without rows."""
    unknown = torch.stack([high < low for low, high in ranges.values()]).any(0).tolist()
    return [
        None if unknown[k] else {name: (low[k], high[k]) for name, (low, high) in ranges.items()}
        for k in range(num_devices)
    ]


@final
@dataclass(frozen=True, slots=True)
class OnnxGroupPredictor:
    """The models of several devices in one session.

    Attributes:
        answers: How each device answers inputs [n, ...].
        num_outputs: Logits, C.
        model_bytes: Of the file that a device keeps.
    """

    answers: tuple[Answer, ...]
    num_outputs: int
    model_bytes: int

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C]; bit for bit those of each device's own predictor."""
        logits = torch.empty(len(rows.x), self.num_outputs)
        for device in sorted(set(rows.device.tolist())):
            places = (rows.device == device).nonzero().flatten()
            logits[places] = self.answers[device](rows.x[places])
        return logits


def answering(model: SharedModel, ranges: Ranges) -> Answer:
    """Return how a device with such ranges answers."""
    numbers = model.numbers(ranges)
    return lambda x: torch.from_numpy(ask(model.session, x.contiguous().numpy(), numbers))
