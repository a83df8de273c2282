"""Int8 inference by ONNX Runtime: an engine's own integer kernels, on processors of many kinds.

The numbers are those of `qdq`. The graph is made once for a network; new parameters then change its
integers, scales and biases in place, and open a new session. Batch norm is folded on copies.

On x86 processors without VNNI the engine's kernels add pairs of products in 16 bits that saturate
(255 * 127 * 2 > 2^15), which costs percents of agreement. Weights of 7 bits (codes up to 64) can't:
255 * 64 * 2 < 2^15. So 8 bits are used where sums are exact, else 7.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from edgelearn.compress.quantize import LARGEST_CODE
from edgelearn.params import FlatModel
from edgelearn.runtime.network import Folded
from edgelearn.runtime.observers import (
    MinMax,
    Observer,
    make_observer,
    ranges_of,
    ranges_of_group,
)
from edgelearn.runtime.onnx_group import (
    Answer,
    OnnxGroupPredictor,
    SharedModel,
    answering,
    ranges_of_each,
)
from edgelearn.runtime.onnx_session import ask, engine, open_session
from edgelearn.runtime.protocol import Observed, RangedGroupPrepared, Rows
from edgelearn.runtime.qdq import (
    Array,
    Ranges,
    Template,
    float_numbers,
    quantized_numbers,
    quantized_weights,
)

_BITS = (7, 8)
_FLOAT = 32


def exact_weight_bits(machine: str, flags: str) -> int:
    """Return how many bits of a weight the engine's kernels multiply exactly.

    Args:
        machine: As `platform.machine()` gives it.
        flags: The processor's flags, where Linux tells them.

    Example:
        >>> exact_weight_bits("x86_64", "sse4_2 avx2")
        7
        >>> exact_weight_bits("x86_64", "avx2 avx512_vnni")
        8
        >>> exact_weight_bits("aarch64", "")
        8
    """
    is_x86 = machine.lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    has_vnni = not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags.split())
    return 7 if is_x86 and not has_vnni else 8


def exact_here() -> int:
    """Return how many bits of a weight the engine's kernels multiply exactly on this processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return exact_weight_bits(platform.machine(), flags)


@final
class OnnxPredictor:
    """One device's model in a session of ONNX Runtime, with one thread.

    Attributes:
        artefact: The file that any ONNX Runtime loads: input `input` [B, ...], output `logits`.
    """

    def __init__(self, artefact: bytes, shape: tuple[int, ...]) -> None:
        self.artefact = artefact
        self._session = open_session(artefact)
        ask(self._session, np.zeros((1, *shape), np.float32), {})  # the first one would be slow

    @property
    def model_bytes(self) -> int:
        """Bytes of the artefact."""
        return len(self.artefact)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return torch.from_numpy(ask(self._session, x.detach().contiguous().numpy(), {}))


def with_facts(artefact: bytes, facts: Mapping[str, str]) -> bytes:
    """Return an artefact that says something about itself, in ONNX's metadata."""
    model = engine("onnx").load_model_from_string(artefact)
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@final
@dataclass(frozen=True, slots=True)
class _UncalibratedPredictor:
    """Takes the ranges from each input when it is answered: a session for each, so slow."""

    prepared: OnnxPrepared
    model_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        if not len(x):
            return torch.empty(0, self.prepared.template(tuple(x.shape[1:])).num_outputs)
        return torch.cat([self.prepared.for_one(row)(row) for row in torch.split(x, 1)])


