"""The figures of a run, each a function of its record.

They need matplotlib (the extra `report`), which is imported when a figure is drawn, and use its
object-oriented interface: no pyplot, no display, no global state. Titles are the page's business.

Example::

    figure = draw_accuracy_matrix(RunRecord.read("runs/split-digits"))
    Path("matrix.svg").write_text(render_svg(figure))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelearn.report import formats, results
from edgelearn.report.theme import NUM_SERIES, color, look, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from edgelearn.federated.record import Model, RunRecord

_FULL, _WIDE, _NARROW = 10.0, 5.6, 3.9  # inches; the page shows 100 pixels for each
_TALL, _LOW = 3.6, 2.9
_MOST_MARKERS = 80  # points of a line, beyond which markers would hide it
_MOST_NUMBERS = 16  # experiences, beyond which a cell is too small for its number
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def draw_all(record: RunRecord) -> dict[str, Figure]:
    """Draw every figure of a run, by name, in the order of the page.

    Raises:
        ExtraMissingError: If matplotlib is not installed.
    """
    return {
        "matrix": draw_accuracy_matrix(record),
        "average": draw_seen_average(record),
        "experiences": draw_experiences(record),
        "devices": draw_devices(record),
        "bytes": draw_bytes(record),
        "models": draw_models(record),
    }


def draw_accuracy_matrix(record: RunRecord) -> Figure:
    """Draw the served model's accuracy matrix: a row per step, a column per experience."""
    R, T = record.matrix("served"), record.num_experiences
    figure = new_figure(width=_NARROW, height=_TALL)
    with look():
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        font_size = min(8.5, 52 / T)
        for (i, j), value in np.ndenumerate(R):
            if np.isnan(value):
                continue
            shade = (color("heat"), 0.03 + 0.97 * float(value))
            axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fc=shade, lw=0))
            if T <= _MOST_NUMBERS:
                ink = color("on-heat" if value > 0.5 else "ink")
                text = f"{100 * value:.0f}"
                axes.text(j, i, text, c=ink, size=font_size, ha="center", va="center_baseline")
        if record.run["orders"] is None:
            for i in range(T):
                if not np.isnan(R[i, i]):
                    outline = Rectangle((i - 0.47, i - 0.47), 0.94, 0.94, fill=False, lw=1.3)
                    outline.set_edgecolor(color("ink"))
                    axes.add_patch(outline)
        ticks = range(0, T, 1 + T // (_MOST_NUMBERS + 1))
        axes.set(
            xlim=(-0.5, T - 0.5),
            ylim=(T - 0.5, -0.5),
            xticks=ticks,
            yticks=ticks,
            xlabel="accuracy on experience (%)",
            ylabel="after learning" if record.run["orders"] is None else "after step",
        )
        axes.spines[:].set_visible(False)
        _say_if_empty(axes, is_empty=bool(np.isnan(R).all()))
    return figure


def draw_seen_average(record: RunRecord) -> Figure:
    """Draw the average accuracy on the experiences met so far, served and float, over rounds."""
    figure = new_figure(width=_WIDE, height=_TALL)
    with look():
        axes = figure.subplots()
        ends: list[_End] = []
        for model in reversed(results.MODELS):  # the served model on top
            rounds, means = results.seen_average(record, model)
            axes.plot(rounds, means, c=color(model), **_markers(rounds, 3.2))
            if len(rounds):
                name = _model_name(record, model)
                text = f"{name} {formats.percent(means[-1])}"
                ends.append((float(rounds[-1]), float(means[-1]), text, color(model)))
        _boundaries(axes, record, name="")
        _percent_axis(axes)
        axes.set_xlabel("round")
        axes.set_ylabel("average accuracy on what was seen")
        _label_ends(axes, ends)
        _say_if_empty(axes, is_empty=not ends)
    return figure


def draw_experiences(record: RunRecord) -> Figure:
    """Draw the served accuracy on each experience over rounds; faint before it was learned."""
    rounds, values = results.curves(record, "served")
    figure = new_figure(width=_FULL, height=_TALL)
    reached = results.spans(record)
    first_round = {span.position: span.first for span in reached}
    with look():
        axes = figure.subplots()
        ends: list[_End] = []
        for e in range(record.num_experiences):
            c, dashes = color(f"series-{e % NUM_SERIES}"), _DASHES[e // NUM_SERIES % len(_DASHES)]
            known = ~np.isnan(values[:, e])
            x, y = rounds[known], values[known, e]
            since = first_round.get(e, np.inf) if record.run["orders"] is None else 0
            learned = x >= since
            before = x <= (x[learned][0] if learned.any() else np.inf)
            axes.plot(x[before], y[before], c=c, lw=1, alpha=0.4, ls=dashes)
            axes.plot(x[learned], y[learned], c=c, lw=1.7, ls=dashes, **_markers(rounds, 3))
            if len(x):
                label = f"{e} ({formats.classes(record.run['classes'][e])})"
                ends.append((float(x[-1]), float(y[-1]), label, c))
        _boundaries(axes, record, name="experience" if record.run["orders"] is None else "step")
        _percent_axis(axes, (-0.03, 1.03))
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy on an experience")
        _label_ends(axes, ends, heading="experience (classes)")
        _say_if_empty(axes, is_empty=not ends)
    return figure


def draw_devices(record: RunRecord) -> Figure:
    """Draw each device's final accuracy and forgetting, sorted, with the mean and worst tenth."""
    final = _sorted_known(results.final_by_device(record, "served"))
    forgotten = _sorted_known(results.forgetting_by_device(record, "served"))
    figure = new_figure(width=_FULL, height=_LOW)
    with look():
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.1})
        _draw_sorted(left, final)
        left.set_ylabel("final accuracy of a device")
        left.set_xlabel("devices, worst first")
        right.axhline(0, c=color("rule"), lw=0.8)
        _draw_sorted(right, forgotten[::-1])
        right.set_ylabel("forgetting of a device")
        right.set_xlabel("devices, most forgetful first")
    return figure


