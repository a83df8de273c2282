from __future__ import annotations

from dataclasses import replace

from edgelearn.cli import main
from edgelearn.reproduce import page
from edgelearn.reproduce.results import Results
from edgelearn.reproduce.runner import reproduce
from edgelearn.reproduce.table import find


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_section_says_what_was_seen(make_table, tmp_path):
    reference = make_table(9.0, 14.0)
    results = Results.open(tmp_path / "r.json")
    reproduce(reference, results, seeds=range(3), only="value 9")
    reproduce(reference, results, seeds=[0], only="value 14")
    table = find(reference)
    first, second, half = table.rows
    noted = (replace(first, note="ours is shorter"), replace(second, reason="it is too large"))
    text = page.section(replace(table, rows=(*noted, half)), results)
    assert cells(text)[1:] == [
        ["value 9", "made up", "10.0 ± 1.0", "3", "10.0 (nowhere)", "±1.5", "reproduced (+0.0)"],
        ["value 14", "made up", "14.0 (spread not known)", "1", "10.0 (nowhere)", "±1.5",
         "**not reproduced** (+4.0)"],
        ["half", "made up", "4.5 ± 0.0", "3", "5.0", "±0",
         "**not reproduced** (\N{MINUS SIGN}0.5)"],
    ]  # fmt: skip
    assert "1 reproduced, 2 not, 0 without a verdict." in text
    assert "likely reason: it is too large (value 14, made up)." in text
    assert "likely reason: not known (half, made up)." in text
    assert "Not as in the source: ours is shorter (value 9, made up)." in text
    assert "`edgelearn reproduce made-up --seeds 3` (seeds 0, 1, 2;" in text
    assert "torch" in text


def test_a_table_that_was_not_run(make_table, tmp_path):
    text = page.section(find(make_table(9.0)), Results.open(tmp_path / "none.json"))
    assert "Not run yet" in text
    assert [row[2] for row in cells(text)[1:]] == ["-", "-"]
    assert "0 reproduced, 0 not, 2 without a verdict." in text


def test_other_sections_stay_as_they_are(make_table, tmp_path):
    table, results = find(make_table(9.0)), Results.open(tmp_path / "none.json")
    path = tmp_path / "docs" / "reproduction.md"
    page.write(path, table, results)
    page.write(path, replace(table, name="other", title="Another"), results)
    text = path.read_text()
    assert text.startswith(page.INTRO)
    changed = text.replace("Nothing is learned.", "An edit.")
    path.write_text(f"{changed}\nA last word.\n")
    page.write(path, table, results)
    after = path.read_text()
    assert after.count("## A made-up table") == after.count("## Another") == 1
    assert after.index("made-up table") < after.index("## Another")
    assert after.count("Nothing is learned.") == after.count("An edit.") == 1
    assert after.endswith("\nA last word.\n")


def test_from_the_command_line(make_table, tmp_path, capsys, log):
    reference, out = make_table(9.0, 0.0), tmp_path / "out"
    assert main(["reproduce", reference, "--seeds", "1", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "[1/2] value 9, made up, seed 0: score 9" in told.err
    assert "value 0, made up, seed 0: not run here: DatasetError" in told.err
    assert "reproduced (\N{MINUS SIGN}1.0)" in told.out
    assert f"page: {out / 'reproduction.md'}" in told.out
    seen = (out / "reproduction.md").read_text()
    (out / "reproduction.md").unlink()
    count = len(log.read_text().splitlines())
    assert main(["reproduce", reference, "--render", "--out", str(out)]) == 0
    assert (out / "reproduction.md").read_text() == seen
    assert len(log.read_text().splitlines()) == count, "--render runs nothing"


def test_a_row_that_fails_fails_the_command(make_table, tmp_path, capsys):
    assert main(["reproduce", make_table(9.0, -1.0), "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED: ArithmeticError: -1.0 is below 0" in capsys.readouterr().err
    assert "9.0 (spread not known)" in (tmp_path / "reproduction.md").read_text()


def test_quick_keeps_nothing(make_table, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.iterdir())
    reference = make_table(9.0)
    assert main(["reproduce", reference, "--quick"]) == 0
    assert "shows that it runs" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()} - {"tables.py", "calls.txt", "__pycache__"}
    assert sorted(names) == before
    assert main(["reproduce", reference, "--quick", "--out", str(tmp_path)]) == 2
    assert main(["reproduce", reference, "--seeds", "0"]) == 2


def test_the_list_of_tables(capsys):
    assert main(["reproduce"]) == 0
    text = capsys.readouterr().out
    for name in ("fashion-oracle", "van-de-ven", "avalanche-baselines"):
        assert name in text
    assert "min a seed" in text
