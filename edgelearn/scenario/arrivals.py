"""Which training samples reach which device at which position of its stream.

Sample ids are sorted by device and position, so that what a device has at a position is a slice,
and so is what it has had up to then; many devices' slices are found by array arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelearn.scenario.partition import Indices
from edgelearn.scenario.presence import Presence
from edgelearn.scenario.stream import Stream
from edgelearn.seeds import numpy_generator

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Samples by device and position.

    Attributes:
        ids: Of the whole fleet [n], int32.
        starts: Where those of device d and position p begin, at d * T + p [D * T + 1]; where every
            position has the same samples in a domain of its own, at d [D + 1].
        num_positions: T, or 1 where every position has the same samples.
    """

    ids: NDArray[np.int32]
    starts: Integers
    num_positions: int

    def bounds(
        self, devices: Integers, first: Integers, last: Integers
    ) -> tuple[Integers, Integers]:
        """Return where the samples of devices begin and end, from one position to another.

        Args:
            devices: [K].
            first: First position [K].
            last: Last position [K]; none are there where it is before the first.
        """
        base = devices * self.num_positions
        if self.num_positions == 1:
            starts, ends = self.starts[base], self.starts[base + 1]
        else:
            starts, ends = self.starts[base + first], self.starts[base + last + 1]
        return starts, np.where(last >= first, ends, starts)


@dataclass(frozen=True, slots=True)
class _Table:
    """Samples, each with the device, the experience and the time of its arrival; arrays [n].

    `time` is that within the position, which matters where a position is mixed.
    """

    index: Integers
    owner: Integers
    experience: Integers
    position: Integers
    domain: Integers
    time: NDArray[np.float64]


def arrivals(
    parts: Sequence[Indices],
    labels: Integers,
    stream: Stream,
    *,
    experiences: Integers | None,
    orders: Integers | None,
    told: Integers,
    has_label: NDArray[np.bool_],
    per_class: int,
) -> Arrivals:
    """Sort the training samples of all devices.

    Args:
        parts: Indices of each device's samples, in random order.
        labels: True labels of the data set [N].
        stream: The stream.
        experiences: Which experience has each sample [N]; None where that is decided by device.
        orders: Experiences of each device in its order [D, T]; None if all share one.
        told: Labels as devices are told them [N].
        has_label: Which samples have one [N].
        per_class: Most labelled samples of a class at a position; 0 is no limit.
    """
    index, owner = _owned(parts)
    if not _is_listed(stream):
        keep = np.flatnonzero(has_label[index])
        keep = keep[_among_first(owner[keep], told[index[keep]], per_class)]
        starts = np.searchsorted(owner[keep], np.arange(len(parts) + 1))
        return Arrivals(index[keep].astype(np.int32), starts, 1)
    T, table = stream.num_experiences, _table(index, owner, labels, stream, experiences, orders)
    keys = table.owner * T + table.position
    # By time within a position where that means something, else as they were dealt out.
    order = np.lexsort((table.time, keys)) if _is_mixed(stream) else np.argsort(keys, kind="stable")
    order = order[has_label[table.index[order]]]
    order = order[_among_first(keys[order], told[table.index[order]], per_class)]
    ids = table.index[order] + table.domain[order] * len(labels)
    starts = np.searchsorted(keys[order], np.arange(len(parts) * T + 1))
    return Arrivals(ids.astype(np.int32), starts, T)


def first_met(
    parts: Sequence[Indices],
    labels: Integers,
    stream: Stream,
    *,
    experiences: Integers | None,
    orders: Integers | None,
    presence: Presence | None,
) -> Integers:
    """Return the position at which device d first meets experience e [D, T]; -1 is never.

    Samples without a label count. Arguments as for `arrivals`, and when devices are there.
    """
    T = stream.num_experiences
    index, owner = _owned(parts)
    if _is_listed(stream):
        table = _table(index, owner, labels, stream, experiences, orders)
        owner, experience, position = table.owner, table.experience, table.position
    else:  # one sample speaks for all of a device
        owner = np.flatnonzero(np.bincount(owner, minlength=len(parts)))
        owner, experience = np.repeat(owner, T), np.tile(np.arange(T), len(owner))
        position = _position(orders, owner, experience)
    if presence is not None:
        there = (presence.joins[owner] <= position) & (position < presence.leaves[owner])
        owner, experience, position = owner[there], experience[there], position[there]
    found = np.full((len(parts), T), T, np.int64)
    np.minimum.at(found, (owner, experience), position)
    return np.where(found < T, found, -1)


def domain_of(stream: Stream, experience: Integers) -> Integers:
    """Return the domain of each experience [n]; under gradual drift that of most samples."""
    if stream.spec.drift == "recurring":
        return experience % stream.num_domains
    return experience * stream.num_domains // stream.num_experiences


