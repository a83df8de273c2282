"""Samples as ids into a store, and batches gathered from it.

A simulated device holds ids into one data set that the whole fleet shares (`SharedSamples`); a
real device holds ids into its own slots (`OwnedSamples`). Everything above sees ids only, so the
same replay buffer is an index list here and stored pixels there.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """What a training step sees.

    Attributes:
        x: Inputs [B, ...], float32, normalized.
        y: Labels [B], int64.
        weight: Weight of each sample in the loss [B], float32, summing to 1; None is the mean.
        mask: Classes that the sample's task allows [B, C], bool (task-incremental only).
        places: Where the last R samples lie in the memory that they were drawn from [R], int64;
            the first B - R are the device's present ones. None if all are.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    mask: Tensor | None = None
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_past(self) -> int:
        """Samples drawn from memory, R."""
        return 0 if self.places is None else len(self.places)

    @property
    def present(self) -> Batch:
        """The samples that are not from memory, as a batch of their own, weighted alike."""
        return self._part(slice(0, len(self) - self.num_past), None)

    @property
    def past(self) -> Batch:
        """The samples from memory, as a batch of their own, weighted alike."""
        return self._part(slice(len(self) - self.num_past, len(self)), self.places)

    def _part(self, rows: slice, places: Tensor | None) -> Batch:
        mask = None if self.mask is None else self.mask[rows]
        return Batch(self.x[rows], self.y[rows], None, mask, places)

    def join(self, other: Batch | None, *, share: float | None = None) -> Batch:
        """Append `other`, as replay does.

        Args:
            other: What to append; None and an empty batch change nothing.
            share: The part of the loss that `other` gets, in [0, 1], weighted within each part as
                it was; None weighs all samples alike.
        """
        if other is None or len(other) == 0:
            return self
        if len(self) == 0:
            return other
        weight = None
        if share is not None:
            weight = torch.cat([(1.0 - share) * self._weights(), share * other._weights()])
        mask = None
        if self.mask is not None and other.mask is not None:
            mask = torch.cat([self.mask, other.mask])
        x, y = torch.cat([self.x, other.x]), torch.cat([self.y, other.y])
        return Batch(x, y, weight, mask, other.places)

    def split(self, size: int) -> list[Batch]:
        """Return consecutive batches of `size` samples, the last maybe smaller; without weights."""
        xs, ys = torch.split(self.x, size), torch.split(self.y, size)
        if self.mask is None:
            return [Batch(x, y) for x, y in zip(xs, ys, strict=True)]
        masks = torch.split(self.mask, size)
        return [Batch(x, y, None, m) for x, y, m in zip(xs, ys, masks, strict=True)]

    def _weights(self) -> Tensor:
        return torch.full((len(self),), 1.0 / len(self)) if self.weight is None else self.weight


class SampleStore(Protocol):
    """Where sample ids lead to."""

    @property
    def sample_bytes(self) -> int:
        """Bytes that one stored sample costs a device."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    def labels(self, ids: Tensor) -> Tensor:
        """Return the labels [n], int64."""

    def batch(self, ids: Tensor) -> Batch:
        """Gather samples [n] and normalize them."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How stored samples become inputs: x = (stored * scale - mean) / std.

    Attributes:
        scale: Factor of the stored numbers.
        mean: Subtracted after scaling.
        std: Divisor.
        task_masks: For task-incremental streams, classes allowed beside each label [C, C], bool.
    """

    scale: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    task_masks: Tensor | None = None

    def decode(self, stored: Tensor, labels: Tensor) -> Batch:
        """Return the batch of stored samples [n, ...] and labels [n]."""
        x = stored.to(torch.float32, copy=True)  # a copy even where samples are float32 already
        x.mul_(self.scale / self.std).sub_(self.mean / self.std)
        mask = self.task_masks[labels] if self.task_masks is not None else None
        return Batch(x, labels, None, mask)


@dataclass(frozen=True, slots=True)
class Domains:
    """Domains as weighted re-samplings of the features: x'[f] = sum_t weight[t, f] x[index[t, f]].

    A permutation has one tap, a bilinear rotation four.

    Attributes:
        index: [D, taps, F], int64.
        weight: [D, taps, F], float32.
    """

    index: Tensor
    weight: Tensor

    def apply(self, stored: Tensor, domain: Tensor) -> Tensor:
        """Return samples [n, ...] as seen in their domains [n], in the stored dtype."""
        flat = stored.flatten(1)
        if self.index.shape[1] == 1:
            return flat.gather(1, self.index[domain, 0]).view_as(stored)
        out = torch.zeros(flat.shape, dtype=torch.float32)
        for tap in range(self.index.shape[1]):
            out += self.weight[domain, tap] * flat.gather(1, self.index[domain, tap])
        if not stored.is_floating_point():
            out.round_()
        return out.to(stored.dtype).view_as(stored)


class SharedSamples:
    """One data set for a whole simulated fleet; an id is domain * N + index."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        encoding: Encoding,
        domains: Domains | None = None,
        meanings: Tensor | None = None,
    ) -> None:
        """Take a data set.

        Args:
            x: Samples [N, ...], as they are stored.
            y: Labels [N], int64.
            encoding: How stored samples become inputs.
            domains: What samples look like in each domain.
            meanings: What a label is called in each domain [M, C], int64.
        """
        self.x, self.y = x, y
        self.encoding = encoding
        self.domains, self.meanings = domains, meanings

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def sample_bytes(self) -> int:
        """Bytes of one stored sample, with one byte for the label."""
        return math.prod(self.sample_shape) * self.x.element_size() + 1

    def labels(self, ids: Tensor) -> Tensor:
        """Return the labels [n], int64."""
        ids = ids.to(torch.int64)
        labels = self.y[ids % len(self.y)]
        if self.meanings is None:
            return labels
        return self.meanings[torch.div(ids, len(self.y), rounding_mode="floor"), labels]

    def stored(self, ids: Tensor) -> Tensor:
        """Return samples [n, ...] as a device stores them, before normalization."""
        ids = ids.to(torch.int64)
        base = self.x.index_select(0, ids % len(self.y))
        if self.domains is None:
            return base
        return self.domains.apply(base, torch.div(ids, len(self.y), rounding_mode="floor"))

    def batch(self, ids: Tensor) -> Batch:
        """Gather samples [n] and normalize them."""
        return self.encoding.decode(self.stored(ids), self.labels(ids))


