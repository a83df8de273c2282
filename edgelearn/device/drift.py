"""Detectors of change in a stream of numbers, such as a model's errors, one after another.

Both look for a rise of the mean alone: that errors become fewer is what learning is for. They keep
nothing themselves: a state goes in and comes out, an array of fixed size that a device can store.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import Fault, ScenarioError

State = NDArray[np.float64]


class Detector(Protocol):
    """Finds where the mean of a stream rises."""

    @property
    def size(self) -> int:
        """Numbers in its state."""

    def update(self, state: State, values: State) -> tuple[State, list[int]]:
        """Look at the next values.

        Args:
            state: What came out last [size]; zeros at first. It is not changed.
            values: The next values [n].

        Returns:
            The new state, and at which of the values a rise was noticed.
        """


@final
class PageHinkley:
    """The Page-Hinkley test: values exceed their mean for too long.

    With m_t = alpha m_{t-1} + x_t - mean_t - delta, there is a rise where m_t - min m > threshold.
    Errors are 0 or 1, so the threshold is about the number of errors in a row that it takes. After
    an alarm it starts anew.

    References: Page, "Continuous Inspection Schemes", Biometrika 41, 1954; Sebastiao and Fernandes,
    "Supporting the Page-Hinkley Test with Empirical Mode Decomposition", 2017.

    Args:
        threshold: lambda, above 0.
        delta: Excess that is put up with, at least 0; the smaller, the more false alarms.
        alpha: How much of the past counts, in (0, 1].
        min_samples: Values before the first alarm, at least 1.

    Example:
        >>> detector = PageHinkley(threshold=3.0, min_samples=5)
        >>> _, alarms = detector.update(np.zeros(4), np.array([0.0] * 20 + [1.0] * 5))
        >>> alarms
        [23]
    """

    size = 4

    def __init__(
        self,
        *,
        threshold: float = 10.0,
        delta: float = 0.1,
        alpha: float = 0.9999,
        min_samples: int = 30,
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold is {threshold}; must be above 0")
        if not delta >= 0:
            raise ValueError(f"delta is {delta}; at least 0 is allowed")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}; allowed: above 0, at most 1")
        if min_samples < 1:
            raise ValueError(f"min_samples is {min_samples}; at least 1 is allowed")
        self.threshold, self.delta, self.alpha = threshold, delta, alpha
        self.min_samples = min_samples

    def update(self, state: State, values: State) -> tuple[State, list[int]]:
        """Look at the next values; see `Detector.update`."""
        count, mean, total, least = state.tolist()
        alarms = []
        for place, value in enumerate(values.tolist()):
            count += 1
            mean += (value - mean) / count
            total = self.alpha * total + value - mean - self.delta
            least = min(least, total) if count > 1 else total
            if count >= self.min_samples and total - least > self.threshold:
                alarms.append(place)
                count, mean, total, least = 0.0, 0.0, 0.0, 0.0
        return np.array([count, mean, total, least]), alarms


@final
class Adwin:
    """ADWIN2: a window that grows while its mean holds, and drops its older part when it does not.

    The window is cut where two parts of it, of n0 and n1 values, differ in their means by more than
    sqrt(2 v d / m) + 2 d / (3 m), with v the variance of the window, 1/m = 1/n0 + 1/n1,
    d = ln(2 ln(W) / confidence) and W its length. It is kept as an exponential histogram: at most 5
    buckets of each size 2^k, so 2 KiB stand for millions of values.

    Reference: Bifet and Gavalda, "Learning from Time-Changing Data with Adaptive Windowing", SDM
    2007, section 4 and equation 3.1. We differ: all of the older part goes at once, where theirs
    loses bucket after bucket; and a fall of the mean cuts the window, but is no alarm.

    Args:
        confidence: delta, the chance of a false alarm where nothing changes, in (0, 1).
        min_part: Fewest values in a part, at least 1.
        every: Values between two looks at all parts, at least 1.
    """

    _MOST, _ROWS = 5, 24

    def __init__(self, *, confidence: float = 0.002, min_part: int = 5, every: int = 1) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; allowed: above 0 and below 1")
        if min_part < 1:
            raise ValueError(f"min_part is {min_part}; at least 1 is allowed")
        if every < 1:
            raise ValueError(f"every is {every}; at least 1 is allowed")
        self.confidence, self.min_part, self.every = confidence, min_part, every

    @property
    def size(self) -> int:
        """Numbers in its state: values since the last look, and of each row its buckets."""
        return 1 + self._ROWS * (1 + 2 * self._MOST)

    def update(self, state: State, values: State) -> tuple[State, list[int]]:
        """Look at the next values; see `Detector.update`."""
        since, rows = int(state[0]), self._unpack(state[1:])
        alarms = []
        for place, value in enumerate(values.tolist()):
            self._append(rows, value)
            since += 1
            if since >= self.every:
                since = 0
                if self._shrink(rows):
                    alarms.append(place)
        return np.concatenate([[since], self._pack(rows)]), alarms

    def width(self, state: State) -> int:
        """Return the length of the window."""
        rows = self._unpack(state[1:])
        return sum(len(row) << level for level, row in enumerate(rows))

    # A row is a list of buckets (sum, sum of squares), the oldest first; row k has 2^k values each.

    def _append(self, rows: list[list[tuple[float, float]]], value: float) -> None:
        rows[0].append((value, value * value))
        for level in range(self._ROWS):
            row = rows[level]
            if len(row) <= self._MOST:
                return
            first, second = row.pop(0), row.pop(0)
            if level + 1 < self._ROWS:  # beyond the last row, the oldest are forgotten
                rows[level + 1].append((first[0] + second[0], first[1] + second[1]))

    def _shrink(self, rows: list[list[tuple[float, float]]]) -> bool:
        """Drop the older part while the window has two different ones; say if the mean rose."""
        has_risen = False
        while (cut := self._cut(rows)) is not None:
            rise, num_older = cut
            has_risen |= rise > 0
            for _ in range(num_older):
                next(row for row in reversed(rows) if row).pop(0)
        return has_risen

    def _cut(self, rows: list[list[tuple[float, float]]]) -> tuple[float, int] | None:
        """Return where two parts differ most, if they do: by how much, and the older buckets."""
        levels = [level for level in reversed(range(self._ROWS)) for _ in rows[level]]
        buckets = [bucket for row in reversed(rows) for bucket in row]
        if len(buckets) < 2:
            return None
        sizes = np.exp2(levels)
        sums, squares = np.array(buckets).T
        width, total = sizes.sum(), sums.sum()
        n0, s0 = np.cumsum(sizes)[:-1], np.cumsum(sums)[:-1]
        n1, s1 = width - n0, total - s0
        mean = total / width
        variance = max(squares.sum() / width - mean * mean, 0.0)
        d = math.log(2 * max(math.log(width), 1.0) / self.confidence)
        reciprocal = 1 / n0 + 1 / n1
        limit = np.sqrt(2 * variance * d * reciprocal) + 2 / 3 * d * reciprocal
        rise = s1 / n1 - s0 / n0
        excess = np.where(np.minimum(n0, n1) >= self.min_part, np.abs(rise) - limit, -1.0)
        most = int(excess.argmax())
        return (float(rise[most]), most + 1) if excess[most] > 0 else None

    def _pack(self, rows: list[list[tuple[float, float]]]) -> State:
        out = np.zeros((self._ROWS, 1 + 2 * self._MOST))
        for level, row in enumerate(rows):
            flat = [number for bucket in row for number in bucket]
            out[level, : 1 + len(flat)] = [len(row), *flat]
        return out.reshape(-1)

    def _unpack(self, packed: State) -> list[list[tuple[float, float]]]:
        rows = []
        for line in packed.reshape(self._ROWS, -1).tolist():
            numbers = line[1 : 1 + 2 * int(line[0])]
            rows.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
        return rows


DETECTORS: Mapping[str, type[PageHinkley] | type[Adwin]] = {
    "adwin": Adwin,
    "page-hinkley": PageHinkley,
}


def make_detector(name: str, arguments: Mapping[str, Any]) -> Detector:
    """Build a detector by name.

    Raises:
        ScenarioError: If it does not take the arguments.
    """
    kind = DETECTORS[name]
    known = inspect.signature(kind).parameters
    if unknown := [key for key in arguments if key not in known]:
        message = f"{name} takes {', '.join(known)}"
        raise ScenarioError(name, [Fault("stream.detector_args", key, message) for key in unknown])
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError(name, [Fault("stream", "detector_args", str(error))]) from error