def draw_bytes(record: RunRecord) -> Figure:
    """Draw the bytes that crossed the wire so far, up and down, over rounds."""
    figure = new_figure(width=_NARROW, height=_LOW)
    with look():
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = figure.subplots()
        ends: list[_End] = []
        for direction in results.DIRECTIONS:
            rounds, total = results.cumulative_bytes(record, direction)
            c = color(direction)
            axes.plot(rounds, total, c=c)
            axes.fill_between(rounds, total, color=c, alpha=0.07, lw=0)
            text = f"{direction} {formats.size(float(total[-1]))}"
            ends.append((float(rounds[-1]), float(total[-1]), text, c))
        _boundaries(axes, record, name="")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.round_size(value)))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("round")
        axes.set_ylabel("bytes so far, all devices")
        _label_ends(axes, ends)
    return figure


def draw_models(record: RunRecord) -> Figure:
    """Draw what the served model costs in accuracy, by experience, and saves in bytes."""
    T, run = record.num_experiences, record.run
    final = {model: record.matrix(model)[-1] for model in results.MODELS}
    figure = new_figure(width=_WIDE, height=_LOW)
    with look():
        left, right = figure.subplots(1, 2, width_ratios=[2.6, 1], gridspec_kw={"wspace": 0.08})
        x = np.arange(T)
        left.vlines(x, final["float"], final["served"], color=color("rule"), lw=2.5)
        for model in reversed(results.MODELS):
            size, name = 26 if model == "served" else 60, _model_name(record, model)
            left.scatter(x, final[model], size, color=color(model), lw=0, zorder=3, label=name)
        left.set_xlim(-0.5, T - 0.5)
        left.set_xticks(range(0, T, 1 + T // 13))
        left.set_xlabel("experience")
        left.set_ylabel("final accuracy")
        _percent_axis(left)
        left.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0,
            handletextpad=0.2, columnspacing=1.2, labelcolor=color("muted"),
        )  # fmt: skip
        _say_if_empty(left, is_empty=bool(np.isnan(list(final.values())).all()))
        for place, model in enumerate(results.MODELS):
            num_bytes = run["model_bytes"][model]
            right.bar(place, num_bytes, 0.62, color=color(model))
            right.annotate(
                formats.size(num_bytes), (place, num_bytes), (0, 3),
                textcoords="offset points", ha="center", color=color("ink"),
            )  # fmt: skip
        right.set_xticks([0, 1], results.MODELS)
        right.set_xlim(-0.6, 1.6)
        right.set_yticks([])
        right.margins(y=0.12)
        right.set_xlabel("bytes of the model")
    return figure


# -- parts -----------------------------------------------------------------------------------------

_End = tuple[float, float, str, str]  # x, y, text, colour


def _model_name(record: RunRecord, model: Model) -> str:
    return "float" if model == "float" else f"served ({record.run['runtime']})"


def _markers(rounds: NDArray[np.int64], size: float) -> dict[str, Any]:
    few = len(rounds) <= _MOST_MARKERS
    return {"marker": "o" if few else "", "markersize": size, "markeredgewidth": 0}


def _percent_axis(axes: Axes, limits: tuple[float, float] | None = None) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    if limits is not None:
        axes.set_ylim(*limits)


def _boundaries(axes: Axes, record: RunRecord, *, name: str) -> None:
    """Mark where one experience ends and the next begins; with a name, write it above."""
    from matplotlib.ticker import MaxNLocator

    spans = results.spans(record)
    for span in spans[1:]:
        axes.axvline(span.first - 0.5, c=color("rule"), lw=0.8, ls=(0, (2, 2)), zorder=0.5)
    if name:
        for span in spans[:: 1 + len(spans) // 20]:
            text = f"{name} {span.position}" if len(spans) <= 10 else str(span.position)
            middle = (span.first + span.last) / 2
            axes.annotate(
                text, (middle, 1), (0, 4), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", ha="center", color=color("muted"), size=8,
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    last = spans[-1].last if spans else 1
    axes.set_xlim(-0.01 * last, last * 1.01)


def _label_ends(axes: Axes, ends: Sequence[_End], *, heading: str = "") -> None:
    """Write each line's name beside its end, moved apart where they would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    height_pt = axes.get_window_extent().height * 72 / axes.figure.dpi
    size = 8.5 if len(ends) <= 14 else 6.5
    gap = min(1.35 * size / height_pt, 1 / max(1, len(ends) - 1)) * (high - low)
    order = sorted(range(len(ends)), key=lambda k: ends[k][1])
    places = _moved_apart([ends[k][1] for k in order], gap, low, high)
    for k, y in zip(order, places, strict=True):
        text, c = ends[k][2:]
        axes.annotate(
            text, (right, y), (6, 0), textcoords="offset points", va="center_baseline",
            color=c, size=size, annotation_clip=False,
        )  # fmt: skip
    if heading:
        axes.annotate(
            heading, (1, 1), (6, 4), xycoords="axes fraction", textcoords="offset points",
            color=color("muted"), size=8,
        )  # fmt: skip
    axes.set_ylim(low, high)


def _moved_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return sorted values moved apart by at least a gap, within limits."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else max(value, low))
    ceiling = high
    for k in reversed(range(len(places))):
        places[k] = min(places[k], ceiling)
        ceiling = places[k] - gap
    return places


def _draw_sorted(axes: Axes, values: NDArray[np.float64]) -> None:
    _percent_axis(axes)
    axes.spines["bottom"].set_visible(False)
    _say_if_empty(axes, is_empty=len(values) == 0)
    if len(values) == 0:
        return
    x = np.arange(1, len(values) + 1)
    tenth = max(1, len(values) // 10)
    is_worst = x <= tenth
    mean, worst = float(values.mean()), float(values[is_worst].mean())
    if len(values) <= 400:
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
    box = {"fc": color("card"), "lw": 0, "pad": 0.5}
    rises = bool(values[-1] >= values[0])  # notes go where no dots are
    axes.annotate(
        f"mean {formats.percent(mean)}", (1 if rises else len(values), mean), (0, 4),
        textcoords="offset points", ha="left" if rises else "right", color=color("served"), bbox=box,
    )  # fmt: skip
    axes.annotate(
        f"worst tenth {formats.percent(worst)}", (tenth, worst), (9, -1),
        textcoords="offset points", va="top" if rises else "bottom", color=color("worst"), bbox=box,
    )  # fmt: skip


def _sorted_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sort(values[~np.isnan(values)])


def _say_if_empty(axes: Axes, *, is_empty: bool) -> None:
    if is_empty:
        axes.text(
            0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", va="center",
            color=color("muted"),
        )  # fmt: skip
