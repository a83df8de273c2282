"""How devices fared by their kind, where kinds differ in what they hold or serve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelearn.report import formats, results

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelearn.federated.record import RunRecord


@dataclass(frozen=True, slots=True)
class OfKind:
    """The devices of one kind.

    Attributes:
        name: Of their profile; several, where these do not differ in the rest.
        variant: Which of the scenario's networks they hold; "" is that of `[model]`.
        width: Part of each of its hidden layers that they hold.
        runtime_args: Arguments of their runtime that others do not have.
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

    name: str
    variant: str
    width: float
    runtime_args: Mapping[str, Any]
    num_devices: int
    num_parameters: int
    model_bytes: int
    memory_bytes: int
    served: float
    float_: float
    up: float
    down: float

    @property
    def title(self) -> str:
        """The kind's name, and what sets it apart."""
        words = [f"network {self.variant}"] if self.variant else []
        words += [f"width {self.width:g}"] if self.width != 1 else []
        words += [f"{key} {value}" for key, value in self.runtime_args.items()]
        name = ", ".join(Path(profile).stem for profile in self.name.split(", "))
        return f"{name} ({', '.join(words)})" if words else name


def by_kind(record: RunRecord) -> tuple[OfKind, ...]:
    """Return the devices of each kind, those with the largest models first.

    None of them if all devices are alike and hold the whole of `[model]`.
    """
    kinds, kind_of = record.run.get("kinds", []), record.run.get("kind_of")
    if kind_of is None and all(kind["width"] == 1 and not kind.get("variant") for kind in kinds):
        return ()
    places = np.zeros(record.run["num_devices"], int) if kind_of is None else np.array(kind_of)
    found = []
    for place, kind in enumerate(kinds):
        theirs = places == place
        up = down = math.nan
        if record.is_complete and theirs.any():
            up, down = (
                float(np.array(record.end[f"bytes_{d}"])[theirs].mean()) for d in ("up", "down")
            )
        found.append(
            OfKind(
                name=kind["name"],
                variant=kind.get("variant", ""),
                width=kind["width"],
                runtime_args={
                    key: value
                    for key, value in kind["runtime_args"].items()
                    if any(other["runtime_args"].get(key) != value for other in kinds)
                },
                num_devices=int(theirs.sum()),
                num_parameters=kind["num_parameters"],
                model_bytes=kind["model_bytes"]["served"],
                memory_bytes=kind["memory_bytes_per_device"],
                served=_accuracy(record, set(np.flatnonzero(theirs).tolist()), "served"),
                float_=_accuracy(record, set(np.flatnonzero(theirs).tolist()), "float"),
                up=up,
                down=down,
            )
        )
    return tuple(sorted(found, key=lambda kind: -kind.model_bytes))


def _accuracy(record: RunRecord, devices: set[int], model: str) -> float:
    if not len(results.final_by_device(record)):
        return math.nan
    line = record.device_rows[-1]
    rows = [row for row, device in enumerate(line["devices"]) if device in devices]
    total = sum(sum(line["count"][row]) for row in rows)
    return sum(sum(line[model][row]) for row in rows) / total if total else math.nan


def lines(record: RunRecord) -> tuple[tuple[str, ...], ...]:
    """Return what a run's last table says of each kind."""
    return tuple(
        (
            f"{kind.title}: {formats.count(kind.num_devices, 'device')}",
            f"{formats.percent(kind.served)} (float {formats.percent(kind.float_)})",
            f"model {formats.size(kind.model_bytes)}",
            f"up {formats.size(kind.up)}, down {formats.size(kind.down)} each",
        )
        for kind in by_kind(record)
    )


def section(record: RunRecord) -> str:
    """Return the part of the page; nothing if all devices are alike."""
    found = by_kind(record)
    if not found:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(kind.title)}</th>'
        + "".join(
            f"<td>{value}</td>"
            for value in (
                f"{kind.num_devices:,}",
                f"{kind.num_parameters:,}",
                formats.size(kind.model_bytes),
                formats.size(kind.memory_bytes),
                formats.percent(kind.served),
                formats.percent(kind.float_),
                formats.size(kind.up),
                formats.size(kind.down),
            )
        )
        + "</tr>"
        for kind in found
    )
    names = (
        "kind", "devices", "parameters", "model served", "memory for learning", "accuracy, served",
        "float", "up, each", "down, each",
    )  # fmt: skip
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"""<h2>By kind of device</h2>
<div class="table"><table>
<caption>Network: which of the scenario's variants devices hold. Width: the part of each hidden \
layer that they hold. Accuracy at the end of the \
stream, over the test samples of a kind's devices.</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
"""