class OwnedSamples:
    """Samples in a device's own slots; an id is a slot, and unreferenced slots are freed."""

    def __init__(self, x: Tensor, y: Tensor, encoding: Encoding) -> None:
        self.x, self.y = x, y
        self.encoding = encoding
        self._used = torch.ones(len(y), dtype=torch.bool)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def sample_bytes(self) -> int:
        """Bytes of one stored sample, with one byte for the label."""
        return math.prod(self.sample_shape) * self.x.element_size() + 1

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, encoding: Encoding) -> OwnedSamples:
        """Return a store without samples."""
        x = torch.empty((0, *shape), dtype=dtype)
        return cls(x, torch.empty(0, dtype=torch.int64), encoding)

    @classmethod
    def restore(cls, x: Tensor, y: Tensor, used: Tensor, encoding: Encoding) -> OwnedSamples:
        """Return a store as it was saved: slots, labels and which of them are in use."""
        store = cls(x, y, encoding)
        store._used = used.to(torch.bool)
        return store

    @property
    def used(self) -> Tensor:
        """Which slots hold a sample [n], bool."""
        return self._used

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Store samples [n, ...] with labels [n]; return their ids [n], int32."""
        free = (~self._used).nonzero().flatten()[: len(y)]
        short = len(y) - len(free)
        if short > 0:
            start = len(self.y)
            self.x = torch.cat([self.x, self.x.new_zeros((short, *self.x.shape[1:]))])
            self.y = torch.cat([self.y, torch.zeros(short, dtype=torch.int64)])
            self._used = torch.cat([self._used, torch.zeros(short, dtype=torch.bool)])
            free = torch.cat([free, torch.arange(start, start + short)])
        self.x[free], self.y[free] = x, y.to(torch.int64)
        self._used[free] = True
        return free.to(torch.int32)

    def retain(self, ids: Tensor) -> None:
        """Forget every sample that is not in `ids`."""
        keep = torch.zeros_like(self._used)
        keep[ids[ids != EMPTY].to(torch.int64)] = True
        self._used &= keep
        self.x[~self._used] = 0  # what is forgotten is gone, not merely unreferenced
        self.y[~self._used] = 0

    def labels(self, ids: Tensor) -> Tensor:
        """Return the labels [n], int64."""
        return self.y[ids.to(torch.int64)]

    def batch(self, ids: Tensor) -> Batch:
        """Gather samples [n] and normalize them."""
        ids = ids.to(torch.int64)
        return self.encoding.decode(self.x[ids], self.y[ids])


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples of a store: what a device has of one experience.

    Attributes:
        store: Where the ids lead.
        ids: [n], int32.
    """

    store: SampleStore
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        """Labels [n], int64."""
        return self.store.labels(self.ids)

    @property
    def fingerprint(self) -> int:
        """A number above 0 that other samples of the store, or another order, hardly have."""
        raw = self.ids.to(torch.int64).numpy().tobytes()
        digest = hashlib.blake2b(raw, digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1 | 1

    def batch(self, positions: Tensor | slice = slice(None)) -> Batch:
        """Gather the samples at some positions, or all of them."""
        return self.store.batch(self.ids[positions])
