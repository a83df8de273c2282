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
from edgelearn.report.axes import (
    End,
    draw_sorted,
    label_ends,
    mark_boundaries,
    percent_axis,
    say_if_empty,
)
from edgelearn.report.theme import NUM_SERIES, color, look, new_figure

if TYPE_CHECKING:
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
                ink = color("on-heat" if value > 0.78 else "ink")
                text = f"{100 * value:.0f}"
                axes.text(j, i, text, c=ink, size=font_size, ha="center", va="center_baseline")
        if record.run["orders"] is None:
            for i in range(T):
                if not np.isnan(R[i, i]):
                    outline = Rectangle(
                        (i - 0.47, i - 0.47), 0.94, 0.94, fill=False, lw=min(1.3, 14 / T)
                    )
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
        say_if_empty(axes, is_empty=bool(np.isnan(R).all()))
    return figure


def draw_seen_average(record: RunRecord) -> Figure:
    """Draw the average accuracy on the experiences met so far, served and float, over rounds."""
    figure = new_figure(width=_WIDE, height=_TALL)
    with look():
        axes = figure.subplots()
        ends: list[End] = []
        for model in reversed(results.MODELS):  # the served model on top
            rounds, means = results.seen_average(record, model)
            axes.plot(rounds, means, c=color(model), **_markers(rounds, 3.2))
            known = means[~np.isnan(means)]
            if len(known):
                text = f"{_model_name(record, model)} {formats.percent(known[-1])}"
                ends.append(End(float(known[-1]), text, color(model)))
        mark_boundaries(axes, record, name="")
        percent_axis(axes)
        axes.set_xlabel("round")
        axes.set_ylabel("average accuracy on what was seen")
        label_ends(axes, ends)
        say_if_empty(axes, is_empty=not ends)
    return figure


def draw_experiences(record: RunRecord) -> Figure:
    """Draw the served accuracy on each experience over rounds; faint before it was learned."""
    rounds, values = results.curves(record, "served")
    figure = new_figure(width=_FULL, height=_TALL)
    reached = results.spans(record)
    first_round = {span.position: span.first for span in reached}
    with look():
        axes = figure.subplots()
        ends: list[End] = []
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
                ends.append(End(float(y[-1]), label, c))
        mark_boundaries(axes, record, name="experience" if record.run["orders"] is None else "step")
        percent_axis(axes, (-0.03, 1.03))
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy on an experience")
        label_ends(axes, ends, heading="experience (classes)")
        say_if_empty(axes, is_empty=not (rounds > 0).any())
    return figure


def draw_devices(record: RunRecord) -> Figure:
    """Draw each device's final accuracy and forgetting, sorted, with the mean and worst tenth."""
    final = _sorted_known(results.final_by_device(record, "served"))
    forgotten = _sorted_known(results.forgetting_by_device(record, "served"))
    figure = new_figure(width=_FULL, height=_LOW)
    with look():
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.1})
        left.set_ylabel("final accuracy of a device")
        left.set_xlabel("devices, worst first")
        draw_sorted(left, final)
        right.set_ylabel("forgetting of a device")
        right.set_xlabel("devices, most forgetful first")
        right.axhline(0, c=color("rule"), lw=0.8)
        draw_sorted(right, forgotten[::-1])
    return figure


def draw_bytes(record: RunRecord) -> Figure:
    """Draw the bytes that crossed the wire so far, up and down, over rounds."""
    totals = {way: results.cumulative_bytes(record, way) for way in results.DIRECTIONS}
    divisor, unit = formats.size_unit(max(float(total[-1]) for _, total in totals.values()))
    figure = new_figure(width=_NARROW, height=_LOW)
    with look():
        axes = figure.subplots()
        ends: list[End] = []
        for way, (rounds, total) in totals.items():
            y, c = total / divisor, color(way)
            axes.plot(rounds, y, c=c)
            axes.fill_between(rounds, y, color=c, alpha=0.07, lw=0)
            ends.append(End(float(y[-1]), f"{way} {formats.size(float(total[-1]))}", c))
        mark_boundaries(axes, record, name="")
        axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("round")
        axes.set_ylabel(f"{unit} so far, all devices")
        label_ends(axes, ends)
        say_if_empty(axes, is_empty=not record.rounds)
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
        percent_axis(left)
        left.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0,
            handletextpad=0.2, columnspacing=1.2, labelcolor=color("muted"),
        )  # fmt: skip
        say_if_empty(left, is_empty=bool(np.isnan(list(final.values())).all()))
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


def _model_name(record: RunRecord, model: Model) -> str:
    return "float" if model == "float" else f"served ({record.run['runtime']})"


def _markers(rounds: NDArray[np.int64], size: float) -> dict[str, Any]:
    few = len(rounds) <= _MOST_MARKERS
    return {"marker": "o" if few else "", "markersize": size, "markeredgewidth": 0}


def _sorted_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sort(values[~np.isnan(values)])
