"""The batches of many devices at once: what each draws alone, as tensors [K, ...].

The devices of a stack are sorted, the most samples first. Step t is taken by those that still have
a batch t, which are the first rows. Where their last batches differ in length, the shorter ones
are filled up with samples of zeros and of no weight, which add exact zeros to every sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.strategy import Rehearsal
from edgelearn.device.training import GATHERED, Training
from edgelearn.scenario.samples import EMPTY, SampleStore
from edgelearn.seeds import permutations, split_each

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of a stack [K], each with at least one sample, the most samples first.

    Attributes:
        store: Where all sample ids lead.
        ids: Ids of all samples, device after device, int32.
        starts: Where each device's begin, and the end [K + 1].
        seeds: Of all that each draws [K].
        memory: What they remember: tensors [K, ...] by name, as far as training reads them.
    """

    store: SampleStore
    ids: NDArray[np.int32]
    starts: Integers
    seeds: NDArray[np.uint64]
    memory: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def sizes(self) -> Integers:
        """Samples of each device [K]."""
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True)
class StackedBatch:
    """One step's samples of the first k devices, B rows for each.

    Attributes:
        x: Inputs [k, B, F].
        y: Labels [k, B].
        weight: Of each sample in its device's loss [k, B]; None is 1 / B.
        mask: Classes that count [k, B, C]; None is all.
        num_samples: Of each device [k], or the number that all have.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None
    mask: Tensor | None
    num_samples: Integers | int


@dataclass(frozen=True, slots=True)
class _Picked:
    """Which samples a step takes.

    Attributes:
        ids: [k, B], int32.
        weight: [k, B]; None is 1 / B.
        is_padding: Which rows hold no sample [k, B]; None if all do.
        num_samples: Of each device [k], or the number that all have.
    """

    ids: NDArray[np.int32]
    weight: NDArray[np.float32] | None
    is_padding: NDArray[np.bool_] | None
    num_samples: Integers | int


def batches(training: Training, devices: Devices) -> Iterator[StackedBatch]:
    """Yield the batch of each step; several are decoded at once, for decoding has fixed costs."""
    features = int(np.prod(devices.store.sample_shape))
    run: list[_Picked] = []
    gathered = 0
    for picked in _picks(training, devices):
        size = picked.ids.size * features
        if run and gathered + size > GATHERED:
            yield from _decode(devices.store, run)
            run, gathered = [], 0
        run.append(picked)
        gathered += size
    yield from _decode(devices.store, run)


def _decode(store: SampleStore, run: list[_Picked]) -> Iterator[StackedBatch]:
    ids = np.concatenate([picked.ids.ravel() for picked in run])
    batch = store.batch(torch.from_numpy(ids))
    x = batch.x.flatten(1)
    start = 0
    for picked in run:
        shape, rows = picked.ids.shape, slice(start, start + picked.ids.size)
        start = rows.stop
        inputs = x[rows].view(*shape, -1)
        if picked.is_padding is not None:
            inputs[torch.from_numpy(picked.is_padding)] = 0.0
        yield StackedBatch(
            inputs,
            batch.y[rows].view(shape),
            None if picked.weight is None else torch.from_numpy(picked.weight),
            None if batch.mask is None else batch.mask[rows].view(*shape, -1),
            picked.num_samples,
        )


def _picks(training: Training, devices: Devices) -> Iterator[_Picked]:
    """Yield which samples each step takes: those of `Training.steps`, for all devices."""
    sizes, size = devices.sizes, training.spec.batch_size
    longest = -(-int(sizes[0]) // size)
    # Step t is taken by the devices with more than t * size samples; sizes fall.
    active = np.searchsorted(-sizes, -size * np.arange(longest), side="left")
    replayed = _Replayed.of(training.strategy.rehearsal(), training.spec.epochs, size, devices)
    for epoch in range(training.spec.epochs):
        order = permutations(split_each(devices.seeds, epoch), sizes)
        ids = devices.ids[devices.starts[:-1, None] + order]
        for t in range(longest):
            k = int(active[t])
            new = _fresh(ids[:k, t * size : (t + 1) * size], sizes[:k] - t * size, size)
            yield new if replayed is None else replayed.join(new, epoch, t)


def _fresh(ids: NDArray[np.int32], left: Integers, size: int) -> _Picked:
    """Return a step's new samples: `left` [k] are those that remain, in falling numbers."""
    rows = ids.shape[1]
    if int(left[-1]) >= rows:
        return _Picked(ids, None, None, rows)
    counts = np.minimum(left, size)
    is_padding = np.arange(rows) >= counts[:, None]
    return _Picked(ids, _spread(counts, is_padding), is_padding, counts)


