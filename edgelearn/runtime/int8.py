r"""int8 reference runtime: integer arithmetic, exactly as an integer kernel would do it.

Linear and convolution layers are quantized. What is between them stays float in networks that are
served layer by layer; in those that can be read as a graph, batch norm is folded and values that
enter a sum or an average are codes (`edgelearn.runtime.int8_forms`).

- weights: symmetric per output channel, w_q = clip(round(w / s_w), -c, c), s_w = max|w| / c, with
  the largest code c = 2^(b - 1) - 1 for b bits, 127 for 8 (and 64 for 7, as `onnxruntime` has it);
- activations: affine per tensor, x_q = clip(round(x / s_x) + z, 0, 255), range from calibration;
  without it an input's own range, and s_x large enough for the bias, at least max|b| / (s_w 2^31);
- bias: 32 bits at scale s_x s_w;
- result: y = s_x s_w (sum (x_q - z) w_q + b_q), the sum exact.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 2. Torch has no fast
integer kernels on all processors, so the integers travel in floating-point registers: float32
holds every partial sum of 518 products, so longer sums are added up slice by slice. The numbers
are those of an integer kernel, the speed is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgelearn.compress.quantize import LARGEST_CODE, least_step, quantize_weight, stored_bytes
from edgelearn.errors import nearest
from edgelearn.params import FlatModel
from edgelearn.runtime.int8_forms import Form, Parts, form_of
from edgelearn.runtime.int8_layers import unknown_range
from edgelearn.runtime.observers import MinMax, make_observer, ranges_of, ranges_of_group
from edgelearn.runtime.protocol import Observed, RangedGroupPrepared, Rows
from edgelearn.runtime.weight_only import WeightOnlyPredictor

ACTIVATIONS = ("static", "dynamic", "float")


@final
@dataclass(frozen=True, slots=True)
class Int8Predictor:
    """One device's quantized model."""

    skeleton: nn.Module
    tensors: Mapping[str, Tensor]
    model_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C]."""
        out: Tensor = functional_call(self.skeleton, dict(self.tensors), (x,))
        return out


@final
@dataclass(frozen=True, slots=True)
class Int8GroupPredictor:
    """The quantized models of several devices: the same integers, each with its own ranges."""

    skeleton: nn.Module
    tensors: Mapping[str, Tensor]
    owners: tuple[str, ...]
    model_bytes: int

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C]; bit for bit those of each device's own predictor."""
        owner = {name: rows.device.view(-1) for name in self.owners}  # one each, see Int8Prepared
        tensors = {**self.tensors, **owner}
        out: Tensor = functional_call(self.skeleton, tensors, (rows.x,))
        return out


