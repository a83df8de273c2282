"""The parts of the page that are text and tables, each a function from a record to HTML."""

from __future__ import annotations

import math
import shlex
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from edgelearn.continual.metrics import spread, spread_of_costs
from edgelearn.report import formats, results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from edgelearn.continual.metrics import Spread
    from edgelearn.federated.record import RunRecord

_MOST_TROUBLES = 20
_GOOD = ("ok", "idle", "offline")  # outcomes that nobody needs to look into


def key_numbers(record: RunRecord) -> str:
    """Return the tiles at the top."""
    served, exact = record.scores("served"), record.scores("float")
    devices = spread(results.final_by_device(record))
    up, down = (formats.size(results.total_bytes(record, d)) for d in results.DIRECTIONS)
    num_bytes, runtime = record.run["model_bytes"], escape(str(record.run["runtime"]))
    smaller = num_bytes["float"] / num_bytes["served"] if num_bytes["served"] else math.nan
    tiles = (
        (
            f"Average accuracy, {runtime}",
            formats.percent(served.average_accuracy),
            f"float: {formats.percent(exact.average_accuracy)}",
        ),
        (
            "Forgetting",
            formats.points(served.forgetting, signed=False),
            "mean fall from best to end",
        ),
        (
            "Backward transfer (BWT)",
            formats.points(served.backward_transfer),
            "from later learning on earlier",
        ),
        (
            "Forward transfer (FWT)",
            formats.points(served.forward_transfer),
            "head start before learning",
        ),
        (
            "Average incremental accuracy",
            formats.percent(served.average_incremental_accuracy),
            f"float: {formats.percent(exact.average_incremental_accuracy)}",
        ),
        (
            "Worst-decile device",
            formats.percent(devices.worst_decile),
            f"mean {formats.percent(devices.mean)}, worst {formats.percent(devices.worst)}",
        ),
        ("Bytes up", up, f"down: {down}"),
        (
            f"Model, {runtime}",
            formats.size(num_bytes["served"]),
            f"float: {formats.size(num_bytes['float'])}, {smaller:.1f}&times;",
        ),
    )
    cells = [
        f'<div class="tile{" main" if k == 0 else ""}"><div class="name">{name}</div>'
        f'<div class="value">{_unit_small(value)}</div><div class="note">{note}</div></div>'
        for k, (name, value, note) in enumerate(tiles)
    ]
    return f'<section class="tiles" aria-label="Key numbers">\n{_lines(cells)}\n</section>'


def _unit_small(value: str) -> str:
    number, space, unit = value.partition(" ")
    return f"{number}<small>{unit}</small>" if space else number


def matrix_table(record: RunRecord) -> str:
    """Return the accuracy matrix as a table, the untrained and the float model around it."""
    R, T = record.matrix("served"), record.num_experiences
    one_order = record.run["orders"] is None
    names = [formats.classes(labels) for labels in record.run["classes"]]
    head = "".join(
        f'<th scope="col">{e}<small>{escape(name)}</small></th>' for e, name in enumerate(names)
    )
    rows = [_accuracy_row("untrained", record.baseline("served"), ["ahead"] * T)]
    for i, row in enumerate(R):
        kinds = ["learned" if j == i else "ahead" if j > i else "" for j in range(T)]
        rows.append(_accuracy_row(f"after {i}", row, kinds if one_order else [""] * T))
    rows.append(_accuracy_row("float, at the end", record.matrix("float")[-1], [""] * T, "other"))
    note = "Bold: just learned. Grey: not seen yet. " if one_order else ""
    return f"""<div class="table"><table>
<caption>{note}All devices' test samples, pooled; the served model but in the last row.</caption>
<thead><tr><th scope="col">experience</th>{head}<th scope="col">mean</th></tr></thead>
<tbody>
{_lines(rows)}
</tbody>
</table></div>"""


def _accuracy_row(
    name: str, values: NDArray[np.float64], kinds: list[str], row_kind: str = ""
) -> str:
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else math.nan
    cells = [
        f'<td class="{kind}">{formats.percent(value)}</td>' if kind else _cell(value)
        for value, kind in zip(values, kinds, strict=True)
    ]
    start = f'<tr class="{row_kind}">' if row_kind else "<tr>"
    return f'{start}<th scope="row">{name}</th>{"".join(cells)}{_cell(mean)}</tr>'


def _cell(value: float) -> str:
    return f"<td>{formats.percent(value)}</td>"


def device_table(record: RunRecord) -> str:
    """Return how accuracy, forgetting and traffic are spread over devices."""
    runtime = escape(str(record.run["runtime"]))
    served, exact = (results.final_by_device(record, model) for model in results.MODELS)
    forgetting = spread_of_costs(results.forgetting_by_device(record))
    rows = [
        _spread_row(f"final accuracy, {runtime}", spread(served), formats.percent, is_fair=True),
        _spread_row("final accuracy, float", spread(exact), formats.percent, is_fair=True),
        _spread_row(f"forgetting, {runtime}", forgetting, _unsigned_points),
    ]
    if record.is_complete:
        for direction in results.DIRECTIONS:
            values = np.array(record.end[f"bytes_{direction}"], dtype=np.float64)
            traffic = spread_of_costs(values)
            rows.append(_spread_row(f"bytes {direction}", traffic, formats.size))
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("mean", "std", "worst decile", "worst", "best", "gap", "Jain", "devices")
    )
    return f"""<div class="table"><table>
<caption>Worst decile: mean of the worst tenth of the devices. Worst is the lowest accuracy, the
most forgotten, the most bytes; the gap is between worst and best. Std is that of the population of
devices. Jain's index of accuracies is 1 if all devices are equal.</caption>
<thead><tr><th scope="col">per device</th>{head}</tr></thead>
<tbody>
{_lines(rows)}
</tbody>
</table></div>"""


