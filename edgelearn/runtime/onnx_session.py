"""Sessions of ONNX Runtime: one thread, no telemetry, nothing logged but errors."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from edgelearn.errors import ExtraMissingError
from edgelearn.runtime.onnx_graph import INPUT, OUTPUT
from edgelearn.runtime.qdq import Array


class Session(Protocol):
    """What is asked of the engine's session."""

    def run(self, outputs: list[str], inputs: Mapping[str, Array]) -> list[Any]:
        """Return the outputs by name, for inputs by name."""


def engine(package: str) -> Any:
    """Import onnxruntime or onnx.

    Raises:
        ExtraMissingError: If it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ExtraMissingError(
            package=package, extra="onnxruntime", needed_for="the runtime 'onnxruntime'"
        ) from error


def open_session(artefact: bytes) -> Session:
    """Open a session for a model's file."""
    return _open(artefact, _options())


def ask(session: Session, x: Array, numbers: Mapping[str, Array]) -> Array:
    """Return logits [B, C] for inputs [B, ...], and for numbers that the graph takes as inputs."""
    logits: Array = session.run([OUTPUT], {INPUT: x, **numbers})[0]
    return logits


def open_with_inputs(artefact: bytes, names: Collection[str]) -> tuple[Session, frozenset[str]]:
    """Open a session whose graph takes some of its constants as inputs.

    Engines read a QDQ graph as integer operators only if scales, zero points and biases are
    constants. So the engine optimizes the graph with them first; in what it makes of it, they are
    turned into inputs, and nothing is optimized again.

    Args:
        artefact: The model's file. Its values must not invite the engine to leave a step out.
        names: The constants.

    Returns:
        The session, and those of the names that its graph still has, and nothing made of them.
    """
    onnx = engine("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path, options = Path(folder) / "optimized.onnx", _options()
        options.optimized_model_filepath = str(path)
        # Constants of equal value have to stay apart: their values will differ.
        _open(artefact, options, disabled_optimizers=["ConstantSharing"])
        model = onnx.load(path)
    inputs = [constant for constant in model.graph.initializer if constant.name in names]
    constants = [constant for constant in model.graph.initializer if constant.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(one.name, one.data_type, list(one.dims))
        for one in inputs
    )
    options = _options()
    options.graph_optimization_level = engine("onnxruntime").GraphOptimizationLevel.ORT_DISABLE_ALL
    session = _open(model.SerializeToString(), options)
    # A bias that is still dequantized has a scale that was computed of the constants' values.
    unfused = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return session, frozenset(one.name for one in inputs) - unfused


def _options() -> Any:
    options = engine("onnxruntime").SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what it can't do is raised
    return options


def _open(artefact: bytes, options: Any, **how: Any) -> Session:
    runtime = engine("onnxruntime")
    runtime.disable_telemetry_events()  # on Windows it has some
    session: Session = runtime.InferenceSession(
        artefact, options, providers=["CPUExecutionProvider"], **how
    )
    return session
