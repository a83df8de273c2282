"""The egress guard: nothing leaves a device that is not declared.

A reply is checked **on the device** against a schema that the framework writes, not the client
strategy: the names, dtypes and shapes of the model's update, and listed metrics. Anything else
raises here and is not sent. What a schema can't see is data hidden in the values of an admitted
tensor; see docs/privacy.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgelearn.errors import EgressError, nearest
from edgelearn.params import Layout


@dataclass(frozen=True, slots=True)
class Schema:
    """What a reply may hold; it must hold all of it.

    Attributes:
        arrays: Tensor name -> shape; all float32.
        scalars: Metric name -> int or float.
        counts: Metric name -> length of a list of non-negative whole numbers.
    """

    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scalars: Mapping[str, type[int] | type[float]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def admit(self, arrays: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Let a reply pass.

        Raises:
            EgressError: If anything is undeclared, missing, or not as declared.
        """
        _same_names("tensor", arrays, self.arrays)
        for name, shape in self.arrays.items():
            _check_tensor(name, arrays[name], shape)
        _same_names("metric", metrics, {**self.scalars, **self.counts})
        for name, kind in self.scalars.items():
            _check_scalar(name, metrics[name], kind)
        for name, length in self.counts.items():
            _check_counts(name, metrics[name], length)


def fit_schema(layout: Layout) -> Schema:
    """Return what a device sends after training."""
    return Schema(
        arrays=dict(zip(layout.names, layout.shapes, strict=True)),
        scalars={"num-examples": int, "loss": float, "num-steps": int},
    )


def consolidate_schema() -> Schema:
    """Return what a device sends after consolidation: that it has done so."""
    return Schema(scalars={"num-examples": int})


def evaluate_schema(num_experiences: int) -> Schema:
    """Return what a device sends after evaluation: correct answers and their number."""
    counts = dict.fromkeys(("count", "served", "float"), num_experiences)
    return Schema(scalars={"num-examples": int, "model-bytes": int}, counts=counts)


def _same_names(what: str, found: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    if extra := [name for name in found if name not in declared]:
        raise EgressError(
            f"not sent: the {what} {extra[0]!r} is not declared{nearest(extra[0], declared)}; "
            f"declared: {', '.join(declared) or 'none'}"
        )
    if missing := [name for name in declared if name not in found]:
        raise EgressError(f"not sent: the declared {what} {missing[0]!r} is missing")


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise EgressError(f"not sent: {name!r} is a {type(value).__name__}, not a tensor")
    if tuple(value.shape) != tuple(shape) or value.dtype != torch.float32:
        raise EgressError(
            f"not sent: the tensor {name!r} is {tuple(value.shape)} {value.dtype}, declared "
            f"{tuple(shape)} torch.float32"
        )


def _check_scalar(name: str, value: Any, kind: type[int] | type[float]) -> None:
    if type(value) is not kind:
        raise EgressError(
            f"not sent: the metric {name!r} is a {type(value).__name__}, declared one {kind.__name__}"
        )
    if not math.isfinite(value):
        raise EgressError(f"not sent: the metric {name!r} is {value}")


def _check_counts(name: str, value: Any, length: int) -> None:
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
        raise EgressError(f"not sent: the metric {name!r} is {found}, declared {length} counts")
    for item in value:
        if type(item) is not int or item < 0:
            raise EgressError(f"not sent: the metric {name!r} holds {item!r}, not a count")
