"""Which samples a full buffer keeps: pure functions over ids."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from edgelearn.scenario.samples import EMPTY


def reservoir(ids: Tensor, num_seen: int, arriving: Tensor, generator: Generator) -> Tensor:
    """Reservoir sampling: each sample ever seen is kept with the same probability.

    Reference: Vitter, "Random Sampling with a Reservoir", ACM TOMS 11(1), 1985, algorithm R.

    Args:
        ids: Buffer [capacity], int32, -1 where empty; filled from the front.
        num_seen: Samples that arrived before.
        arriving: Ids of new samples [n], int32.
        generator: Source of randomness.

    Returns:
        The new buffer [capacity].
    """
    out = ids.clone()
    capacity = len(out)
    order = torch.arange(num_seen, num_seen + len(arriving))
    draws = torch.rand(len(arriving), generator=generator, dtype=torch.float64)
    places = torch.where(order < capacity, order, (draws * (order + 1)).to(torch.int64))
    for place, sample in zip(places.tolist(), arriving.tolist(), strict=True):
        if place < capacity:
            out[place] = sample
    return out


def class_balanced(
    ids: Tensor,
    labels: Tensor,
    seen_by_class: Tensor,
    arriving: Tensor,
    arriving_labels: Tensor,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Class-balancing reservoir: the largest class gives way, within a class a reservoir.

    Reference: Chrysakis and Moens, "Online Continual Learning from Imbalanced Data", ICML 2020.

    Args:
        ids: Buffer [capacity], int32, -1 where empty; filled from the front.
        labels: Labels of the buffer [capacity], int64; ignored where empty.
        seen_by_class: Samples of each class that arrived before [C], int64.
        arriving: Ids of new samples [n], int32.
        arriving_labels: Their labels [n], int64.
        generator: Source of randomness.

    Returns:
        The new buffer [capacity] and the new counts [C].
    """
    out, seen = ids.tolist(), seen_by_class.tolist()
    held: list[list[int]] = [[] for _ in seen]
    for place, label in enumerate(labels.tolist()):
        if out[place] != EMPTY:
            held[label].append(place)
    free = [place for place, sample in enumerate(out) if sample == EMPTY][::-1]
    # "Full" classes were once the largest: only those ever lose samples, so that none is lost
    # means not full, and the flag need not be stored between calls.
    was_full = [len(places) < count for places, count in zip(held, seen, strict=True)]
    sizes = [len(places) for places in held]
    draws = torch.rand((len(arriving), 2), generator=generator, dtype=torch.float64).tolist()
    for sample, label, (first, second) in zip(
        arriving.tolist(), arriving_labels.tolist(), draws, strict=True
    ):
        seen[label] += 1
        if free:
            place = free.pop()
            held[label].append(place)
            sizes[label] += 1
            out[place] = sample
            continue
        if not out:
            continue
        size = max(sizes)
        for c, count in enumerate(sizes):
            if count == size:
                was_full[c] = True
        if not was_full[label]:
            largest = sizes.index(size)
            place = held[largest].pop(int(first * size))
            held[label].append(place)
            sizes[largest] -= 1
            sizes[label] += 1
            out[place] = sample
        elif first * seen[label] < sizes[label]:
            place = held[label][int(second * sizes[label])]
            out[place] = sample
    return (
        torch.tensor(out, dtype=torch.int32),
        torch.tensor(seen, dtype=torch.int64),
    )


def herding(features: Tensor, count: int, *, mean: Tensor | None = None) -> Tensor:
    """Herding: samples whose mean comes nearest to that of their class, in order of choice.

    The k-th is argmin_x |mean - (phi(x) + sum_{j<k} phi(p_j)) / k|, of those not chosen yet. So the
    first of them are a good choice of that many, too: a buffer shrinks by dropping the last.

    Reference: Rebuffi, Kolesnikov, Sperl, Lampert, "iCaRL: Incremental Classifier and
    Representation Learning", CVPR 2017, arXiv:1611.07725, algorithm 4.

    Args:
        features: phi of one class's samples [n, d]; iCaRL's have length 1.
        count: Samples wanted; as many as there are if fewer.
        mean: The mean to come near to [d]; None is that of `features`.

    Returns:
        Places of the samples [min(n, count)], int64.
    """
    target = features.mean(0) if mean is None else mean
    chosen: list[int] = []
    total = torch.zeros_like(target)
    is_free = torch.ones(len(features), dtype=torch.bool)
    for k in range(1, min(len(features), count) + 1):
        distances = (target - (features + total) / k).square().sum(1)
        place = int(distances.masked_fill(~is_free, float("inf")).argmin())
        chosen.append(place)
        is_free[place] = False
        total = total + features[place]
    return torch.tensor(chosen, dtype=torch.int64)


def quotas(available: Tensor, capacity: int) -> Tensor:
    """Return how many samples of each class a buffer has room for, as evenly as can be.

    Args:
        available: Samples of each class that there are [C], int64.
        capacity: Room for so many.

    Returns:
        [C], int64, each at most what is available. What can't be dealt out evenly goes to the
        lowest labels that have more.

    Example:
        >>> quotas(torch.tensor([9, 1, 0, 9]), 8)
        tensor([4, 1, 0, 3])
    """
    level = torch.zeros_like(available)
    left = min(capacity, int(available.sum()))
    while left > 0:
        wanting = (available > level).nonzero().flatten()
        share = max(1, left // len(wanting))
        wanting = wanting[: left if share == 1 else len(wanting)]
        more = torch.minimum(available[wanting] - level[wanting], torch.tensor(share))
        level[wanting] += more
        left -= int(more.sum())
    return level
