"""What the figures share: axes in percent, boundaries of experiences, labels at the ends of lines.

All of these are called inside `theme.look`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelearn.report import formats, results
from edgelearn.report.theme import color

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from edgelearn.federated.record import RunRecord

_MOST_DOTS = 400  # devices, beyond which a line says more


@dataclass(frozen=True, slots=True)
class End:
    """The last value of a line, what is written beside it, and the line's colour."""

    y: float
    text: str
    color: str


def percent_axis(axes: Axes, limits: tuple[float, float] | None = None) -> None:
    """Write ratios as percentages on the vertical axis, with a grid; limits are ratios."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
    if limits is not None:
        axes.set_ylim(*limits)


def _percent_tick(value: float, _: object) -> str:
    return f"{100 * value:.3g}%".replace("-", "\N{MINUS SIGN}")


def mark_boundaries(axes: Axes, record: RunRecord, *, name: str) -> None:
    """Mark where one experience ends and the next begins; with a name, write it above."""
    from matplotlib.ticker import MaxNLocator

    spans = results.spans(record)
    for span in spans[1:]:
        axes.axvline(span.first - 0.5, c=color("rule"), lw=0.8, ls=(0, (2, 2)), zorder=0.5)
    last = spans[-1].last if spans else 1
    for span in spans if name else ():
        start, end = max(0.0, span.first - 0.5), min(float(last), span.last + 0.5)
        share = (end - start) / last
        if share >= 0.02:  # else too narrow even for a number
            text = f"{name} {span.position}" if share >= 0.1 else str(span.position)
            axes.annotate(
                text, ((start + end) / 2, 1), (0, 4), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", ha="center", color=color("muted"), size=8,
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlim(-0.01 * last, last * 1.01)


def label_ends(axes: Axes, ends: Sequence[End], *, heading: str = "") -> None:
    """Write each line's name beside its end, moved apart where they would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    height_pt = axes.get_window_extent().height * 72 / axes.figure.dpi
    size = 8.5 if len(ends) <= 14 else 6.5
    gap = min(1.35 * size / height_pt, 1 / len(ends)) * (high - low)
    ends = sorted(ends, key=lambda end: end.y)
    places = _moved_apart([end.y for end in ends], gap, low + gap / 4, high - gap / 2)
    for end, y in zip(ends, places, strict=True):
        axes.annotate(
            end.text, (right, y), (6, 0), textcoords="offset points", va="center_baseline",
            color=end.color, size=size, annotation_clip=False,
        )  # fmt: skip
    if heading:
        axes.annotate(
            heading, (1, 1), (6, 4), xycoords="axes fraction", textcoords="offset points",
            color=color("muted"), size=8,
        )  # fmt: skip
    axes.set_ylim(low, high)


def _moved_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return sorted values moved apart by at least a gap, each group around its own mean."""
    groups: list[list[float]] = []
    starts: list[float] = []
    for value in values:
        group = [value]
        while True:
            length = (len(group) - 1) * gap
            start = max(low, min(sum(group) / len(group) - length / 2, high - length))
            if not groups or starts[-1] + len(groups[-1]) * gap <= start:
                break
            group = groups.pop() + group
            starts.pop()
        groups.append(group)
        starts.append(start)
    return [
        start + k * gap
        for start, group in zip(starts, groups, strict=True)
        for k in range(len(group))
    ]


def draw_sorted(axes: Axes, values: NDArray[np.float64]) -> None:
    """Draw a value of each device, given worst first, with the mean and the worst tenth."""
    if len(values) == 0:
        say_if_empty(axes, is_empty=True)
        return
    percent_axis(axes)
    axes.spines["bottom"].set_visible(False)
    x = np.arange(1, len(values) + 1)
    tenth = max(1, len(values) // 10)
    is_worst = x <= tenth
    mean, worst = float(values.mean()), float(values[is_worst].mean())
    if len(values) <= _MOST_DOTS:
        size = 26 if len(values) <= 100 else 9
        axes.scatter(x[~is_worst], values[~is_worst], s=size, color=color("served"), lw=0, zorder=3)
        axes.scatter(x[is_worst], values[is_worst], s=size, color=color("worst"), lw=0, zorder=3)
    else:
        axes.plot(x, values, c=color("served"))
        axes.plot(x[is_worst], values[is_worst], c=color("worst"), lw=2.6)
    axes.axhline(mean, c=color("served"), lw=1, ls=(0, (4, 2)), zorder=2)
    axes.set_xticks([])
    axes.margins(y=0.12)
    edge = 0.6 + 0.015 * len(values)
    axes.set_xlim(1 - edge, len(values) + edge)
    last = len(values)
    box = {"fc": color("card"), "lw": 0, "pad": 0.5}
    rises = bool(values[-1] >= values[0])  # notes go where no dots are
    axes.annotate(
        f"mean {formats.percent(mean)}", (1 if rises else last, mean), (0, 4),
        textcoords="offset points", ha="left" if rises else "right", bbox=box,
        color=color("served"),
    )  # fmt: skip
    axes.annotate(
        f"worst tenth {formats.percent(worst)}", (tenth, worst), (9, -1),
        textcoords="offset points", va="top" if rises else "bottom", bbox=box,
        color=color("worst"),
    )  # fmt: skip


def say_if_empty(axes: Axes, *, is_empty: bool) -> None:
    """Leave nothing but a word where there is nothing to draw; the last call for its axes."""
    if is_empty:
        axes.clear()
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.text(
            0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", va="center",
            color=color("muted"),
        )  # fmt: skip