@final
@dataclass(slots=True)
class _UnseenGroup:
    """Devices none of which has samples: what they are asked shows the shape of one."""

    prepared: OnnxPrepared
    model_bytes: int = 0

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C]."""
        alone = self.prepared.calibrated(rows.x[:0])
        self.model_bytes = alone.model_bytes
        return alone(rows.x)


@final
class OnnxPrepared(RangedGroupPrepared):
    """Folded parameters and their integers; activation ranges come from each device."""

    def __init__(
        self, runtime: OnnxRuntime, model: FlatModel, params: Tensor, *, weight_bits: int
    ) -> None:
        self._runtime, self._model = runtime, model
        self._params, self._bits = params.detach().clone(), weight_bits
        self._of: tuple[Template, Folded, dict[str, Array]] | None = None
        self._shared: tuple[Template, SharedModel | None] | None = None

    def template(self, shape: tuple[int, ...]) -> Template:
        """Return the graph for samples of a shape."""
        return self._made(shape)[0]

    def calibrated(self, calibration: Tensor) -> OnnxPredictor | _UncalibratedPredictor:
        """Observe ranges (minimum and maximum) on own inputs, and open a session."""
        if len(calibration) or self._bits == _FLOAT:
            return OnnxPredictor(self.artefact(calibration), tuple(calibration.shape[1:]))
        return _UncalibratedPredictor(self, len(self.artefact(calibration)))

    def observed(self, x: Tensor) -> Observed:
        """Return the range of each point on inputs [n, ...]; of a float network there is none."""
        return self._observed(x, self._runtime.observer)

    def _observed(self, x: Tensor, observer: Observer) -> Observed:
        shape = tuple(x.shape[1:])
        template, folded, _ = self._made(shape)
        if not template.is_quantized:
            return Observed(shape, {})
        with torch.no_grad():
            return Observed(shape, ranges_of(partial(template.observe, folded), x, observer))

    def within(self, observed: Observed) -> OnnxPredictor:
        """Open a session with these ranges."""
        return OnnxPredictor(self._artefact(observed, is_calibrated=True), observed.shape)

    def calibrated_group(
        self, calibration: Iterable[Rows], *, num_devices: int
    ) -> OnnxGroupPredictor | _UnseenGroup:
        """Observe the ranges of several devices in one pass, and open one session for all."""
        parts = iter(calibration)
        first = next(parts, None)
        if first is None:
            return _UnseenGroup(self)
        shape = tuple(first.x.shape[1:])
        template, _, weights = self._made(shape)
        if not template.is_quantized:
            alone = OnnxPredictor(template.artefact(weights), shape)
            same = (alone,) * num_devices
            return OnnxGroupPredictor(same, template.num_outputs, alone.model_bytes)
        observed = self.observed_group(chain([first], parts), num_devices=num_devices)
        return self.within_group(observed)

    def observed_group(self, calibration: Iterable[Rows], *, num_devices: int) -> Observed:
        """Return the range of each point, for each device [D]; of a float network there is none."""
        parts = iter(calibration)
        first = next(parts)
        shape = tuple(first.x.shape[1:])
        template, folded, _ = self._made(shape)
        ranges = ranges_of_group(
            partial(template.observe, folded),
            chain([first], parts),
            self._runtime.observer,
            places=[point.name for point in template.points],
            num_devices=num_devices,
        )
        return Observed(shape, ranges)

    def within_group(self, observed: Observed) -> OnnxGroupPredictor:
        """Open one session for all devices; there is at least one range."""
        shape = observed.shape
        template, folded, weights = self._made(shape)
        if self._shared is None or self._shared[0] is not template:
            self._shared = template, SharedModel.of(template, folded, weights)
        shared = self._shared[1]
        size = len(self.artefact(torch.empty(0, *shape)))

        def answer_of(ranges: Ranges | None) -> Answer:
            if ranges is None:
                return _UncalibratedPredictor(self, size)
            if shared is None:  # the same bits from a session of its own
                return self.within(Observed(shape, ranges))
            return answering(shared, ranges)

        num_devices = len(next(iter(observed.ranges.values()))[0])
        each = ranges_of_each(observed.ranges, num_devices=num_devices)
        answers = tuple(answer_of(own) for own in each)
        return OnnxGroupPredictor(answers, template.num_outputs, size)

    def for_one(self, x: Tensor) -> OnnxPredictor:
        """Return the predictor of a single input [1, ...], which has that input's own ranges."""
        return OnnxPredictor(self.artefact(x, is_calibrated=False), tuple(x.shape[1:]))

    def artefact(self, calibration: Tensor, *, is_calibrated: bool = True) -> bytes:
        """Return the file of the model, its ranges those of inputs [n, ...].

        Args:
            calibration: The inputs; with none, the file has no use.
            is_calibrated: Whether these ranges are to hold for other inputs.
        """
        shape = tuple(calibration.shape[1:])
        if len(calibration):
            observer = self._runtime.observer if is_calibrated else MinMax()
            observed = self._observed(calibration, observer)
            return self._artefact(observed, is_calibrated=is_calibrated)
        nothing = torch.zeros(())
        ranges = {point.name: (nothing, nothing) for point in self.template(shape).points}
        return self._artefact(Observed(shape, ranges), is_calibrated=is_calibrated)

    def _artefact(self, observed: Observed, *, is_calibrated: bool) -> bytes:
        template, folded, weights = self._made(observed.shape)
        if not template.is_quantized:
            return template.artefact(weights)
        numbers = quantized_numbers(
            template, folded, weights, observed.ranges, is_calibrated=is_calibrated
        )
        return template.artefact(numbers)

    def _made(self, shape: tuple[int, ...]) -> tuple[Template, Folded, dict[str, Array]]:
        if self._of is None or self._of[0].shape != shape:
            template = self._runtime.template(self._model, shape)
            folded = template.network.folded(self._model, self._params)
            if template.is_quantized:
                weights = quantized_weights(folded, largest=LARGEST_CODE[self._bits])
            else:
                weights = float_numbers(template.network, folded)
            self._of = template, folded, weights
        return self._of


