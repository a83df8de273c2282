"""What an ONNX file is made of: its bytes by kind, and the engine's operators in it, one by one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

Array = np.ndarray[Any, Any]
_LEVELS = onnxruntime.GraphOptimizationLevel


def bytes_by_kind(artefact: bytes) -> dict[str, int]:
    """Return the bytes of weights, their scales, biases and activations' ranges; the rest is graph.

    What names, shapes and operators take is the graph's.
    """
    found = dict.fromkeys(("weights", "scales", "biases", "zero points", "ranges"), 0)
    endings = {"weight": "weights", "weight.scale": "scales", "bias": "biases"}
    for slot in onnx.load_from_string(artefact).graph.initializer:
        ending = next((e for e in endings if f".{slot.name}".endswith(f".{e}")), None)
        kind = "zero points" if slot.name.startswith("zeros.") else endings.get(ending or "")
        found[kind or "ranges"] += len(slot.raw_data)
    return {**found, "graph": len(artefact) - sum(found.values())}


def session(model: bytes, *, is_optimized: bool = True, saved: Path | None = None) -> Any:
    """Open a session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not is_optimized:
        options.graph_optimization_level = _LEVELS.ORT_DISABLE_ALL
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def prefixes(artefact: bytes, x: Array) -> Mapping[str, Callable[[], Any]]:
    """Return calls that run the first, the first two, ... operators for inputs x.

    The operators are those that the engine makes of the file. The first call does nothing but be
    called. A call's time less that of the one before is what its last operator takes, without what
    the engine's own profiler adds to operators of a microsecond.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(artefact, saved=path)
        model = onnx.load(path)
    calls = {"call": doing_nothing()}
    for count, node in enumerate(model.graph.node, 1):
        first = copy.deepcopy(model)
        graph, output = first.graph, node.output[0]
        del graph.node[count:], graph.output[:], graph.value_info[:]
        used = {name for one in graph.node for name in one.input}
        kept = [slot for slot in graph.initializer if slot.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
        opened = session(first.SerializeToString(), is_optimized=False)
        calls[f"{count} {node.op_type}"] = _asking(opened, output, x)
    return calls


def doing_nothing() -> Callable[[], Any]:
    """Return a call that hands on what it gets."""
    node = onnx.helper.make_node("Identity", ["input"], ["output"])
    return _asking(_alone(node, [], onnx.TensorProto.FLOAT), "output", np.zeros(1, np.float32))


def convolving(taken: int, made: int, kernel: int, *, places: int) -> Callable[[], Any]:
    """Return a call of the engine's integer convolution of codes [1, places, places, taken]."""
    generator = np.random.default_rng(0)
    numbers = {
        "x.scale": np.float32(0.1),
        "x.zero": np.uint8(3),
        "w": generator.integers(-127, 128, (made, taken, kernel, kernel)).astype(np.int8),
        "w.scale": np.full(made, 0.01, np.float32),
        "w.zero": np.int8(0),
        "y.scale": np.float32(0.1),
        "y.zero": np.uint8(3),
        "b": np.zeros(made, np.int32),
    }
    node = onnx.helper.make_node(
        "QLinearConv",
        ["input", *numbers],
        ["output"],
        domain="com.microsoft",
        channels_last=1,
        kernel_shape=[kernel] * 2,
        pads=[kernel // 2] * 4,
    )
    slots = [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in numbers.items()]
    x = generator.integers(0, 256, (1, places, places, taken)).astype(np.uint8)
    return _asking(_alone(node, slots, onnx.TensorProto.UINT8), "output", x)


def _alone(node: onnx.NodeProto, slots: list[onnx.TensorProto], kind: int) -> Any:
    """Return a session of one operator."""
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, kind, None) for name in ("input", "output")]
    graph = helper.make_graph([node], "alone", values[:1], values[1:], slots)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    return session(model.SerializeToString(), is_optimized=False)


def _asking(opened: Any, output: str, x: Array) -> Callable[[], Any]:
    return lambda: opened.run([output], {"input": x})


def asking(artefact: bytes, x: Array) -> Callable[[], Any]:
    """Return a call of the whole file for inputs x."""
    return _asking(session(artefact), "logits", x)
