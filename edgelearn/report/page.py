"""One HTML file that shows a run: it holds everything it needs and loads nothing."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from edgelearn.files import write_atomic
from edgelearn.report import formats, kinds, sections
from edgelearn.report.figures import draw_all
from edgelearn.report.theme import css_variables, inline_svg, render_svg

if TYPE_CHECKING:
    from pathlib import Path

    from edgelearn.federated.record import RunRecord


def write_report(record: RunRecord, directory: Path) -> Path:
    """Write `figures/*.svg` and `report.html` into a directory, and return the path of the page.

    The same record gives the same bytes.

    Args:
        record: The run, finished or not; a page of an unfinished run says so.
        directory: Where to; made if it does not exist.

    Raises:
        ExtraMissingError: If matplotlib is not installed.
    """
    drawings = {name: render_svg(figure) for name, figure in draw_all(record).items()}
    for name, svg in drawings.items():
        write_atomic(directory / "figures" / f"{name}.svg", svg.encode())
    path = directory / "report.html"
    write_atomic(path, render_page(record, drawings).encode())
    return path


def render_page(record: RunRecord, drawings: dict[str, str]) -> str:
    """Return the page as text.

    Args:
        record: The run.
        drawings: SVG files by the names of `draw_all`.
    """
    title = escape(f"{record.run['scenario']}, seed {record.run['seed']}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="edgelearn {escape(str(record.run["edgelearn"]))}">
<title>{title} - edgelearn</title>
<style>
{_style()}
</style>
</head>
<body>
{_header(record)}
<main>
{sections.key_numbers(record)}
<h2>What happened</h2>
{_figures(record, drawings)}
<h2>Accuracy after each experience</h2>
{sections.matrix_table(record)}
<h2>Across devices</h2>
{sections.device_table(record)}
{kinds.section(record)}<h2>How the devices fared</h2>
{sections.outcomes(record)}
<h2>Where these numbers come from</h2>
{sections.provenance(record)}
</main>
</body>
</html>
"""


def _style() -> str:
    css = resources.files("edgelearn.report").joinpath("page.css").read_text("utf-8")
    day, night = (css_variables(dark=dark) for dark in (False, True))
    return (
        f":root {{ {day} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {night} }} }}\n{css}"
    )


# -- the top ---------------------------------------------------------------------------------------


def _header(record: RunRecord) -> str:
    run = record.run
    facts = {
        "devices": f"{run['num_devices']:,}",
        "experiences": run["num_experiences"],
        "rounds": len(record.rounds),
        "client": run["client"],
        "server": run["server"],
        "served as": run["runtime"],
        "seed": run["seed"],
    }
    chips = "".join(f"<li><b>{name}</b>{escape(str(v))}</li>" for name, v in facts.items())
    return f"""<header>
<p class="eyebrow">edgelearn run report</p>
<h1>{escape(run["scenario"])}</h1>
<p class="lead">{escape(run["title"])}</p>
<ul class="facts">{chips}</ul>
{_warning(record)}
</header>"""


def _warning(record: RunRecord) -> str:
    if record.is_complete:
        return ""
    total = record.num_experiences * record.run["rounds_per_experience"]
    return (
        '<p class="warning" role="status"><b>This run is not complete:</b> '
        f"{len(record.rounds)} of {total} rounds are recorded. Numbers that need the whole stream "
        f"are shown as {formats.UNKNOWN}, the others are of what is recorded; resume the run to "
        "have them all.</p>"
    )


# -- figures ---------------------------------------------------------------------------------------


def _figures(record: RunRecord, drawings: dict[str, str]) -> str:
    captions = _captions(record)
    parts = []
    for name, svg in drawings.items():
        title, text = captions[name]
        wide = ' class="full"' if name in ("experiences", "devices") else ""
        drawing = inline_svg(svg, name=name, label=escape(title))
        parts.append(
            f'<figure{wide}>\n<div class="drawing">{drawing}</div>\n'
            f"<figcaption><b>{escape(title)}</b>{escape(text)}</figcaption>\n</figure>"
        )
    return '<section class="figures">\n' + "\n".join(parts) + "\n</section>"


def _captions(record: RunRecord) -> dict[str, tuple[str, str]]:
    runtime = record.run["runtime"]
    one_order = record.run["orders"] is None
    return {
        "matrix": (
            "Accuracy matrix",
            f"The {runtime} model on every experience after each was learned; outlined where it "
            "had just been learned, forgotten as the column fades below."
            if one_order
            else f"The {runtime} model on every experience after each step of the stream; devices "
            "met the experiences in different orders, so there is no common diagonal.",
        ),
        "average": (
            "Average accuracy on what was seen",
            (
                "Mean over the experiences met so far, with the model that devices serve and with "
                "the float model it was made from; dotted lines are where a new experience begins."
            ),
        ),
        "experiences": (
            "Each experience over time",
            f"The {runtime} model's accuracy on each experience, faint before the experience came "
            "and strong from then on: a falling line is forgetting."
            if one_order
            else f"The {runtime} model's accuracy on each experience, over all devices, each "
            "of which meets them in its own order.",
        ),
        "devices": (
            "Spread over devices",
            (
                "Devices sorted by their final accuracy on all they saw (left) and by how much "
                "they forgot (right), with the worst tenth marked."
            ),
        ),
        "bytes": (
            "Bytes exchanged",
            (
                "What crossed the wire so far, measured on the encoded messages: up is from the "
                "devices, down is to them."
            ),
        ),
        "models": (
            f"What serving {runtime} costs",
            (
                "Final accuracy on each experience with the served and the float model, and the "
                "bytes of either on a device."
            ),
        ),
    }
