import sys
import xml.etree.ElementTree as ET

import pytest

from edgelearn.errors import ExtraMissingError
from edgelearn.report.axes import _moved_apart
from edgelearn.report.figures import draw_accuracy_matrix, draw_all
from edgelearn.report.theme import ROLES, inline_svg, render_svg

NAMES = ["matrix", "average", "experiences", "devices", "bytes", "models"]


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()).strip() for e in ET.fromstring(svg).iter() if "text" in e.tag]


def test_all_figures_are_drawn(record):
    assert list(draw_all(record)) == NAMES


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 5])
def test_an_unfinished_run_has_all_figures(make_record, rounds):
    figures = draw_all(make_record(rounds=rounds))
    svgs = {name: render_svg(figure) for name, figure in figures.items()}
    assert list(svgs) == NAMES
    assert "not measured yet" in texts(svgs["devices"])
    assert "nan" not in " ".join(map(" ".join, map(texts, svgs.values()))).lower()


def test_devices_with_different_orders(make_record):
    figures = draw_all(make_record(orders=[[0, 1, 2], [2, 1, 0]]))
    assert "after step" in texts(render_svg(figures["matrix"]))


def test_the_matrix_has_a_number_in_each_cell_and_none_where_nothing_was_measured(make_record):
    full = texts(render_svg(draw_accuracy_matrix(make_record())))
    assert [t for t in full if t in ("90", "80", "70")] == ["90", "70", "80", "70"]
    part = texts(render_svg(draw_accuracy_matrix(make_record(rounds=2))))
    assert {"90", "10"} <= set(part)
    assert not {"80", "70", "60", "50"} & set(part)


def test_a_drawing_is_text_and_the_same_each_time(record):
    first, second = (render_svg(draw_all(record)["average"]) for _ in range(2))
    assert first == second
    assert "<text" in first
    assert "dc:date" not in first


def test_an_inline_drawing_follows_the_page(record):
    svg = inline_svg(render_svg(draw_accuracy_matrix(record)), name="m", label="a label")
    assert "http" not in svg
    assert "var(--heat)" in svg
    assert ROLES["heat"][0] not in svg
    assert all(part.startswith("m-") for part in svg.split(' id="')[1:])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.2, 0.6], [0.2, 0.6]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 1.0, 1.0], [0.0, 0.1, 0.9, 1.0]),
        ([0.4, 0.48, 0.5], [0.36, 0.46, 0.56]),
    ],
)
def test_labels_are_moved_apart(values, expected):
    assert _moved_apart(values, 0.1, 0.0, 1.0) == pytest.approx(expected)


def test_colors_tell_roles_apart():
    light, dark = zip(*ROLES.values(), strict=True)
    assert len(set(light)) == len(ROLES)
    assert len(set(dark)) == len(ROLES)


def test_settings_of_matplotlib_are_left_alone(record):
    import matplotlib

    before = dict(matplotlib.rcParams)
    render_svg(draw_accuracy_matrix(record))
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExtraMissingError, match=r"the report needs .*edgelearn\[report\]"):
        draw_all(record)
