"""The look of all figures: colours by role, type, and how a figure becomes SVG.

Figures are drawn in the light colours. As every role has a colour of its own, the page can replace
each by a CSS variable, and the same drawing follows the reader's light or dark setting.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgelearn.errors import ExtraMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

# Role -> (light, dark). Hues after Okabe and Ito (2008) and Tol (2021), safe for colour-blind
# readers; darker on light, lighter on dark, so that each has a contrast of 3:1 or more.
ROLES: dict[str, tuple[str, str]] = {
    "page": ("#f5f7f9", "#0f1419"),
    "card": ("#ffffff", "#171d24"),
    "line": ("#e2e7ec", "#29323c"),
    "ink": ("#1b2127", "#e9edf1"),
    "muted": ("#5c6874", "#9ba7b4"),
    "rule": ("#c5ccd4", "#47515c"),
    "grid": ("#e6eaee", "#2a323b"),
    "served": ("#0b66b0", "#5fb4f5"),
    "float": ("#c4560a", "#f79b52"),
    "worst": ("#b02a5b", "#f283ab"),
    "up": ("#0c8464", "#35caa0"),
    "down": ("#7a4cb3", "#ba97ee"),
    "heat": ("#14639f", "#2b7bc0"),
    "on-heat": ("#fefefe", "#fdfeff"),
    "series-0": ("#0072b2", "#56b4e9"),
    "series-1": ("#d55e00", "#ff8f45"),
    "series-2": ("#008f68", "#2ac79a"),
    "series-3": ("#b8488c", "#e795c4"),
    "series-4": ("#a67c00", "#e8b929"),
    "series-5": ("#332288", "#a79af6"),
    "series-6": ("#882255", "#e0799f"),
    "series-7": ("#66702b", "#bcc765"),
}
NUM_SERIES = sum(role.startswith("series-") for role in ROLES)
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_RC: Any = {
    "svg.fonttype": "none",  # text stays text: it can be selected and searched
    "svg.hashsalt": "edgelearn",  # the same drawing has the same bytes
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the layout is the same everywhere
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": ROLES["ink"][0],
    "axes.labelcolor": ROLES["muted"][0],
    "xtick.color": ROLES["rule"][0],
    "ytick.color": ROLES["rule"][0],
    "xtick.labelcolor": ROLES["muted"][0],
    "ytick.labelcolor": ROLES["muted"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.pad": 5,
    "axes.edgecolor": ROLES["rule"][0],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": ROLES["grid"][0],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
}


def color(role: str) -> str:
    """Return the colour that figures are drawn in for a role."""
    return ROLES[role][0]


@contextmanager
def look() -> Iterator[None]:
    """Draw in the common look, and leave matplotlib's own settings as they were.

    Raises:
        ExtraMissingError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ExtraMissingError(
            package="matplotlib", extra="report", needed_for="the report"
        ) from error
    with matplotlib.rc_context(rc=_RC):
        yield


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure; sizes in inches."""
    with look():
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")


def render_svg(figure: Figure) -> str:
    """Return a figure as an SVG file: the same bytes each time, text as text, no date."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with look():
        figure.savefig(buffer, format="svg", metadata=nothing)
    return re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", FONT_STACK, buffer.getvalue().decode())


def inline_svg(svg: str, *, name: str, label: str) -> str:
    """Return an SVG file as an element of a page: themed, scalable, with ids of its own.

    Args:
        svg: What `render_svg` returned.
        name: Prefix of all ids; must differ between the figures of a page.
        label: What a screen reader says; already escaped.
    """
    body = svg[svg.index("<svg") :]
    head, body = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<(/?)metadata.*?>", "", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = body.replace(f"font-family: {FONT_STACK}", "font-family: inherit")
    for role, (light, _) in ROLES.items():
        body = re.sub(rf"{light}\b", f"var(--{role})", body, flags=re.IGNORECASE)
    return f'<svg {box.group() if box else ""} role="img" aria-label="{label}">{body.strip()}'


def css_variables(*, dark: bool) -> str:
    """Return the declarations of all roles for a style sheet."""
    scheme = "dark" if dark else "light"
    return f"color-scheme: {scheme}; " + " ".join(
        f"--{role}: {pair[dark]};" for role, pair in ROLES.items()
    )
