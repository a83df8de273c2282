"""Activation ranges that outlive a model: observed anew only when they no longer fit.

A device that learns serves new weights again and again, and most of the time its activations stay
where they were. A few of its samples show whether they do; only if not, ranges are observed on all
of its calibration samples. Ranges may also widen with what is seen after training, so that fewer
drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import Observed, Predictor, Prepared, RangedPrepared, Runtime

Recalibrate = Literal["always", "on-drift"]
NAN = float("nan")
Pair = tuple[Tensor, Tensor]
COLUMNS = 4  # of a table: a range on all samples, and on the probe


@final
@dataclass(frozen=True, slots=True)
class Probe:
    """Some of the calibration samples, and what they have to show for ranges to be kept.

    With the range [l, h] of a place as it was observed, and [l', h'] that of the probe with the new
    weights, ranges have drifted if at any place

    - h' > h + b (h - l), or l' < l - b (h - l): activations would be cut off; or
    - h' - l' < f (h0 - l0), the probe's own range when [l, h] was observed: steps would be coarser
      than needed, by 1 / f.

    So what is served is within these bounds of what observing anew would give, on the probe; what
    other samples do is not looked at.

    Args:
        num_samples: Samples of a probe, at least 1.
        most_beyond: b, at least 0.
        least_filled: f, in [0, 1).
    """

    num_samples: int = 8
    most_beyond: float = 0.05
    least_filled: float = 0.5

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.most_beyond < 0 or not 0 <= self.least_filled < 1:
            raise ValueError(
                f"num_samples is {self.num_samples}, most_beyond {self.most_beyond}, least_filled "
                f"{self.least_filled}; allowed: at least 1, at least 0, and [0, 1)"
            )

    def among(self, count: int) -> Tensor:
        """Return the places of a probe among so many samples, spread over all of them."""
        size = min(self.num_samples, count)
        return torch.arange(size) * count // max(size, 1)

    def fits(self, table: Tensor, now: Tensor) -> Tensor:
        """Return whether ranges hold for new weights [...], bool; not if a number is not finite.

        Args:
            table: Ranges on all samples, and on the probe then [..., n, 4].
            now: Those of the probe with the new weights [..., n, 2].
        """
        low, high, least_then, most_then = table.unbind(-1)
        least, most = now.unbind(-1)
        slack = self.most_beyond * (high - low)
        is_inside = (most <= high + slack) & (least >= low - slack)
        fills = most - least >= self.least_filled * (most_then - least_then)
        return (is_inside & fills).all(-1)


PROBE = Probe()


@final
@dataclass(frozen=True, slots=True)
class Places:
    """Where a runtime observes ranges in a network, so that tensors can hold them.

    Attributes:
        shape: Of one input.
        names: What the runtime calls the places, n.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, runtime: Runtime, model: FlatModel, shape: tuple[int, ...]) -> Places:
        """Find out, with the network's initial parameters and one input of zeros.

        A runtime without ranges (`float`) has no places.
        """
        model.module.eval()
        with torch.no_grad():
            prepared = runtime.prepare(model, model.initial())
            if not isinstance(prepared, RangedPrepared):
                return cls(shape, ())
            return cls(shape, tuple(prepared.observed(torch.zeros(1, *shape)).ranges))

    def hold(self, observed: Observed) -> bool:
        """Return whether ranges were observed at these places and no others."""
        known = {n for n, (low, high) in observed.ranges.items() if not bool((high < low).all())}
        return observed.shape == self.shape and known == set(self.names)

    def pack(self, observed: Observed) -> Tensor:
        """Return ranges as a tensor [n, 2]; those of D devices [D, n, 2]."""
        pairs = [torch.stack(observed.ranges[name], -1) for name in self.names]
        return torch.stack(pairs, -2) if pairs else torch.empty(0, 2)

    def unpack(self, ranges: Tensor) -> Observed:
        """Return what `pack` was given."""
        pairs = zip(self.names, ranges.unbind(-2), strict=True)
        return Observed(self.shape, {name: (own[..., 0], own[..., 1]) for name, own in pairs})


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """The ranges that a device has from models before.

    Attributes:
        places: Where they are.
        table: The range on all calibration samples when they were observed, and that of the probe
            then [n, 4], float32: lowest and highest of each. There may be rows behind these.
        num_observed: How often they were observed on all of them; 0 if there are none yet.
        probe: When they are kept.
    """

    places: Places
    table: Tensor
    num_observed: int = 0
    probe: Probe = PROBE

    @classmethod
    def none(cls, places: Places, *, probe: Probe = PROBE) -> Kept:
        """Return those of a device that has observed nothing yet."""
        return cls(places, torch.zeros(len(places.names), COLUMNS), probe=probe)

    @property
    def ranges(self) -> Tensor:
        """Ranges on all calibration samples [n, 2]."""
        return self.table[: len(self.places.names), :2]

    def fits(self, now: Observed) -> bool:
        """Return whether they hold for new weights with these ranges of the probe."""
        if not self.num_observed or not self.places.hold(now):
            return False
        table = self.table[: len(self.places.names)]
        return bool(self.probe.fits(table, self.places.pack(now)))

    def after(self, ranges: Tensor, now: Tensor) -> Kept:
        """Return what is kept once ranges [n, 2] were observed on all samples and the probe."""
        table = self.table.clone()
        table[: len(self.places.names)] = torch.cat([ranges, now], -1)
        return replace(self, table=table, num_observed=self.num_observed + 1)

    def widened(self, now: Observed) -> Kept | None:
        """Return ranges that hold what a probe spans, too; None if nothing is to change.

        Those of the probe then are widened with them, so that both bounds of `Probe` still say what
        they say. Numbers that are not finite are left to the next evaluation.
        """
        if not self.num_observed or not self.places.hold(now):
            return None
        table, seen = self.table.clone(), self.places.pack(now)
        rows = table[: len(self.places.names)]
        rows[:, 0::2] = torch.minimum(rows[:, 0::2], seen[:, :1])
        rows[:, 1::2] = torch.maximum(rows[:, 1::2], seen[:, 1:])
        if torch.equal(table, self.table) or not bool(torch.isfinite(table).all()):
            return None
        return replace(self, table=table)


