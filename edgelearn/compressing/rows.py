"""One row for each stage: what the network costs, how well it answers, and how fast.

All rows are measured alike (`edgelearn.runtime.measure`), on the same test samples. Before
`quantize` the float network is served, by torch, or by ONNX Runtime where it is what executes the
quantized network too: so the rows tell what a stage brings, and not what another engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgelearn.compress.cost import cost
from edgelearn.compress.pipeline import State
from edgelearn.compress.stored import store
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.measure import measure
from edgelearn.runtime.onnxruntime import OnnxPredictor, OnnxRuntime, with_facts
from edgelearn.runtime.protocol import Predictor, Runtime, make_runtime
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stages import Pack, Quantize, Stage
from edgelearn.seeds import torch_generator

NUM_RUNS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a network came to after a stage.

    Attributes:
        stage: The stage as it is written; "given" before the first.
        parameters: Of the network.
        nonzero: Those of them that are not 0.
        macs: Multiply-accumulates for one input, zeros included; None if they can't be counted.
        uncounted: The operator that can't be; "" if all are counted.
        memory_bytes: What the runtime keeps to answer, as it counts it.
        disk_bytes: Of the file.
        accuracy: Share of right answers on the test samples, in [0, 1].
        agreement: Share of test samples with the answer of the float network that this one comes
            from, in [0, 1].
        p50_ms: Median time of an answer to one input, one thread, in milliseconds.
        p99_ms: Its 99th percentile.
        runtime: What executed it.
        artefact: Name of the file.
    """

    stage: str
    parameters: int
    nonzero: int
    macs: int | None
    uncounted: str
    memory_bytes: int
    disk_bytes: int
    accuracy: float
    agreement: float
    p50_ms: float
    p99_ms: float
    runtime: str
    artefact: str


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file.

    Attributes:
        suffix: Of its name.
        data: What is in it.
    """

    suffix: str
    data: bytes


class Scale:
    """What all stages of a pipeline are measured with.

    Args:
        stages: The pipeline.
        train: Samples that ranges of activations come from, a draw of them.
        test: Samples that are answered.
        seed: Of the draw.
        num_runs: Calls that count for a time.

    Raises:
        ScenarioError: If the runtime does not take its arguments.
        ExtraMissingError: If it is not installed.
    """

    def __init__(
        self, stages: Sequence[Stage], train: Samples, test: Samples, *, seed: int, num_runs: int
    ) -> None:
        quantize = next((s for s in stages if isinstance(s, Quantize)), Quantize())
        self._integer = make_runtime(quantize.runtime, quantize.args)
        self._float: Runtime = FloatRuntime()
        self._names = "float, torch", _name(quantize.runtime, self._integer)
        if isinstance(self._integer, OnnxRuntime):
            self._float = OnnxRuntime(weight_bits=32)
            self._names = "float, onnxruntime", self._names[1]
        order = torch.randperm(len(train), generator=torch_generator(seed, "compress-calibration"))
        self._calibration = train.batch(order[: quantize.num_calibration]).x
        held = test.batch()
        self._x, self._y = held.x, held.y
        self._num_runs = num_runs

    def weigh(
        self, stage: Stage | None, state: State, exact: nn.Module
    ) -> tuple[dict[str, Any], Artefact]:
        """Return a row's numbers, by name, and the file.

        Args:
            stage: What was done last; None: nothing.
            state: The network.
            exact: The float network that it comes from.
        """
        found = cost(state.module, self._x)
        predict = self._served(state)
        reference = _float(exact, self._x)
        measured = measure(
            predict, reference, self._x, self._y, batches=(1,), num_runs=self._num_runs
        )
        (latency,) = measured.latencies
        artefact = self._artefact(stage, state, predict)
        numbers = {
            "parameters": found.parameters,
            "nonzero": found.nonzero,
            "macs": found.macs,
            "uncounted": found.uncounted,
            "memory_bytes": measured.model_bytes,
            "disk_bytes": len(artefact.data),
            "accuracy": measured.accuracy,
            "agreement": measured.agreement,
            "p50_ms": latency.p50_ms,
            "p99_ms": latency.p99_ms,
            "runtime": self._names[state.bits is not None],
        }
        return numbers, artefact

    def _served(self, state: State) -> Predictor:
        model = FlatModel(state.module)
        model.module.eval()
        runtime = self._float if state.bits is None else self._integer
        return runtime.prepare(model, model.initial()).calibrated(self._calibration)

    def _artefact(self, stage: Stage | None, state: State, predict: Predictor) -> Artefact:
        if isinstance(stage, Pack) and state.packed is not None:
            return Artefact("packed.safetensors", state.packed)
        if isinstance(stage, Quantize) and isinstance(predict, OnnxPredictor):
            return Artefact("onnx", with_facts(predict.artefact, state.facts))
        return Artefact("safetensors", store(state.module, bits=state.bits, facts=state.facts))


def _name(reference: str, runtime: Runtime) -> str:
    """Return what a runtime is called in a row; of those that are built in, with the bits."""
    if isinstance(runtime, Int8Runtime | OnnxRuntime):
        return f"{reference}, {runtime.weight_bits}-bit weights"
    return reference


def _float(module: nn.Module, x: Tensor) -> Predictor:
    model = FlatModel(module)
    return FloatRuntime().prepare(model, model.initial()).calibrated(x[:0])
