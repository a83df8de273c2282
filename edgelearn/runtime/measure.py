"""The one way to measure what serves a model: time for an answer, bytes, agreement with float.

Times are of whole calls, from the tensor that goes in to the logits that come out, in one process,
with a number of torch threads that is set for the time being (ONNX Runtime has one thread of its
own). A call is measured many times after some that don't count; the median and the 99th percentile
of the calls are told. Beside other work on the machine such numbers mean little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import Predictor, RangedPrepared, Runtime

BATCHES = (1, 32)
_ROWS = 500


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one call, in milliseconds.

    Attributes:
        batch: Rows in a call.
        p50_ms: Median.
        p99_ms: 99th percentile.
        num_runs: Calls that were measured.
    """

    batch: int
    p50_ms: float
    p99_ms: float
    num_runs: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What one predictor came to.

    Attributes:
        latencies: One for each size of a batch.
        model_bytes: Bytes of all that the device keeps to answer.
        agreement: Share of inputs with the same answer as the float model, in [0, 1].
        accuracy: Share of inputs with the right answer, in [0, 1]; None without labels.
    """

    latencies: tuple[Latency, ...]
    model_bytes: int
    agreement: float
    accuracy: float | None


def measure(
    predict: Predictor,
    reference: Predictor,
    x: Tensor,
    y: Tensor | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    num_warm: int = 20,
    num_runs: int = 200,
    num_threads: int = 1,
) -> Measured:
    """Measure a predictor.

    Args:
        predict: What is measured.
        reference: The float model in service.
        x: Normalized inputs [n, ...], at least as many as the largest batch.
        y: Their labels [n].
        batches: Rows per call.
        num_warm: Calls before those that count, for each batch.
        num_runs: Calls that count, for each batch.
        num_threads: Of torch.

    Raises:
        ValueError: If there is nothing to measure, or inputs are too few.
    """
    if not batches or min(batches) < 1 or max(batches) > len(x):
        raise ValueError(f"batches are {tuple(batches)}; allowed: 1 to {len(x)} rows, the inputs")
    if num_runs < 1 or num_warm < 0 or num_threads < 1:
        raise ValueError(
            f"num_runs is {num_runs}, num_warm {num_warm}, num_threads {num_threads}; "
            "at least 1, 0 and 1"
        )
    with torch.no_grad(), _threads(num_threads):
        answers = _answers(predict, x)
        agreement = (answers == _answers(reference, x)).double().mean()
        accuracy = None if y is None else float((answers == y).double().mean())
        latencies = tuple(latency(predict, x, batch, num_warm, num_runs) for batch in batches)
    return Measured(latencies, predict.model_bytes, float(agreement), accuracy)


def refresh_ms(
    runtime: Runtime,
    model: FlatModel,
    params: Tensor,
    calibration: Tensor,
    *,
    keeps_ranges: bool = False,
    num_runs: int = 20,
    num_threads: int = 1,
) -> float:
    """Return the median time from new parameters to a predictor that is ready, in milliseconds.

    The network is known to the runtime already, as it is to a device that has learned for a round.

    Args:
        runtime: What is measured.
        model: The network.
        params: Parameters [P]; each run has others near them.
        calibration: Inputs [n, ...] that the ranges come from.
        keeps_ranges: Whether ranges are observed once, beforehand, where the runtime can keep them
            (`edgelearn.runtime.protocol.RangedPrepared`), and not for each of the parameters.
        num_runs: Times that count, after one that doesn't.
        num_threads: Of torch.
    """
    taken_ms = []
    with torch.no_grad(), _threads(num_threads):
        first = runtime.prepare(model, params)
        observed = None
        if keeps_ranges and isinstance(first, RangedPrepared):
            observed = first.observed(calibration)
        for run in range(num_runs + 1):
            new = params * (1 + 1e-3 * run)
            begun = time.perf_counter()
            prepared = runtime.prepare(model, new)
            if observed is not None and isinstance(prepared, RangedPrepared):
                prepared.within(observed)
            else:
                prepared.calibrated(calibration)
            taken_ms.append(1000 * (time.perf_counter() - begun))
    return float(np.median(taken_ms[1:]))


def _answers(predict: Predictor, x: Tensor) -> Tensor:
    """Return the answers [n], in parts: what a network holds for all inputs may be gigabytes."""
    return torch.cat([predict(rows).argmax(1) for rows in torch.split(x, _ROWS)])


def latency(predict: Predictor, x: Tensor, batch: int, num_warm: int, num_runs: int) -> Latency:
    """Time calls with rows of x [n, ...], in the threads that torch has."""
    places = len(x) // batch  # another input each time, as in service
    taken_ms = []
    for run in range(-num_warm, num_runs):
        first = run % places * batch
        rows = x[first : first + batch].clone()
        begun = time.perf_counter()
        predict(rows)
        taken = 1000 * (time.perf_counter() - begun)
        if run >= 0:
            taken_ms.append(taken)
    p50, p99 = np.percentile(taken_ms, [50, 99]).tolist()
    return Latency(batch, p50, p99, num_runs)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