def calibrated(
    prepared: Prepared, calibration: Tensor, kept: Kept | None
) -> tuple[Predictor, Kept | None]:
    """Return the predictor of new parameters, and what is kept if ranges were observed anew.

    Ranges at other places than before (a network may take another way for other inputs) hold for
    nothing but the new parameters.

    Args:
        prepared: The parameters.
        calibration: The device's own inputs [n, ...]; with none, its ranges stay as they are and
            are not used.
        kept: Its ranges; None if it keeps none.
    """
    if kept is None or not isinstance(prepared, RangedPrepared) or not len(calibration):
        return prepared.calibrated(calibration), None
    now = prepared.observed(calibration[kept.probe.among(len(calibration))])
    return _calibrated(prepared, calibration, kept, now)


def _calibrated(
    prepared: RangedPrepared, calibration: Tensor, kept: Kept, now: Observed
) -> tuple[Predictor, Kept | None]:
    if kept.fits(now):
        return prepared.within(kept.places.unpack(kept.ranges)), None
    observed = prepared.observed(calibration)
    pair = [_or_unknown(kept.places, found) for found in (observed, now)]
    return prepared.within(observed), kept.after(*pair)


def _or_unknown(places: Places, observed: Observed, *lead: int) -> Tensor:
    if places.hold(observed):
        return places.pack(observed)
    return torch.full((*lead, len(places.names), 2), NAN)


def of_group(
    kept: Sequence[Kept], now: Observed, observe: Callable[[Sequence[int]], Observed]
) -> tuple[Observed, list[Kept | None]]:
    """Return the ranges [D] that a group is served within, and what devices keep that drifted.

    Args:
        kept: What each device keeps; all have the same places.
        now: Of their probes [D]; of a device without samples it is unknown, and stays so.
        observe: Observes the ranges of some devices on all of their samples, in one pass.
    """
    places, probe = kept[0].places, kept[0].probe
    seen = torch.stack([~(high < low) for low, high in now.ranges.values()]).any(0)
    fits = torch.tensor([device.num_observed > 0 for device in kept])
    tables = torch.stack([device.table[: len(places.names)] for device in kept])
    is_same = places.hold(now)
    fits = fits & probe.fits(tables, places.pack(now)) if is_same else torch.zeros_like(fits)
    drifted = seen & ~fits
    unknown = torch.full((len(kept),), float("inf"))
    ranges = dict.fromkeys(now.ranges, (unknown, -unknown))
    if is_same:
        before = places.unpack(tables[..., :2]).ranges
        ranges |= {n: _where(seen, before[n], ranges[n]) for n in places.names}
    new: list[Kept | None] = [None] * len(kept)
    if some := drifted.nonzero().flatten().tolist():
        fresh = observe(some)
        ranges = {n: _where(drifted, fresh.ranges[n], ranges[n]) for n in ranges}
        pairs = [_or_unknown(places, found, len(kept)) for found in (fresh, now)]
        for k in some:
            new[k] = kept[k].after(*(pair[k] for pair in pairs))
    return Observed(now.shape, ranges), new


def _where(which: Tensor, yes: Pair, no: Pair) -> Pair:
    return torch.where(which, yes[0], no[0]), torch.where(which, yes[1], no[1])


@final
class KeptRanges:
    """The ranges of one device in one process, from one model to the next.

    A runtime without ranges (`float`) has none to keep.

    Args:
        probe: When they are kept.
    """

    def __init__(self, probe: Probe = PROBE) -> None:
        self._probe = probe
        self._kept = Kept.none(Places((), ()), probe=probe)

    @property
    def num_observed(self) -> int:
        """How often ranges were observed on all calibration samples."""
        return self._kept.num_observed

    def predictor(self, prepared: Prepared, calibration: Tensor) -> Predictor:
        """Return the predictor of new parameters.

        Args:
            prepared: The parameters.
            calibration: The device's own inputs [n, ...]; with none, its ranges stay as they are.
        """
        if not isinstance(prepared, RangedPrepared) or not len(calibration):
            return prepared.calibrated(calibration)
        now, kept = prepared.observed(calibration[self._probe.among(len(calibration))]), self._kept
        if not kept.places.hold(now):  # none yet, or another network's
            places = Places(now.shape, tuple(now.ranges))
            kept = replace(kept, places=places, table=torch.full((len(now.ranges), COLUMNS), NAN))
        predictor, new = _calibrated(prepared, calibration, kept, now)
        self._kept = kept if new is None else new
        return predictor
