"""The egress guard: nothing leaves a device that is not declared.

A reply is checked **on the device** against a schema that the framework writes, not the client
strategy: the names, dtypes and shapes of the model's update, and listed metrics. Anything else
raises here and is not sent. What a schema can't see is data hidden in the values of an admitted
tensor; see docs/privacy.md.

An error travels too, so its message names what was declared and never what was found: a name, a
shape or a number that a strategy made up can hold a sample. What was found is a note on the
exception (`__notes__`), for the device's own log and for `edgelearn check`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import edgelearn
from edgelearn.compress.codec import Codec, Piece
from edgelearn.errors import EdgelearnError, EgressError, StrategyError, nearest
from edgelearn.params import Layout

_LARGEST = 2**53
_LONGEST_NOTE = 200
_PACKAGE = Path(edgelearn.__file__).parent
_KNOWN_MODULES = ("builtins", "edgelearn.errors")


@dataclass(frozen=True, slots=True)
class Schema:
    """What a reply may hold; it must hold all of it.

    Attributes:
        arrays: Tensor name -> shape.
        scalars: Metric name -> int (a count, from 0 to 2**53) or float (finite).
        counts: Metric name -> length of a list of non-negative whole numbers.
        dtypes: Tensor name -> dtype, where that is not float32.
        bounds: Names of tensors of one dimension that may be shorter than declared.
    """

    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scalars: Mapping[str, type[int] | type[float]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    bounds: frozenset[str] = frozenset()

    def admit(self, arrays: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Let a reply pass.

        Raises:
            EgressError: If anything is undeclared, missing, or not as declared.
        """
        _same_names("tensor", arrays, self.arrays)
        for name, shape in self.arrays.items():
            dtype = self.dtypes.get(name, torch.float32)
            _check_tensor(name, arrays[name], Piece(tuple(shape), dtype, name in self.bounds))
        _same_names("metric", metrics, {**self.scalars, **self.counts})
        for name, kind in self.scalars.items():
            _check_scalar(name, metrics[name], kind)
        for name, length in self.counts.items():
            _check_counts(name, metrics[name], length)


FIT_METRICS: Mapping[str, type[int] | type[float]] = {
    "num-examples": int,
    "loss": float,
    "num-steps": int,
}


def fit_metrics(*, detects: bool) -> Mapping[str, type[int] | type[float]]:
    """Return the metrics that a device sends after training.

    Args:
        detects: Whether devices look for boundaries of experiences themselves.
    """
    return {**FIT_METRICS, "num-alarms": int} if detects else FIT_METRICS


def fit_schema(layout: Layout, *, detects: bool = False) -> Schema:
    """Return what a device sends after training."""
    return Schema(
        arrays=dict(zip(layout.names, layout.shapes, strict=True)),
        scalars=fit_metrics(detects=detects),
    )


def sent_schema(codec: Codec | None, layout: Layout, *, detects: bool = False) -> Schema:
    """Return what crosses the wire after training: a codec's message in place of the update.

    What `fit_schema` describes is checked before it is encoded, this afterwards.
    """
    if codec is None:
        return fit_schema(layout, detects=detects)
    return replace(message_schema(codec, layout), scalars=fit_metrics(detects=detects))


def message_schema(codec: Codec, layout: Layout) -> Schema:
    """Return what a codec's messages hold."""
    pieces = codec.pieces(layout)
    return Schema(
        arrays={name: piece.shape for name, piece in pieces.items()},
        dtypes={name: piece.dtype for name, piece in pieces.items()},
        bounds=frozenset(name for name, piece in pieces.items() if piece.is_bound),
    )


def consolidate_schema() -> Schema:
    """Return what a device sends after consolidation: that it has done so."""
    return Schema(scalars={"num-examples": int})


def evaluate_schema(num_experiences: int) -> Schema:
    """Return what a device sends after evaluation: correct answers and their number."""
    counts = dict.fromkeys(("count", "served", "float"), num_experiences)
    return Schema(scalars={"num-examples": int, "model-bytes": int}, counts=counts)


def hello_schema() -> Schema:
    """Return what a device says of itself on a real network: which one it is."""
    return Schema(scalars={"device": int})


def is_public(error: BaseException) -> bool:
    """Whether an error's text may leave the device: edgelearn raised it, from names it knows.

    The text of any other exception can hold a sample, and so can a class that a plug-in makes up.
    """
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)
    # A StrategyError quotes names that the strategy made up.
    known = isinstance(error, EdgelearnError) and not isinstance(error, StrategyError)
    return raised_here and known


def reason_of(error: BaseException) -> str:
    """Return what the server may know of a failure on a device.

    Its text if that is public, else the built-in kind of the exception and where in the plug-in's
    code it arose.
    """
    if is_public(error):
        return f"{type(error).__name__}: {error}"
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ in _KNOWN_MODULES)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not Path(f.filename).is_relative_to(_PACKAGE)]
    at = (theirs or frames)[:1]
    where = f" at {Path(at[0].filename).name}:{at[0].lineno}" if at else ""
    return f"{kind}{where}; the device's own log says more"


def _same_names(what: str, found: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    if extra := [name for name in found if name not in declared]:
        close = nearest(extra[0], declared)
        raise _refusal(
            f"a {what} that is not declared{close}; declared: {_listed(declared)}",
            found=f"{len(extra)} of them, the first named {extra[0]!r}",
        )
    if missing := [name for name in declared if name not in found]:
        raise _refusal(f"the declared {what} {missing[0]!r} is missing")


def _check_tensor(name: str, value: Any, declared: Piece) -> None:
    if not isinstance(value, Tensor):
        raise _refusal(f"{name!r} is not a tensor", found=type(value).__name__)
    if not declared.admits(value):
        raise _refusal(
            f"the tensor {name!r} is not {declared}, as declared",
            found=f"{tuple(value.shape)} {value.dtype}",
        )


def _check_scalar(name: str, value: Any, kind: type[int] | type[float]) -> None:
    if type(value) is not kind:
        raise _refusal(
            f"the metric {name!r} is not one {kind.__name__}, as declared",
            found=f"{type(value).__name__} {value!r}",
        )
    if kind is int:
        _check_whole(name, value)
    elif not math.isfinite(value):
        raise _refusal(f"the metric {name!r} is not finite", found=repr(value))


def _check_counts(name: str, value: Any, length: int) -> None:
    if type(value) is not list or len(value) != length:
        raise _refusal(
            f"the metric {name!r} is not a list of {length} counts, as declared",
            found=f"{type(value).__name__} {value!r}",
        )
    for item in value:
        _check_whole(name, item)


def _check_whole(name: str, value: Any) -> None:
    # Bounded, since a number without bounds can hold a whole sample.
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise _refusal(
            f"the metric {name!r} is not a whole number from 0 to 2**53", found=repr(value)
        )


def _refusal(reason: str, *, found: str = "") -> EgressError:
    error = EgressError(f"not sent: {reason}")
    if found:
        error.add_note(f"found: {found[:_LONGEST_NOTE]}")
    return error


def _listed(names: Iterable[str], limit: int = 8) -> str:
    found = list(names)
    more = f", ... ({len(found)} in all)" if len(found) > limit else ""
    return (", ".join(found[:limit]) or "none") + more