@final
class OnnxRuntime:
    """Serve int8 weights and activations with ONNX Runtime; see the module.

    Networks that it can serve are those of `edgelearn.runtime.network_reader`; any other raises
    `UnsupportedError` when it is first calibrated, and nothing is served in float instead.

    Args:
        weight_bits: 8 or 7; 0 takes 8 where this processor multiplies them exactly, else 7; 32
            serves the float network, as a yardstick for the same engine.
        calibration: How ranges are taken: "min-max", "percentile" or "moving-average"
            (`edgelearn.runtime.observers`).
        percentile: Of that calibration, above 50 to 100; left out, 99.99.
        averaging: Rate of the moving average, above 0 to 1; left out, 0.1.

    Raises:
        ValueError: If an argument is anything else.
        ExtraMissingError: If onnxruntime or onnx is not installed.

    Example:
        >>> model = FlatModel(nn.Linear(4, 2))
        >>> predict = OnnxRuntime().prepare(model, model.initial()).calibrated(torch.rand(8, 4))
        >>> predict(torch.rand(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        *,
        weight_bits: int = 0,
        calibration: str = "min-max",
        percentile: float | None = None,
        averaging: float | None = None,
    ) -> None:
        if type(weight_bits) is not int or weight_bits not in (0, *_BITS, _FLOAT):
            raise ValueError(
                f"weight_bits is {weight_bits!r}; allowed are 0 (by processor), 7, 8, 32"
            )
        for package in ("onnxruntime", "onnx"):
            engine(package)  # now, not in the middle of a run
        self.weight_bits = weight_bits or exact_here()
        self.observer = make_observer(calibration, percentile=percentile, averaging=averaging)
        self._templates: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Template]]
        self._templates = WeakKeyDictionary()

    def prepare(self, model: FlatModel, params: Tensor) -> OnnxPrepared:
        """Take parameters [P]; they are folded and quantized once."""
        return OnnxPrepared(self, model, params, weight_bits=self.weight_bits)

    def template(self, model: FlatModel, shape: tuple[int, ...]) -> Template:
        """Return the graph of a network for samples of a shape; made once.

        Raises:
            UnsupportedError: If the network has an operator that is not supported.
        """
        known = self._templates.setdefault(model.module, {})
        if shape not in known:
            known[shape] = Template.of(model, shape, is_quantized=self.weight_bits != _FLOAT)
        return known[shape]
