"""Networks as ONNX graphs: float ones, and int8 ones in the form quantize-dequantize (QDQ).

An int8 graph says which values are 8-bit codes: each passes a QuantizeLinear and a DequantizeLinear
with its scale and zero point, weights and biases are stored as integers behind a DequantizeLinear.
Engines read such pairs as integer operators; an operator set of 2022 is enough (opset 17).

- weights: symmetric per output channel, w_q = clip(round(w / s_w), -c, c), s_w = max|w| / c;
- activations: affine per tensor, unsigned 8 bits, range from calibration;
- bias: 32 bits at scale s_x s_w, a product that the graph forms.

What is quantized are the network's input and what layers, sums and averages make, except logits
(but those of a convolution). A value's range is taken behind the ReLU, max pooling and flattening
that follow it: these keep the order of values, so they commute with clipping, and codes pass them
exactly. A ReLU is then nothing but the clipping itself (0 is exact and the lowest code), and is
left out.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.compress.quantize import activation_scale, least_step, most_bias, quantize_weight
from edgelearn.params import FlatModel
from edgelearn.runtime.network import Folded, Network, UnsupportedError
from edgelearn.runtime.network_reader import read_network
from edgelearn.runtime.observers import See
from edgelearn.runtime.onnx_graph import CLIP_LIMITS, GraphWriter, prefix_of, type_of, zeros_name

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
Ranges = Mapping[str, tuple[Tensor, Tensor]]  # lowest and highest, by point

_PASSING = ("Relu", "Clip", "MaxPool", "Flatten")  # they keep the order of values


@dataclass(frozen=True, slots=True)
class Point:
    """A value that becomes codes, and what becomes of it while it only passes on.

    Attributes:
        name: The value where it is made.
        carried: The values that have its scale: it, and those behind operators that pass it on.
    """

    name: str
    carried: tuple[str, ...]


def points_of(network: Network) -> tuple[Point, ...]:
    """Return what is quantized in a network."""
    consumers = network.consumers()
    makers = {step.output: step for step in network.operators}
    found = []
    for value in (network.input, *makers):
        maker = makers.get(value)
        if maker and maker.kind in _PASSING and len(consumers[maker.inputs[0]]) == 1:
            continue  # it has the scale of what it was made of
        carried = [value]
        while len(next_ones := consumers[carried[-1]]) == 1 and next_ones[0].kind in _PASSING:
            carried.append(next_ones[0].output)
        # Engines compute a convolution in integers only if it makes codes.
        if carried[-1] != network.output or (maker and maker.kind == "Conv"):
            found.append(Point(value, tuple(carried)))
    return tuple(found)


@final
@dataclass(frozen=True)
class Template:
    """An ONNX graph without numbers, made once for an architecture.

    Attributes:
        network: What it computes.
        shape: Of one sample.
        num_outputs: Logits, C.
        sizes: Of each layer's weight.
        is_quantized: Whether in integers.
    """

    network: Network
    shape: tuple[int, ...]
    num_outputs: int
    sizes: Mapping[str, tuple[int, ...]]
    is_quantized: bool

    @classmethod
    def of(cls, model: FlatModel, shape: tuple[int, ...], *, is_quantized: bool) -> Template:
        """Make the template of a network.

        Args:
            model: The network.
            shape: Of one sample.
            is_quantized: Whether in integers.

        Raises:
            UnsupportedError: If the network has an operator that is not supported.
        """
        network = read_network(model, shape)
        with torch.no_grad():
            folded = network.folded(model, model.initial())
            logits = network.evaluate(folded, torch.zeros(1, *shape))[network.output]
        if logits.dim() != 2:
            raise UnsupportedError(f"the network gives {tuple(logits.shape)}, not [B, C]")
        sizes = {name: tuple(weight.shape) for name, (weight, _) in folded.items()}
        return cls(network, shape, logits.shape[1], sizes, is_quantized)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """What is quantized."""
        return points_of(self.network) if self.is_quantized else ()

    def observe(self, folded: Folded, x: Tensor, see: See) -> None:
        """Show the values of the points to `see(name, value)`, of inputs [n, ...], in float."""
        for name, value in self.network.values(folded, x):
            if name in self._shown:
                see(self._shown[name], value)

    @cached_property
    def _shown(self) -> dict[str, str]:
        """Names of the points, by the values that have their ranges."""
        return {point.carried[-1]: point.name for point in self.points}

    def artefact(self, numbers: Mapping[str, Array]) -> bytes:
        """Write numbers into the graph and return the file's bytes.

        Raises:
            ValueError: If a number is missing, or its type or shape is another.
        """
        for slot in self._graph.graph.initializer:
            value = numbers[slot.name]
            if value.dtype != type_of(slot.data_type) or value.shape != tuple(slot.dims):
                raise ValueError(
                    f"{slot.name} is {value.dtype} {value.shape}, the graph has "
                    f"{type_of(slot.data_type)} {tuple(slot.dims)}"
                )
            slot.raw_data = np.ascontiguousarray(value).tobytes()
        data: bytes = self._graph.SerializeToString(deterministic=True)
        return data

    @cached_property
    def stored(self) -> frozenset[str]:
        """The names of the numbers that the file holds."""
        return frozenset(slot.name for slot in self._graph.graph.initializer)

    @cached_property
    def _graph(self) -> onnx.ModelProto:
        carried = {name: point.name for point in self.points for name in point.carried}
        writer = GraphWriter(self.network, self.sizes, carried if self.is_quantized else None)
        return writer.write(self.shape, self.num_outputs)


# -- numbers ---------------------------------------------------------------------------------------


def float_numbers(network: Network, folded: Folded) -> dict[str, Array]:
    """Return the numbers of a float graph."""
    numbers: dict[str, Array] = dict(CLIP_LIMITS) if _clips(network) else {}
    for name, (weight, bias) in folded.items():
        numbers[f"{prefix_of(name)}weight"] = weight.numpy()
        numbers[f"{prefix_of(name)}bias"] = bias.numpy()
    return numbers


def quantized_weights(folded: Folded, *, largest: int) -> dict[str, Array]:
    """Return codes and scales of all weights."""
    numbers: dict[str, Array] = {}
    for name, (weight, _) in folded.items():
        codes, scale = quantize_weight(weight, largest=largest)
        numbers[f"{prefix_of(name)}weight"] = codes.numpy()
        numbers[f"{prefix_of(name)}weight.scale"] = scale.numpy()
        if weight.dim() == 2:
            numbers[zeros_name(len(scale))] = np.zeros(len(scale), np.int8)
    return numbers


def quantized_numbers(
    template: Template,
    folded: Folded,
    weights: Mapping[str, Array],
    ranges: Ranges,
    *,
    is_calibrated: bool,
) -> dict[str, Array]:
    """Return all numbers of an int8 graph, those that it forms of others among them.

    Args:
        template: The graph.
        folded: Weights and biases, float.
        weights: Codes and scales of the weights.
        ranges: Of the points.
        is_calibrated: Whether they hold for many inputs. Those of a single one may be almost empty;
            steps are then large enough for the biases (`edgelearn.compress.quantize.least_step`).
    """
    numbers: dict[str, Array] = {**weights}
    if _clips(template.network):
        numbers |= CLIP_LIMITS
    input_scale: dict[str, Tensor] = {}
    least = {} if is_calibrated else _least_steps(template.network, folded, weights)
    for point in template.points:
        floor = max(least.get(name, 0.0) for name in point.carried)
        scale, zero = activation_scale(*ranges[point.name], least_step=floor)
        numbers[f"{point.name}.scale"] = scale.numpy()
        numbers[f"{point.name}.zero"] = zero.to(torch.uint8).numpy()
        input_scale |= dict.fromkeys(point.carried, scale)
    for step in template.network.operators:
        if step.layer is None:
            continue
        prefix, (weight, bias) = prefix_of(step.name), folded[step.name]
        weight_scale = torch.from_numpy(weights[f"{prefix}weight.scale"])
        unit = input_scale[step.inputs[0]].double() * weight_scale.double()
        # A 32-bit sum must not overflow, whatever the inputs are.
        most = most_bias(weight[0].numel())
        codes = torch.round(bias.double() / unit).clamp(-most, most)
        numbers[f"{prefix}bias"] = codes.to(torch.int32).numpy()
        numbers[f"{prefix}bias.scale"] = unit.float().numpy()
    return numbers


def _least_steps(
    network: Network, folded: Folded, weights: Mapping[str, Array]
) -> dict[str, float]:
    """Return for each value that layers take the step at which their biases fit 32 bits."""
    found: dict[str, float] = {}
    for name, step in ((s.inputs[0], s) for s in network.operators if s.layer is not None):
        weight, bias = folded[step.name]
        scale = torch.from_numpy(weights[f"{prefix_of(step.name)}weight.scale"])
        floor = float(least_step(bias, scale, weight[0].numel()))
        found[name] = max(found.get(name, 0.0), floor)
    return found


def _clips(network: Network) -> bool:
    return any(step.kind == "Clip" for step in network.operators)
