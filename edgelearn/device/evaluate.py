"""What a device measures of itself: the model that it serves, and the float model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import Prepared
from edgelearn.scenario.samples import Batch, Samples


@dataclass(frozen=True, slots=True)
class Counts:
    """Correct answers on each experience, by experience id [T].

    Attributes:
        count: Own test samples.
        served: Correct answers of the served model.
        float_: Correct answers of the float model.
        model_bytes: Bytes of the served model.
    """

    count: tuple[int, ...]
    served: tuple[int, ...]
    float_: tuple[int, ...]
    model_bytes: int


@torch.no_grad()
def evaluate(
    model: FlatModel,
    params: Tensor,
    prepared: Prepared,
    calibration: Tensor,
    tests: Sequence[Samples],
) -> Counts:
    """Evaluate on a device's own test samples of every experience.

    Args:
        model: The network.
        params: Global parameters [P].
        prepared: The same parameters, made ready by the device's runtime.
        calibration: The device's own training inputs [n, ...].
        tests: Its test samples, by experience id.
    """
    model.module.eval()
    predictor = prepared.calibrated(calibration)
    sizes = [len(samples) for samples in tests]
    if sum(sizes) == 0:
        none = (0,) * len(tests)
        return Counts(none, none, none, predictor.model_bytes)
    ids = torch.cat([samples.ids for samples in tests])
    batch = tests[0].store.batch(ids)
    served = torch.split(_correct(predictor(batch.x), batch), sizes)
    exact = torch.split(_correct(model(params, batch.x), batch), sizes)
    return Counts(
        tuple(sizes),
        tuple(int(hits.sum()) for hits in served),
        tuple(int(hits.sum()) for hits in exact),
        predictor.model_bytes,
    )


def _correct(logits: Tensor, batch: Batch) -> Tensor:
    if batch.mask is not None:
        logits = logits.masked_fill(~batch.mask, float("-inf"))
    return logits.argmax(1) == batch.y
