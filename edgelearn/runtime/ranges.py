"""Activation ranges that outlive a model: observed anew only when they no longer fit.

A device that learns serves new weights again and again, and most of the time its activations stay
where they were. A few of its samples show whether they do; only if not, ranges are observed on all
of its calibration samples.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from edgelearn.runtime.protocol import Observed, Predictor, Prepared, RangedPrepared

Recalibrate = Literal["always", "on-drift"]
_NUM_PROBES = 8
_MOST_BEYOND = 0.05
_LEAST_FILLED = 0.5


@final
class KeptRanges:
    """The ranges of one device, from one model to the next.

    A probe is some of the calibration samples. With the range [l, h] of a place as it was observed,
    and [l', h'] that of the probe with the new weights, ranges have drifted if at any place

    - h' > h + b (h - l), or l' < l - b (h - l): activations would be cut off; or
    - h' - l' < f (h0 - l0), the probe's own range when [l, h] was observed: steps would be coarser
      than needed, by 1 / f.

    So what is served is within these bounds of what observing anew would give, on the probe; what
    other samples do is not looked at. A runtime without ranges (`float`) has none to keep.

    Args:
        num_probes: Samples of a probe, at least 1.
        most_beyond: b, at least 0.
        least_filled: f, in [0, 1).

    Attributes:
        num_observed: How often ranges were observed on all calibration samples.
    """

    def __init__(
        self,
        *,
        num_probes: int = _NUM_PROBES,
        most_beyond: float = _MOST_BEYOND,
        least_filled: float = _LEAST_FILLED,
    ) -> None:
        if num_probes < 1 or most_beyond < 0 or not 0 <= least_filled < 1:
            raise ValueError(
                f"num_probes is {num_probes}, most_beyond {most_beyond}, least_filled "
                f"{least_filled}; allowed: at least 1, at least 0, and [0, 1)"
            )
        self.num_observed = 0
        self._num_probes, self._beyond, self._filled = num_probes, most_beyond, least_filled
        self._kept: tuple[Observed, Observed] | None = None  # on all samples, on the probe

    def predictor(self, prepared: Prepared, calibration: Tensor) -> Predictor:
        """Return the predictor of new parameters.

        Args:
            prepared: The parameters.
            calibration: The device's own inputs [n, ...]; with none, nothing is kept.
        """
        if not isinstance(prepared, RangedPrepared) or not len(calibration):
            self._kept = None
            return prepared.calibrated(calibration)
        places = torch.arange(min(self._num_probes, len(calibration))) * len(calibration)
        probe = prepared.observed(calibration[places // min(self._num_probes, len(calibration))])
        if self._kept is None or self._has_drifted(*self._kept, probe):
            self._kept = prepared.observed(calibration), probe
            self.num_observed += 1
        return prepared.within(self._kept[0])

    def _has_drifted(self, kept: Observed, then: Observed, now: Observed) -> bool:
        if kept.shape != now.shape or kept.ranges.keys() != now.ranges.keys():
            return True
        for name, (low, high) in kept.ranges.items():
            width = high - low
            least, most = now.ranges[name]
            before = then.ranges[name]
            fits = (most <= high + self._beyond * width) & (least >= low - self._beyond * width)
            fills = most - least >= self._filled * (before[1] - before[0])
            if not bool(fits & fills):  # also if a number is not finite
                return True
        return False