def _spread(counts: Integers, is_padding: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a weight of 1 in all, spread over each device's samples."""
    return np.where(is_padding, 0.0, 1.0 / np.maximum(counts, 1)[:, None]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Replayed:
    """What devices replay: the draws of `Memory.draw`.

    Attributes:
        rehearsal: What the strategy declares.
        ids: Stored samples of each device [K, H], those held first.
        held: How many they are [K].
        words: The word of each step [K, steps]; rows end with the device's last step.
        per_epoch: Steps of each device in an epoch [K].
    """

    rehearsal: Rehearsal
    ids: NDArray[np.int32]
    held: Integers
    words: NDArray[np.uint64]
    per_epoch: Integers

    @classmethod
    def of(
        cls, rehearsal: Rehearsal | None, epochs: int, size: int, devices: Devices
    ) -> _Replayed | None:
        """Draw the words of all steps; None if nothing is replayed."""
        if rehearsal is None:
            return None
        ids: NDArray[np.int32] = devices.memory[rehearsal.buffer].numpy()
        is_held = ids != EMPTY
        held = is_held.sum(1)
        if not held.any():
            return None
        ids = np.take_along_axis(ids, np.argsort(~is_held, axis=1, kind="stable"), 1)
        per_epoch = -(-devices.sizes // size)
        words = np.zeros((len(devices), int(per_epoch[0]) * epochs), np.uint64)
        generator = torch.Generator()
        for k in np.flatnonzero(held).tolist():
            generator.manual_seed(int(devices.seeds[k]))
            count = int(per_epoch[k]) * epochs
            words[k, :count] = torch.randint(2**62, (count,), generator=generator).numpy()
        return cls(rehearsal, ids, held, words, per_epoch)

    def join(self, new: _Picked, epoch: int, t: int) -> _Picked:
        """Append a step's replayed samples to its new ones."""
        k, rows = new.ids.shape
        held, arriving = self.held[:k], np.broadcast_to(new.num_samples, k)
        counts = np.minimum(self.rehearsal.count or arriving, held)
        most = int(counts.max())
        if most == 0:
            return new
        words = self.words[np.arange(k), epoch * self.per_epoch[:k] + t]
        order = permutations(words, held, first=most)
        ids = np.concatenate([new.ids, np.take_along_axis(self.ids[:k], order, 1)], 1)
        # What is padding has the id of some sample of the device's own; a device without any
        # replayed ones has EMPTY there.
        ids[:, rows:] = np.where(held[:, None] > 0, ids[:, rows:], ids[:, :1])
        total, share = arriving + counts, self.rehearsal.share
        is_padding = np.empty(ids.shape, np.bool_)
        is_padding[:, :rows] = False if new.is_padding is None else new.is_padding
        is_padding[:, rows:] = np.arange(most) >= counts[:, None]
        padded = is_padding if is_padding.any() else None
        if share is None:
            weight = None if padded is None else _spread(total, is_padding)
            return _Picked(ids, weight, padded, total)
        first = _spread(arriving, is_padding[:, :rows])
        first *= np.where(counts > 0, 1.0 - share, 1.0).astype(np.float32)[:, None]
        then = _spread(counts, is_padding[:, rows:]) * np.float32(share)
        return _Picked(ids, np.concatenate([first, then], 1), padded, total)