def drifted(
    stream: Stream, time: NDArray[np.float64], index: Integers, num_samples: int
) -> Integers:
    """Return the domain in which each sample appears under gradual drift [n].

    Domain m is pure at the middle of its share of the stream, that is at time (m + 1/2) T / M;
    between two such times the share of the later one grows linearly. The first domain is pure up to
    its middle, the last one from its middle on.

    Args:
        stream: T experiences and M domains.
        time: Experience of each sample and the time within it, in [0, T) [n].
        index: Of each sample in the data set [n].
        num_samples: Samples of the data set.
    """
    M, T = stream.num_domains, stream.num_experiences
    # Each sample moves on at its own share of the later domain, evenly spread over the data set.
    order = numpy_generator(stream.seed, "drift", num_samples).permutation(num_samples)
    between = np.clip(time * M / T - 0.5, 0, M - 1)
    moved_on = np.floor(between + order[index] / num_samples)
    return np.minimum(moved_on, M - 1).astype(np.int64)


def _is_listed(stream: Stream) -> bool:
    """Whether each position has a list of its own; else all have the same samples, in domains."""
    return _is_mixed(stream) or stream.spec.cumulative or not stream.has_domains


def _is_mixed(stream: Stream) -> bool:
    """Whether a position has samples of several domains or experiences that come one by one."""
    return stream.spec.blur > 0 or stream.spec.drift == "gradual"


def _owned(parts: Sequence[Indices]) -> tuple[Integers, Integers]:
    """Return indices of samples and their devices [n]."""
    index = np.concatenate([*parts, np.empty(0, np.int32)]).astype(np.int64)
    return index, np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def _position(orders: Integers | None, owner: Integers, experience: Integers) -> Integers:
    """Return where in their devices' orders experiences are [n]."""
    return experience if orders is None else np.argsort(orders, axis=1)[owner, experience]


def _table(
    index: Integers,
    owner: Integers,
    labels: Integers,
    stream: Stream,
    experiences: Integers | None,
    orders: Integers | None,
) -> _Table:
    """List each arrival: once for each sample, or for each sample and domain."""
    T = stream.num_experiences
    if stream.has_domains:
        experience = np.repeat(np.arange(T), len(index))
        index, owner = np.tile(index, T), np.tile(owner, T)
    elif experiences is not None:
        experience = experiences[index]
    else:  # new instances: equal parts of what a device holds
        sizes = np.bincount(owner)
        rank = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]
        experience = rank * T // sizes[owner]
    position = _position(orders, owner, experience)
    time = np.zeros(0)
    if _is_mixed(stream):
        time = numpy_generator(stream.seed, "arrival").random(len(index))
    domain = np.zeros(len(index), np.int64)
    if stream.spec.drift == "gradual":
        domain = drifted(stream, experience + time, index, len(labels))
    elif stream.has_domains:
        domain = domain_of(stream, experience)
    if stream.spec.blur > 0:
        position, time = _blurred(stream, position, time, _moves(stream, labels[index]))
    return _Table(index, owner, experience, position, domain, time)


def _moves(stream: Stream, labels: Integers) -> NDArray[np.bool_]:
    """Return which samples may arrive with another experience [n]: not those of disjoint classes.

    Koh, Kim, Ha, Choi, "Online Continual Learning on Class Incremental Blurry Task Configuration
    with Anytime Inference", ICLR 2022, arXiv:2110.10031: N percent of the classes are disjoint.
    """
    order = numpy_generator(stream.seed, "disjoint").permutation(stream.num_classes)
    disjoint = order[: round(stream.spec.disjoint_share * stream.num_classes)]
    return ~np.isin(labels, disjoint)


def _blurred(
    stream: Stream, home: Integers, u: NDArray[np.float64], moves: NDArray[np.bool_]
) -> tuple[Integers, NDArray[np.float64]]:
    """Return where samples arrive, and when within that position, both [n].

    With neighbours, half of the share goes to the experience before and half to the one after (at
    the ends what would go beyond stays). Among its neighbours an experience decays linearly with
    time, from the boundary on and up to it.

    Args:
        stream: Share and reach.
        home: Position of a sample's own experience [n].
        u: Drawn from [0, 1) [n].
        moves: Which samples may move [n].
    """
    T, share = stream.num_experiences, stream.spec.blur
    if stream.spec.blur_reach == "all":
        leaves = moves & (u < share)
        # What is left of u in its interval is uniform again, and serves as the next draw.
        rest = u / share * (T - 1)
        other = (home + 1 + np.minimum(rest.astype(np.int64), T - 2)) % T
        time = np.where(leaves, rest % 1, (u - share) / max(1 - share, 1e-9))
        return np.where(leaves, other, home), np.where(moves, time, u)
    half = share / 2
    low, high = half * (moves & (home > 0)), 1 - half * (moves & (home < T - 1))
    back, on = u < low, u >= high
    time = np.clip((u - low) / np.maximum(high - low, 1e-9), 0, 1)
    time = np.where(back, np.sqrt(u / half), time)
    time = np.where(on, 1 - np.sqrt(np.clip((1 - u) / half, 0, 1)), time)
    return home - back + on, time


def _among_first(groups: Integers, names: Integers, limit: int) -> Integers:
    """Return the places of the first `limit` samples of each name within each group, ascending."""
    if limit == 0:
        return np.arange(len(groups))
    order = np.lexsort((np.arange(len(groups)), names, groups))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(groups[order]) != 0) | (np.diff(names[order]) != 0)
    first = np.flatnonzero(new)
    rank = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    return np.sort(order[rank < limit])
