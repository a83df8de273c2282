"""How devices fared by the width of the model that they hold, where they differ in that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelearn.report import formats, results

if TYPE_CHECKING:
    from edgelearn.federated.record import RunRecord


@dataclass(frozen=True, slots=True)
class OfWidth:
    """The devices that hold a model of one width.

    Attributes:
        width: Part of each hidden layer that they hold.
        num_devices: How many.
        num_parameters: Of their model.
        model_bytes: Of the model that they serve.
        memory_bytes: What learning keeps in memory beside it.
        served: Accuracy of the served models over the devices' test samples, pooled, at the end of
            the stream; NaN before.
        float_: The same of the float models.
        up: Bytes that such a device sent, in the mean; NaN while the run is not finished.
        down: Bytes that it got.
    """

    width: float
    num_devices: int
    num_parameters: int
    model_bytes: int
    memory_bytes: int
    served: float
    float_: float
    up: float
    down: float


def by_width(record: RunRecord) -> tuple[OfWidth, ...]:
    """Return the devices of each width, the widest first; none if all hold the whole model."""
    run = record.run
    if run.get("widths") is None:
        return ()
    widths = np.array(run["widths"])
    found = []
    for part in run["submodels"]:
        theirs = widths == part["width"]
        traffic = dict.fromkeys(results.DIRECTIONS, math.nan)
        if record.is_complete:
            traffic = {d: float(np.array(record.end[f"bytes_{d}"])[theirs].mean()) for d in traffic}
        found.append(
            OfWidth(
                width=part["width"],
                num_devices=int(theirs.sum()),
                num_parameters=part["num_parameters"],
                model_bytes=part["model_bytes"]["served"],
                memory_bytes=part["memory_bytes_per_device"],
                served=_accuracy(record, set(np.flatnonzero(theirs).tolist()), "served"),
                float_=_accuracy(record, set(np.flatnonzero(theirs).tolist()), "float"),
                **traffic,
            )
        )
    return tuple(found)


def _accuracy(record: RunRecord, devices: set[int], model: str) -> float:
    if not len(results.final_by_device(record)):
        return math.nan
    line = record.device_rows[-1]
    rows = [row for row, device in enumerate(line["devices"]) if device in devices]
    total = sum(sum(line["count"][row]) for row in rows)
    return sum(sum(line[model][row]) for row in rows) / total if total else math.nan


def lines(record: RunRecord) -> tuple[tuple[str, ...], ...]:
    """Return what a run's last table says of each width."""
    return tuple(
        (
            f"width {part.width:g}: {formats.count(part.num_devices, 'device')}",
            f"{formats.percent(part.served)} (float {formats.percent(part.float_)})",
            f"model {formats.size(part.model_bytes)}",
            f"up {formats.size(part.up)}, down {formats.size(part.down)} a device",
        )
        for part in by_width(record)
    )


def section(record: RunRecord) -> str:
    """Return the part of the page; nothing if all devices hold the whole model."""
    parts = by_width(record)
    if not parts:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{part.width:g}</th>'
        + "".join(
            f"<td>{value}</td>"
            for value in (
                f"{part.num_devices:,}",
                f"{part.num_parameters:,}",
                formats.size(part.model_bytes),
                formats.size(part.memory_bytes),
                formats.percent(part.served),
                formats.percent(part.float_),
                formats.size(part.up),
                formats.size(part.down),
            )
        )
        + "</tr>"
        for part in parts
    )
    names = (
        "width", "devices", "parameters", "model served", "memory for learning", "accuracy, served",
        "float", "up, a device", "down, a device",
    )  # fmt: skip
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"""<h2>By width of the model</h2>
<div class="table"><table>
<caption>Devices hold the first channels of each hidden layer. Accuracy at the end of the stream, \
over the test samples of the devices of a width.</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
"""
