"""References to Avalanche in a scenario: checked without importing it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgelearn.errors import ScenarioError
from edgelearn.scenario import avalanche_names
from edgelearn.testing.toy import toy_scenario


def faults(reference: str) -> str:
    with pytest.raises(ScenarioError) as caught:
        toy_scenario(client={"strategy": reference})
    return str(caught.value)


@pytest.mark.parametrize("name", avalanche_names.WORKS)
def test_supported_names_are_accepted(name: str) -> None:
    reference = f"avalanche:{name}"
    assert toy_scenario(client={"strategy": reference}).client.strategy == reference


def test_an_unknown_name_is_told_the_nearest() -> None:
    found = faults("avalanche:Reply")
    assert "[client] strategy: Avalanche has no strategy or plug-in 'Reply'" in found
    assert "(did you mean 'Replay'?)" in found


def test_what_does_not_work_is_told_why() -> None:
    assert "ICaRL of Avalanche does not work on a device: it needs" in faults("avalanche:ICaRL")


def test_each_part_of_several_is_checked() -> None:
    assert "did you mean 'EWC'" in faults("avalanche:EWCC+ewc")


def test_ones_own_file_is_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("")
    reference = f"avalanche:{path}:Mine"
    scenario = toy_scenario(client={"strategy": reference})
    assert scenario.client.strategy == reference
    assert f"no file {tmp_path}/gone.py" in faults(f"avalanche:{tmp_path}/gone.py:Mine")


def test_a_file_counts_by_its_content_not_its_place(tmp_path: Path) -> None:
    digests = []
    for folder, text in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        path.write_text(text)
        digests.append(toy_scenario(client={"strategy": f"avalanche:{path}:Mine"}).digest)
    assert digests[0] == digests[1] != digests[2]


def test_nothing_of_avalanche_is_imported() -> None:
    code = (
        "import sys; from edgelearn.testing.toy import toy_scenario; "
        "toy_scenario(client={'strategy': 'avalanche:EWC'}); "
        "import edgelearn.continual.avalanche_client; "
        "sys.exit('avalanche' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_file_imports_it() -> None:
    package = Path(avalanche_names.__file__).parents[1]
    importing = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(
            text in path.read_text()
            for text in ('"avalanche.', 'import_module("avalanche', "import avalanche\n    ")
        )
    ]
    assert importing == ["continual/avalanche.py"]


DOCUMENT = Path(__file__).parents[3] / "docs" / "avalanche.md"


def tables() -> str:
    """The two tables of the documentation."""
    works = [f"| `{name}` | {note} |" for name, note in avalanche_names.WORKS.items()]
    reasons: dict[str, list[str]] = {}
    for name, reason in avalanche_names.FAILS.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    fails = [f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    head = ["| works | what to know |", "|---|---|"]
    return "\n".join([*head, *works, "", "| does not work | why |", "|---|---|", *fails])


def test_the_documentation_lists_what_works() -> None:
    text = DOCUMENT.read_text()
    marks = r"(<!-- tables.*?-->\n).*(\n?<!-- end of tables -->)"
    if os.environ.get("EDGELEARN_REWRITE_GOLDEN"):
        text = re.sub(
            marks, lambda m: f"{m[1]}{tables()}\n<!-- end of tables -->", text, flags=re.S
        )
        DOCUMENT.write_text(text)
    found = re.search(marks, text, flags=re.S)
    assert found is not None
    assert tables() in found[0]
