"""How the time of a round and the peak of memory grow, and what binds."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from harness import results, world
from harness.results import Options

from parts import comparison

WORKLOAD = "scaling"
DEVICES, COHORT, HIDDEN, SAMPLES = 1000, 20, 200, 20  # the point that all axes go through
AXES = {
    "devices": (500, 1000, 4000, 10000),
    "cohort": (10, 20, 40, 80),
    "parameters": (50, 100, 200, 400),  # units in each of two hidden layers
    "samples per device": (10, 20, 40, 80),
}
PLOT = "scaling.png"


def overrides(axis: str, value: int) -> dict[str, Any]:
    """Return the values of a scenario at a point of an axis."""
    devices = value if axis == "devices" else DEVICES
    samples = value if axis == "samples per device" else SAMPLES
    hidden = value if axis == "parameters" else HIDDEN
    return {
        "fleet.num_devices": devices,
        "fleet.cohort": value if axis == "cohort" else COHORT,
        "data.max_train": devices * samples,
        "model.args": {"hidden": [hidden, hidden]},
    }


def measure(options: Options) -> dict[str, Any]:
    """Measure four sizes along each of four axes, with the fastest engine there is."""
    tier, way = comparison.best()
    axes = {axis: (sizes[:2] if options.quick else sizes) for axis, sizes in AXES.items()}
    runs: dict[str, results.Run] = {
        comparison.GEMM: partial(comparison.gemm, seconds=0.3 if options.quick else 1.0)
    }
    points = {}
    for axis, sizes in axes.items():
        for value in sizes:
            changed = overrides(axis, value)
            found = world.facts(WORKLOAD, changed)
            x = found.parameters if axis == "parameters" else value
            points[f"{axis} {value}"] = {"axis": axis, "x": x}
            runs[f"{axis} {value}"] = partial(
                comparison.ours,
                WORKLOAD,
                tier,
                way,
                budget_s=0.2 if options.quick else 1.0,
                rounds=3,
                overrides=changed,
                interval_s=0.1,
            )
    config = {
        "workload": world.scenario(WORKLOAD).as_dict(),
        "engine": comparison.name_of(tier, way),
        "points": points,
        "command": "python benchmarks/engines.py --only scaling",
    }
    count = 1 if options.quick else min(3, options.repetitions)
    return results.repeat(WORKLOAD, runs, options, config=config, repetitions=count)


def line(result: dict[str, Any], axis: str, field: str) -> dict[str, Any] | None:
    """Return the points of an axis and the line of least squares through them."""
    points = result["config"]["points"]
    found = [
        (point["x"], results.median(results.values(result, name, field)))
        for name, point in points.items()
        if point["axis"] == axis
    ]
    known = [(x, y) for x, y in found if y is not None]
    if len(known) < 2:
        return None
    x, y = (np.array(column, float) for column in zip(*known, strict=True))
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1 - (residual**2).sum() / spread if spread > 0 else float("nan")
    return {"x": x, "y": y, "slope": slope, "intercept": intercept, "r2": r2}


def base(axis: str, result: dict[str, Any]) -> float:
    """Return where on an axis the common point lies."""
    if axis == "parameters":
        return float(result["config"]["points"][f"parameters {HIDDEN}"]["x"])
    return {"devices": DEVICES, "cohort": COHORT, "samples per device": SAMPLES}[axis]


def binds(result: dict[str, Any]) -> str:
    """Say what the time of a round at the common point consists of."""
    parts = []
    for axis in AXES:
        fit = line(result, axis, "round_ms")
        if fit is None:
            continue
        try:
            at = base(axis, result)
        except KeyError:  # not among the points of a quick run
            continue
        whole = fit["intercept"] + fit["slope"] * at
        if whole > 0:
            share = min(max(100 * fit["slope"] * at / whole, 0), 100)
            parts.append(f"{share:.0f} % grow with {axis}")
    peaks = results.ratio(result, "gflops", f"cohort {COHORT}", comparison.GEMM)
    text = f"At the common point, by these lines: of a round's time {', '.join(parts)}."
    if peaks is not None:
        percent = 100 * peaks[0]
        bound = "arithmetic" if percent >= 50 else "overhead and memory traffic, not arithmetic"
        text += f" It runs at {percent:.2g} % of the sgemm peak: what binds is {bound}."
    return text


def section(result: dict[str, Any]) -> str:
    """Return the table, the verdict and the picture."""
    lines = [
        (
            f"{result['config']['engine']}, {result['config']['workload']['title']}: {DEVICES:,} "
            f"devices, cohort {COHORT}, two hidden layers of {HIDDEN}, {SAMPLES} samples a device, "
            f"one of these changed at a time. Medians of {len(result['turns'])} turn(s); lines by "
            "least squares."
        ),
        "",
        "| axis | sizes | round, ms | line, ms | peak memory, MiB | line, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for axis in AXES:
        time, memory = (line(result, axis, field) for field in ("round_ms", "peak_mib"))
        if time is None or memory is None:
            continue
        cells = [axis, " ".join(f"{x:,.0f}" for x in time["x"])]
        for fit in (time, memory):
            cells += [
                " ".join(f"{y:,.4g}" for y in fit["y"]),
                f"{fit['intercept']:.3g} + {fit['slope']:.3g} x (R2 {fit['r2']:.2f})",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", binds(result), "", f"![Scaling](images/{PLOT})"])


def plot(result: dict[str, Any], path: Any) -> None:
    """Draw time and memory along the axes."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(2, len(AXES), figsize=(12, 5), constrained_layout=True)
    fields = (("round_ms", "round, ms"), ("peak_mib", "peak memory, MiB"))
    for row, (field, label) in zip(rows, fields, strict=True):
        for place, axis in zip(row, AXES, strict=True):
            fit = line(result, axis, field)
            if fit is None:
                continue
            place.plot(fit["x"], fit["slope"] * fit["x"] + fit["intercept"], color="0.7")
            place.plot(fit["x"], fit["y"], "o", color="C0")
            place.set_ylim(0, 1.1 * max(fit["y"]))
            place.set_xlabel(axis)
            place.locator_params(axis="x", nbins=4)
        row[0].set_ylabel(label)
    figure.suptitle(result["config"]["engine"])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
