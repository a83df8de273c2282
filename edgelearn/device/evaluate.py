"""What a device measures of itself: the model that it serves, and the float model beside it.

A simulated fleet measures many devices with the same parameters. `evaluate_group` does that in one
pass: rows of all devices in the same batches, each row with its own device's ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgelearn.params import FlatModel
from edgelearn.runtime import rows
from edgelearn.runtime.protocol import (
    GroupPredictor,
    GroupPrepared,
    Observed,
    Prepared,
    RangedGroupPrepared,
    Rows,
)
from edgelearn.runtime.ranges import Kept, Probe, calibrated, of_group
from edgelearn.scenario.samples import Batch, Samples, SampleStore


@dataclass(frozen=True, slots=True)
class Counts:
    """Correct answers on each experience, by experience id [T].

    Attributes:
        count: Own test samples.
        served: Correct answers of the served model.
        float_: Correct answers of the float model.
        model_bytes: Bytes of the served model.
        kept: The device's activation ranges, if it keeps them and has observed them anew: its own,
            never sent.
    """

    count: tuple[int, ...]
    served: tuple[int, ...]
    float_: tuple[int, ...]
    model_bytes: int
    kept: Kept | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one device is evaluated with.

    Attributes:
        calibration: Its own training samples, for the ranges; there may be none.
        tests: Its own test samples, by experience id [T]; any of them may be empty.
        params: Parameters [P] that it answers with, if not the global ones.
        kept: Its activation ranges, if it keeps them; all devices of a group do, or none does.
    """

    calibration: Samples
    tests: Sequence[Samples]
    params: Tensor | None = None
    kept: Kept | None = None


def evaluate(
    model: FlatModel,
    params: Tensor,
    prepared: Prepared,
    calibration: Tensor,
    tests: Sequence[Samples],
    *,
    kept: Kept | None = None,
) -> Counts:
    """Evaluate on a device's own test samples of every experience.

    Args:
        model: The network.
        params: Global parameters [P].
        prepared: The same parameters, made ready by the device's runtime.
        calibration: The device's own training inputs [n, ...].
        tests: Its test samples, by experience id.
        kept: Its activation ranges, if it keeps them.
    """
    model.module.eval()
    sizes = [len(samples) for samples in tests]
    with torch.no_grad():  # as a decorator it would stand first in a runtime's tracebacks
        predictor, new = calibrated(prepared, calibration, kept)
        if sum(sizes) == 0:
            none = (0,) * len(tests)
            return Counts(none, none, none, predictor.model_bytes, new)
        batch = tests[0].store.batch(torch.cat([samples.ids for samples in tests]))
        served = torch.split(_correct(predictor(batch.x), batch), sizes)
        exact = served
        if not (isinstance(prepared, GroupPrepared) and prepared.serves_float):
            exact = torch.split(_correct(model(params, batch.x), batch), sizes)
    return Counts(
        tuple(sizes),
        tuple(int(hits.sum()) for hits in served),
        tuple(int(hits.sum()) for hits in exact),
        predictor.model_bytes,
        new,
    )


def evaluate_group(
    model: FlatModel, params: Tensor, prepared: Prepared, trials: Sequence[Trial]
) -> list[Counts]:
    """Evaluate several devices with the same parameters in one pass.

    The integers of a served model are exact, so they don't depend on a row's neighbours. What is
    float (ranges from calibration, float logits) can differ in the last bit from a device alone,
    as it can for any two sizes of a batch; so what a group consists of must not depend on chance.

    A runtime without `GroupPrepared`, or `RangedGroupPrepared` where devices keep ranges, and a
    network that mixes rows (`edgelearn.runtime.rows`) are evaluated one device after another.

    Args:
        model: The network.
        params: Global parameters [P].
        prepared: The same parameters, made ready by the devices' runtime.
        trials: The devices of the group, D; their calibration samples lie in one store, and so do
            their test samples.

    Returns:
        One device's counts for each trial.
    """
    model.module.eval()
    keep = any(trial.kept is not None for trial in trials)
    kind = RangedGroupPrepared if keep else GroupPrepared
    if isinstance(prepared, kind) and (num_rows := _shared_batch(model, trials)):
        with torch.no_grad():
            return _in_one_pass(model, params, prepared, trials, num_rows)
    return [
        evaluate(model, params, prepared, trial.calibration.batch().x, trial.tests, kept=trial.kept)
        for trial in trials
    ]