def _spread_row(
    name: str, values: Spread, write: Callable[[float], str], *, is_fair: bool = False
) -> str:
    numbers = (values.mean, values.std, values.worst_decile, values.worst, values.best, values.gap)
    has_index = is_fair and not math.isnan(values.jain)
    index = f"{values.jain:.3f}" if has_index else formats.UNKNOWN
    texts = [*map(write, numbers), index, f"{values.num_devices:,}"]
    cells = "".join(f"<td>{text}</td>" for text in texts)
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _unsigned_points(value: float) -> str:
    return formats.points(value, signed=False)


def outcomes(record: RunRecord) -> str:
    """Return how often devices answered, and which of them had problems."""
    tiles = "".join(
        f'<div class="tile{" bad" if number and name not in _GOOD else ""}">'
        f'<div class="name">{escape(name)}</div><div class="value">{number:,}</div></div>'
        for name, number in results.outcomes(record).items()
    )
    tiles = f'<div class="outcomes">{tiles}</div>\n' if tiles else ""
    found = results.troubles(record)
    if not found:
        return f"{tiles}<p>No device had a problem.</p>"
    rows = []
    for trouble in found[:_MOST_TROUBLES]:
        counts = ", ".join(f"{escape(name)} {n}" for name, n in trouble.counts.items())
        reason = escape(trouble.reason) or formats.UNKNOWN
        rows.append(
            f'<tr><th scope="row">{trouble.device}</th><td class="text">{counts}</td>'
            f'<td>{trouble.first_round}</td><td class="text">{reason}</td></tr>'
        )
    more = len(found) - _MOST_TROUBLES
    note = f"{formats.count(len(found), 'device')} had problems, the most troubled first"
    note += f"; {more:,} more are in the record." if more > 0 else "."
    return f"""{tiles}<div class="table"><table>
<caption>{note} Problems of every phase are counted, the outcomes above are of training.</caption>
<thead><tr><th scope="col">device</th><th scope="col" class="text">outcomes</th>\
<th scope="col">first in round</th><th scope="col" class="text">first reason</th></tr></thead>
<tbody>
{_lines(rows)}
</tbody>
</table></div>"""


def provenance(record: RunRecord) -> str:
    """Return what is needed to repeat the run, and what in it was measured."""
    run = record.run
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    command = f"edgelearn run {shlex.quote(str(run['scenario']))} --seed {run['seed']}"
    clock_s = record.rounds[-1]["clock_s"] if record.rounds else math.nan
    items = {
        "Repeat it": f"<code>{escape(command)}</code><br><small>The same digest gives the same "
        "bits. Settings that were overridden are in scenario.toml, in the run directory.</small>",
        "Scenario digest": f"<code>{escape(str(run['digest']))}</code>",
        "Seed": escape(str(run["seed"])),
        "Versions": escape(f"edgelearn {run['edgelearn']}, {versions}"),
        "Engine": _engine(record),
        "Model": f"{run['num_parameters']:,} parameters, served as {escape(str(run['runtime']))}",
        "Memory of a device": f"{formats.size(run['memory_bytes_per_device'])} for learning "
        f"with {escape(str(run['client']))}",
        "Virtual time": f"{formats.duration(clock_s)} (modelled)",
        "Computing time": _computing_time(record),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in items.items())
    return f"""<dl>
{rows}</dl>
<p class="honesty"><b>Measured and modelled.</b> Accuracies and bytes were measured in this run: on
the models that were served, and on the messages that were sent. The virtual clock, and the latency
and energy of devices, are modelled from the devices' profiles: not timed on hardware.</p>"""


def _engine(record: RunRecord) -> str:
    engine = record.run["engine"]
    words = [str(engine["tier"]), formats.count(engine["workers"], "worker")]
    if "federation" in engine:
        words.append(f"{engine['federation']} federation")
    if record.is_complete and "updates_per_s" in record.end:
        words.append(f"{record.end['updates_per_s']:,.0f} device updates per second (measured)")
    return f"{escape(', '.join(words))}<br><small>{escape(str(engine['reason']))}</small>"


def _computing_time(record: RunRecord) -> str:
    if record.is_complete:
        wall_s, cpu_s = record.end["wall_s"], record.end["cpu_s"]
        return f"{formats.duration(wall_s)}, {formats.duration(cpu_s)} of processor time (measured)"
    wall_s = sum(line["wall_s"] for line in record.rounds)
    return f"{formats.duration(wall_s)} so far (measured)"


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)
