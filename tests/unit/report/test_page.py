import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from edgelearn.errors import ExtraMissingError
from edgelearn.report.page import write_report

VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a browser would find: resources, ids, text by element; tags must nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.links, self.ids, self.text, self._open = [], [], [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self._open[-1] != "style":
            self.text.append(" ".join(data.split()))


@pytest.fixture
def html(record, tmp_path):
    return write_report(record, tmp_path / "run").read_text("utf-8")


def test_one_page_and_six_drawings_are_written(record, tmp_path):
    path = write_report(record, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "report.html"
    drawings = sorted((path.parent / "figures").iterdir())
    assert [drawing.suffix for drawing in drawings] == [".svg"] * 6
    for drawing in drawings:
        ET.parse(drawing)


def test_the_page_loads_nothing(html):
    page = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 6
    assert page.tags.count("figcaption") == 6


def test_ids_are_unique_and_references_lead_somewhere(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_the_numbers_are_those_of_the_run(html):
    text = " ".join(Page(html).text)
    for part in (
        "Average accuracy, int8 60.0% float: 70.0%",
        "Forgetting 30.0 pp",
        "Backward transfer (BWT) \N{MINUS SIGN}30.0 pp",
        "Forward transfer (FWT) +5.0 pp",
        "Average incremental accuracy 75.0%",
        "Worst-decile device 50.0% mean 60.0%, worst 50.0%",
        "Bytes up 1.3 KiB down: 6.1 KiB",
        "Model, int8 5.3 KiB float: 18.8 KiB, 3.6",
        "untrained 20.0% 0.0% 10.0% 10.0%",
        "after 1 70.0% 80.0% 10.0% 53.3%",
        "final accuracy, int8 60.0% 10.0% 50.0% 50.0% 70.0% 2",
        "forgetting, int8 30.0 pp 10.0 pp 40.0 pp 40.0 pp 20.0 pp 2",
        "1 failed 2 2 out of <memory>",
        "edgelearn run tiny --seed 7",
        "torch 2.6.0",
        "00ff00ff",
        "reference, 1 worker the fleet is tiny",
        "1 min 15 s (modelled)",
    ):
        assert part in text, part
    assert "modelled" in text
    assert "measured" in text
    assert "not complete" not in text


def test_how_unequal_devices_are(html):
    text = Page(html).text
    row = text.index("final accuracy, int8")  # 0.7 and 0.5
    assert text[row + 1 : row + 9] == [
        "60.0%", "10.0%", "50.0%", "50.0%", "70.0%", "20.0%", "0.973", "2"
    ]  # fmt: skip
    row = text.index("forgetting, int8")
    assert text[row + 7] == "\N{EN DASH}", "the index is for what is not negative"


@pytest.mark.parametrize("rounds", [0, 3, 5])
def test_an_unfinished_run_says_so(make_record, tmp_path, rounds):
    page = Page(write_report(make_record(rounds=rounds), tmp_path).read_text("utf-8"))
    text = " ".join(page.text)
    assert f"This run is not complete: {rounds} of 6 rounds" in text
    assert "Average accuracy, int8 \N{EN DASH} float: \N{EN DASH}" in text
    assert "nan" not in text.split()


def test_names_are_escaped(make_record, tmp_path):
    evil = "<script>alert('1')</script>"
    record = make_record(
        scenario=evil, title=evil + '"&', client=evil, server=evil, runtime=evil, digest=evil,
        engine={"tier": evil, "workers": 2, "reason": evil}, versions={evil: evil},
        classes=[[evil], [evil], ["$x$"]],
    )  # fmt: skip
    html = write_report(record, tmp_path).read_text("utf-8")
    page = Page(html)
    assert "<script" not in html
    assert "script" not in page.tags
    assert evil in page.text
    for drawing in (tmp_path / "figures").iterdir():
        ET.parse(drawing)


def test_the_same_record_gives_the_same_bytes(record, tmp_path):
    first, second = (write_report(record, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_light_and_dark(html):
    assert "prefers-color-scheme: dark" in html


def test_devices_with_different_orders(make_record, tmp_path):
    record = make_record(orders=[[0, 1, 2], [2, 1, 0]])
    text = " ".join(Page(write_report(record, tmp_path).read_text("utf-8")).text)
    assert "no common diagonal" in text


def test_without_matplotlib_nothing_is_written(record, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExtraMissingError):
        write_report(record, tmp_path / "run")
    assert not (tmp_path / "run").exists()