def _in_one_pass(
    model: FlatModel,
    params: Tensor,
    prepared: GroupPrepared,
    trials: Sequence[Trial],
    num_rows: int,
) -> list[Counts]:
    """Evaluate trials whose rows may share batches of `num_rows`."""
    predictor, kept = _group_predictor(prepared, trials, num_rows)
    num_experiences = len(trials[0].tests)
    cells = len(trials) * num_experiences
    served = exact = torch.zeros(cells, dtype=torch.int64)
    tests = [
        (device * num_experiences + experience, samples)
        for device, trial in enumerate(trials)
        for experience, samples in enumerate(trial.tests)
    ]
    for batch, cell in _batches(tests, num_rows):
        device = cell // num_experiences
        right = _correct(predictor(Rows(batch.x, device)), batch)
        served = served + torch.bincount(cell[right], minlength=cells)
        if not prepared.serves_float:
            right = _correct(model(params, batch.x), batch)
        exact = exact + torch.bincount(cell[right], minlength=cells)
    return [
        Counts(
            tuple(len(samples) for samples in trial.tests),
            tuple(right_served),
            tuple(right_exact),
            predictor.model_bytes,
            new,
        )
        for trial, new, right_served, right_exact in zip(
            trials,
            kept,
            served.view(len(trials), num_experiences).tolist(),
            exact.view(len(trials), num_experiences).tolist(),
            strict=True,
        )
    ]


def _group_predictor(
    prepared: GroupPrepared, trials: Sequence[Trial], num_rows: int
) -> tuple[GroupPredictor, list[Kept | None]]:
    """Return the predictor of a group, and the ranges of those who observed theirs anew.

    Where ranges are kept, all devices' probes pass at once, then all samples of those whose ranges
    do not hold.
    """
    samples = {device: trial.calibration for device, trial in enumerate(trials)}
    kept = [trial.kept for trial in trials if trial.kept is not None]
    if not isinstance(prepared, RangedGroupPrepared) or not kept or not any(samples.values()):
        rows = _rows(samples, num_rows)
        return prepared.calibrated_group(rows, num_devices=len(trials)), [None] * len(trials)
    ranged = prepared

    def observe(theirs: Mapping[int, Samples]) -> Observed:
        return ranged.observed_group(_rows(theirs, num_rows), num_devices=len(trials))

    now = observe({k: _probe(kept[k].probe, own) for k, own in samples.items()})
    ranges, new = of_group(kept, now, lambda some: observe({k: samples[k] for k in some}))
    return ranged.within_group(ranges), new


def _probe(probe: Probe, samples: Samples) -> Samples:
    return Samples(samples.store, samples.ids[probe.among(len(samples))])


def _rows(samples: Mapping[int, Samples], num_rows: int) -> Iterator[Rows]:
    """Yield batches over samples by device."""
    labelled = list(samples.items())
    return (Rows(batch.x, device) for batch, device in _batches(labelled, num_rows))


def _shared_batch(model: FlatModel, trials: Sequence[Trial]) -> int | None:
    """Return how many rows of all trials a batch may hold; None if each has to go alone."""
    if len(trials) < 2:
        return None
    samples = next(
        (s for trial in trials for s in (trial.calibration, *trial.tests) if len(s)), None
    )
    if samples is None:
        return None
    return rows.shared_batch(model, tuple(samples.batch(slice(1)).x.shape[1:]))


def _batches(
    labelled: Sequence[tuple[int, Samples]], num_rows: int
) -> Iterator[tuple[Batch, Tensor]]:
    """Gather labelled samples, one after another, with the label of each sample [n]."""
    store: SampleStore | None = next((s.store for _, s in labelled if len(s)), None)
    if store is None:
        return
    ids = torch.cat([samples.ids for _, samples in labelled])
    sizes = torch.tensor([len(samples) for _, samples in labelled])
    labels = torch.tensor([label for label, _ in labelled]).repeat_interleave(sizes)
    for some, theirs in zip(torch.split(ids, num_rows), torch.split(labels, num_rows), strict=True):
        yield store.batch(some), theirs


def _correct(logits: Tensor, batch: Batch) -> Tensor:
    if batch.mask is not None:
        logits = logits.masked_fill(~batch.mask, float("-inf"))
    return logits.argmax(1) == batch.y
