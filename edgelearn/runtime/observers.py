"""How the range of activations is taken from a device's calibration samples.

A range wider than what most activations need makes all codes coarser; a narrower one cuts some off.

- `min-max`: lowest and highest value.
- `percentile`: what p percent of the values lie below, and what as many lie above (by nearest
  rank), so that rare outliers are cut off. Wu et al., "Integer Quantization for Deep Learning
  Inference: Principles and Empirical Evaluation", 2020, arXiv:2004.09602.
- `moving-average`: each sample's own lowest and highest value, averaged exponentially over samples
  in their order, r <- (1 - a) r + a r_i. Jacob et al., "Quantization and Training of Neural
  Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section
  3.1 (there over batches, while training).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from edgelearn.errors import nearest
from edgelearn.runtime.protocol import Rows

Pair = tuple[Tensor, Tensor]
See = Callable[[str, Tensor], None]  # called with a place and a value there [n, ...]
Observe = Callable[[Tensor, See], None]  # runs the float network on inputs [n, ...]


class Observer(ABC):
    """Takes a range from values."""

    @abstractmethod
    def range_of(self, values: Tensor) -> Pair:
        """Return lowest and highest value [] that codes stand for, of values [n, ...], n >= 1."""


@final
@dataclass(frozen=True, slots=True)
class MinMax(Observer):
    """All values fit."""

    def range_of(self, values: Tensor) -> Pair:
        """Return lowest and highest value."""
        low, high = torch.aminmax(values)
        return low, high


@final
@dataclass(frozen=True, slots=True)
class Percentile(Observer):
    """The rarest values are cut off.

    Args:
        percent: p, in (50, 100]; with 100 all values fit.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not _is_number(self.percent) or not 50 < self.percent <= 100:
            raise ValueError(f"percentile is {self.percent!r}; allowed: above 50, and at most 100")

    def range_of(self, values: Tensor) -> Pair:
        """Return the value of rank ceil(p n / 100) from below, and from above."""
        flat = values.flatten()
        # More than half of them, however close to 50 p is: rounded, it may seem to be none more.
        rank = max(math.ceil(round(self.percent / 100 * len(flat), 6)), len(flat) // 2 + 1)
        high = flat.kthvalue(rank).values
        return flat.kthvalue(len(flat) + 1 - rank).values, high


@final
@dataclass(frozen=True, slots=True)
class MovingAverage(Observer):
    """What single samples need, on average; later ones count more.

    Args:
        rate: a, in (0, 1]; with 1 the last sample alone counts.
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        if not _is_number(self.rate) or not 0 < self.rate <= 1:
            raise ValueError(f"averaging is {self.rate!r}; allowed: above 0, and at most 1")

    def range_of(self, values: Tensor) -> Pair:
        """Return the averages of samples' lowest and highest values."""
        rows = values.flatten(1)
        ages = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
        weights = self.rate * (1 - self.rate) ** ages
        weights[0] = (1 - self.rate) ** (len(rows) - 1)  # where the average began
        low, high = ((weights @ part.double()).float() for part in (rows.amin(1), rows.amax(1)))
        return low, high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


ARGUMENTS = ("calibration", "percentile", "averaging")  # of runtimes, see `make_observer`
METHODS = ("min-max", "percentile", "moving-average")


def make_observer(
    calibration: str = "min-max",
    *,
    percentile: float | None = None,
    averaging: float | None = None,
) -> Observer:
    """Return the observer of a name.

    Args:
        calibration: One of `METHODS`.
        percentile: Of that one, 99.99 if None.
        averaging: Rate of the moving average, 0.1 if None.

    Raises:
        ValueError: If there is none, or a number is given to another, or is out of range.
    """
    if calibration not in METHODS:
        raise ValueError(
            f"calibration is {calibration!r}{nearest(str(calibration), METHODS)}; there are "
            f"{', '.join(METHODS)}"
        )
    for name, value, owner in (
        ("percentile", percentile, "percentile"),
        ("averaging", averaging, "moving-average"),
    ):
        if value is not None and calibration != owner:
            raise ValueError(
                f"{name} is an argument of calibration {owner!r}; calibration is {calibration!r}"
            )
    if calibration == "percentile":
        return Percentile() if percentile is None else Percentile(percentile)
    if calibration == "moving-average":
        return MovingAverage() if averaging is None else MovingAverage(averaging)
    return MinMax()


def ranges_of(observe: Observe, x: Tensor, observer: Observer) -> dict[str, Pair]:
    """Return the range of each place for inputs [n, ...]; that of all its uses, where it has more.

    Args:
        observe: Shows the values of inputs.
        x: One device's inputs, n >= 1.
        observer: Takes the ranges.
    """
    found: dict[str, Pair] = {}

    def see(place: str, values: Tensor) -> None:
        low, high = observer.range_of(values)
        if place in found:  # a layer that is used twice
            low, high = torch.minimum(low, found[place][0]), torch.maximum(high, found[place][1])
        found[place] = low, high

    observe(x, see)
    return found


def ranges_of_group(
    observe: Observe,
    parts: Iterable[Rows],
    observer: Observer,
    *,
    places: Iterable[str],
    num_devices: int,
) -> dict[str, Pair]:
    """Return the range of each place for each device [D]; of one without rows (inf, -inf).

    Lowest and highest values are found in one pass over all devices' rows; any other range needs a
    device's values together, so devices take turns.

    Args:
        observe: Shows the values of inputs, of any devices.
        parts: The devices' inputs.
        observer: Takes the ranges.
        places: All places.
        num_devices: D.
    """
    low = {place: torch.full((num_devices,), float("inf")) for place in places}
    high = {place: torch.full((num_devices,), float("-inf")) for place in low}
    if not isinstance(observer, MinMax):
        rows = list(parts)
        x, owner = torch.cat([part.x for part in rows]), torch.cat([part.device for part in rows])
        for device in sorted(set(owner.tolist())):
            for place, pair in ranges_of(observe, x[owner == device], observer).items():
                low[place][device], high[place][device] = pair
        return {place: (low[place], high[place]) for place in low}
    for part in parts:
        owner = part.device

        def see(place: str, values: Tensor, owner: Tensor = owner) -> None:
            rows = values.flatten(1)  # amin and amax apart are faster than aminmax in a dimension
            low[place].scatter_reduce_(0, owner, rows.amin(1), "amin")
            high[place].scatter_reduce_(0, owner, rows.amax(1), "amax")

        if len(part.x):
            observe(part.x, see)
    return {place: (low[place], high[place]) for place in low}
