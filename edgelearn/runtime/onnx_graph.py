"""A network's ONNX graph without its numbers, in as few bytes as its reader needs.

Beside codes, a file has what belongs to each channel, operators and names. So nodes have no names
and only attributes that differ from ONNX's defaults, values between nodes are named by numbers, and
what follows from something else is not stored: a bias's scale is the product of its layer's two
scales, which engines fold before anything else, and a zero point of 0 is what they assume.
Initializers keep torch's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelearn.runtime.network import Network, Operator

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = "input", "logits"
CLIP_LIMITS: Mapping[str, np.ndarray[Any, np.dtype[Any]]] = {
    "clip.low": np.array(0, np.float32),
    "clip.high": np.array(6, np.float32),
}
_OPSET, _IR_VERSION = 17, 8
_CLIPPING = ("Relu", "Clip")
_DEFAULTS: Mapping[str, Any] = {
    "strides": [1, 1],
    "dilations": [1, 1],
    "pads": [0] * 4,
    "group": 1,
    "ceil_mode": 0,
    "count_include_pad": 0,
    "axis": 1,
}


def prefix_of(layer: str) -> str:
    """Return what stands before the names of a layer's tensors, as torch has them."""
    return f"{layer}." if layer else ""


def zeros_name(count: int) -> str:
    """Return the name of the zero points that layers of as many outputs share."""
    return f"zeros.{count}"


def type_of(data_type: int) -> np.dtype[Any]:
    """Return numpy's name of an ONNX type."""
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(data_type)


class GraphWriter:
    """Writes one graph; initializers have types and shapes, and get their numbers later.

    Args:
        network: What it computes.
        sizes: Of each layer's weight.
        point_of: By value that becomes codes, the point whose scale it has; None: a float graph.
    """

    def __init__(
        self,
        network: Network,
        sizes: Mapping[str, tuple[int, ...]],
        point_of: Mapping[str, str] | None,
    ) -> None:
        self._network, self._sizes = network, sizes
        self._point_of, self._is_quantized = point_of or {}, point_of is not None
        self._nodes: list[onnx.NodeProto] = []
        self._slots: dict[str, onnx.TensorProto] = {}
        self._names: dict[str, str] = {}  # of values in the graph

    def write(self, shape: tuple[int, ...], num_outputs: int) -> onnx.ModelProto:
        """Write it for samples of a shape."""
        from onnx import TensorProto, checker, helper

        self._made(self._network.input, INPUT)
        for step in self._network.operators:
            self._write(step)
        made = self._names[self._network.output]
        self._name_output(self._node("Identity", [INPUT]) if made == INPUT else made)
        x = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape])
        y = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", num_outputs])
        graph = helper.make_graph(self._nodes, "edgelearn", [x], [y], list(self._slots.values()))
        model = helper.make_model(
            graph,
            producer_name="edgelearn",
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
        )
        checker.check_model(model)
        return model

    def _write(self, step: Operator) -> None:
        point = self._point_of.get(step.output)
        if step.kind in _CLIPPING and point not in (None, step.output):
            self._names[step.output] = self._names[step.inputs[0]]  # the codes are clipped already
            return
        taken = [self._names[name] for name in step.inputs]
        if step.layer is not None:
            taken += self._parameters(step)
        elif step.kind == "Clip":
            taken += [self._slot(name, np.float32, ()) for name in CLIP_LIMITS]
        self._made(step.output, self._node(step.kind, taken, **step.attributes))

    def _made(self, value: str, tensor: str) -> None:
        """Note where a value is; as codes and back, if it is quantized."""
        if value in self._point_of:
            point = self._point_of[value]
            scale = self._slot(f"{point}.scale", np.float32, ())
            zero = self._slot(f"{point}.zero", np.uint8, ())
            codes = self._node("QuantizeLinear", [tensor, scale, zero])
            tensor = self._node("DequantizeLinear", [codes, scale, zero])
        self._names[value] = tensor

    def _parameters(self, step: Operator) -> list[str]:
        prefix, weight = prefix_of(step.name), self._sizes[step.name]
        bias = weight[:1]
        if not self._is_quantized:
            kinds = {"weight": weight, "bias": bias}
            return [self._slot(f"{prefix}{k}", np.float32, size) for k, size in kinds.items()]
        codes = self._slot(f"{prefix}weight", np.int8, weight)
        scale = self._slot(f"{prefix}weight.scale", np.float32, bias)
        parameters = [codes, scale]
        if step.kind == "Gemm":  # without zeros ONNX Runtime would compute it in float
            parameters.append(self._slot(zeros_name(*bias), np.int8, bias))
        input_scale = f"{self._point_of[step.inputs[0]]}.scale"
        bias_codes = self._slot(f"{prefix}bias", np.int32, bias)
        return [
            self._node("DequantizeLinear", parameters, axis=0),
            self._node(
                "DequantizeLinear", [bias_codes, self._node("Mul", [input_scale, scale])], axis=0
            ),
        ]

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Add an operator and return the name of what it makes."""
        from onnx import helper

        made = str(len(self._nodes))
        told = {k: v for k, v in attributes.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
        self._nodes.append(helper.make_node(kind, inputs, [made], **told))
        return made

    def _name_output(self, tensor: str) -> None:
        """Give a value the name by which it is asked for."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == tensor:
                        names[place] = OUTPUT

    def _slot(self, name: str, kind: type[np.generic], shape: tuple[int, ...]) -> str:
        """Return the name of an initializer, which is added the first time."""
        from onnx import numpy_helper

        if name not in self._slots:
            self._slots[name] = numpy_helper.from_array(np.zeros(shape, kind), name)
        return name