@final
@dataclass(slots=True)
class _UnseenGroup:
    """Devices none of which has samples: what they are asked shows the shape of an input."""

    prepared: Int8Prepared
    num_devices: int
    model_bytes: int = 0

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C]."""
        nothing = Rows(rows.x[:0], rows.device[:0])
        group = self.prepared.calibrated_group([nothing], num_devices=self.num_devices)
        self.model_bytes = group.model_bytes
        return group(rows)


@dataclass(frozen=True, slots=True)
class _Quantized:
    """Parameters in the form of their network.

    Attributes:
        form: The form.
        parts: What it makes of the parameters.
        tensors: What is bound to the skeleton, with no ranges.
        model_bytes: Codes, scales, 32-bit biases, what stays float, and scale and zero point of
            each value that becomes codes.
    """

    form: Form
    parts: Parts
    tensors: Mapping[str, Tensor]
    model_bytes: int

    @classmethod
    def of(cls, form: Form, parts: Parts, *, weight_bits: int) -> _Quantized:
        tensors: dict[str, Tensor] = {}
        num_bytes = sum(4 * value.numel() for value in parts.in_float.values())
        for prefix, (weight, bias) in parts.weights.items():
            codes, scale = quantize_weight(weight, largest=LARGEST_CODE[weight_bits])
            own = torch.zeros_like(scale) if bias is None else bias
            slot = form.skeleton.get_buffer(f"{prefix}codes")
            tensors[f"{prefix}codes"] = codes.to(slot.dtype)  # once, not in each answer
            tensors[f"{prefix}scale"], tensors[f"{prefix}bias"] = scale, own
            tensors[f"{prefix}least_step"] = least_step(own, scale, weight[0].numel())
            num_bytes += stored_bytes(codes.numel(), weight_bits) + 4 * len(scale)
            num_bytes += 0 if bias is None else 4 * len(bias)
        for prefix in form.rounded:
            tensors[f"{prefix}least_step"] = torch.zeros(())
        # Torch leaves what it binds to a layer with two names there, and takes what is the same
        # tensor for tied: so everything is always bound, and each place has tensors of its own.
        for prefix in form.places:
            num_bytes += 5
            for leaf, value in unknown_range().items():
                tensors[f"{prefix}{leaf}"] = value
        return cls(form, parts, {**tensors, **parts.in_float}, num_bytes)


@final
class Int8Prepared(RangedGroupPrepared):
    """Integer weights; activation ranges come from each device."""

    def __init__(self, runtime: Int8Runtime, model: FlatModel, params: Tensor) -> None:
        self._runtime, self._model = runtime, model
        self._params = params.detach().clone()
        self._of: dict[tuple[int, ...], _Quantized] = {}

    def calibrated(self, calibration: Tensor) -> Int8Predictor:
        """Observe the range of each value that becomes codes on own inputs [n, ...]."""
        if not len(calibration):
            made = self._made(tuple(calibration.shape[1:]))
            return Int8Predictor(made.form.skeleton, made.tensors, made.model_bytes)
        return self.within(self.observed(calibration))

    def observed(self, x: Tensor) -> Observed:
        """Return the range of each value that becomes codes, on inputs [n, ...].

        There is none where each input has its own.
        """
        shape, observer = tuple(x.shape[1:]), self._runtime.observer
        if observer is None:
            return Observed(shape, {})
        return Observed(shape, ranges_of(self._made(shape).parts.observe, x, observer))

    def within(self, observed: Observed) -> Int8Predictor:
        """Return the predictor with these ranges."""
        made = self._made(observed.shape)
        tensors = dict(made.tensors)
        for prefix, (low, high) in observed.ranges.items():
            tensors[f"{prefix}low"], tensors[f"{prefix}high"] = low, high
        return Int8Predictor(made.form.skeleton, tensors, made.model_bytes)

    def calibrated_group(
        self, calibration: Iterable[Rows], *, num_devices: int
    ) -> Int8GroupPredictor | _UnseenGroup:
        """Observe the ranges of several devices in one pass; without rows a range is unknown."""
        parts = iter(calibration)
        first = next(parts, None)
        if first is None:
            return _UnseenGroup(self, num_devices)
        observed = self.observed_group(chain([first], parts), num_devices=num_devices)
        return self.within_group(observed)

    def observed_group(self, calibration: Iterable[Rows], *, num_devices: int) -> Observed:
        """Return the range of each value that becomes codes, for each device [D]."""
        parts = iter(calibration)
        first = next(parts)
        shape, observer = tuple(first.x.shape[1:]), self._runtime.observer
        made = self._made(shape)
        ranges = ranges_of_group(
            made.parts.observe,
            [] if observer is None else chain([first], parts),
            observer or MinMax(),
            places=made.form.places,
            num_devices=num_devices,
        )
        return Observed(shape, ranges)

    def within_group(self, observed: Observed) -> Int8GroupPredictor:
        """Return the predictor of a group with these ranges."""
        made = self._made(observed.shape)
        tensors = dict(made.tensors)
        for prefix, (low, high) in observed.ranges.items():
            tensors[f"{prefix}low"], tensors[f"{prefix}high"] = low, high
        owners = tuple(f"{prefix}owner" for prefix in observed.ranges)
        return Int8GroupPredictor(made.form.skeleton, tensors, owners, made.model_bytes)

    def _made(self, shape: tuple[int, ...]) -> _Quantized:
        if shape not in self._of:
            form = self._runtime.form(self._model, shape)
            parts = form.parts(self._model, self._params)
            self._of[shape] = _Quantized.of(form, parts, weight_bits=self._runtime.weight_bits)
        return self._of[shape]


@final
class Int8Runtime:
    """Serve int8 weights and activations; see the module for the arithmetic.

    Args:
        weight_bits: Of a weight's code, 2 to 8. Fewer make a model smaller (codes count as packed
            without gaps; 7 bits fill a byte) and coarser. 7 are the integers that `onnxruntime` has
            to take on an x86 processor without VNNI. Activations have 8 bits in any case.
        activations: "static": codes within the ranges of the device's calibration samples;
            "dynamic": each input has its own ranges; "float": they are not quantized.
        calibration: How static ranges are taken: "min-max", "percentile" or "moving-average"
            (`edgelearn.runtime.observers`).
        percentile: Of that calibration, above 50 to 100; left out, 99.99.
        averaging: Rate of the moving average, above 0 to 1; left out, 0.1.

    Raises:
        ValueError: If an argument is anything else.
    """

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activations: str = "static",
        calibration: str = "min-max",
        percentile: float | None = None,
        averaging: float | None = None,
    ) -> None:
        if type(weight_bits) is not int or weight_bits not in LARGEST_CODE:
            raise ValueError(f"weight_bits is {weight_bits!r}; allowed: 2 to 8")
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"activations is {activations!r}{nearest(str(activations), ACTIVATIONS)}; there "
                f"are {', '.join(ACTIVATIONS)}"
            )
        observer = make_observer(calibration, percentile=percentile, averaging=averaging)
        if activations != "static" and not isinstance(observer, MinMax):
            raise ValueError(
                f"calibration is {calibration!r}, but with activations {activations!r} nothing is "
                "calibrated"
            )
        self.weight_bits, self.activations = weight_bits, activations
        self.observer = observer if activations == "static" else None
        self._forms: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Form]]
        self._forms = WeakKeyDictionary()

    def prepare(self, model: FlatModel, params: Tensor) -> Int8Prepared | WeightOnlyPredictor:
        """Take parameters [P]; they are quantized once."""
        if self.activations == "float":
            return WeightOnlyPredictor.of(model, params, weight_bits=self.weight_bits)
        return Int8Prepared(self, model, params)

    def form(self, model: FlatModel, shape: tuple[int, ...]) -> Form:
        """Return the quantized form of a network for inputs of a shape; made once."""
        known = self._forms.setdefault(model.module, {})
        if shape not in known:
            known[shape] = form_of(model, shape)
        return known[shape]
