"""What the wheel holds: the library, its scenarios and profiles, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            str(folder),
            str(ROOT),
        ],
        check=True,
    )
    (path,) = folder.glob("edgelearn-*.whl")
    return zipfile.ZipFile(path)


def test_contents(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edgelearn"}
    for needed in (
        "edgelearn/py.typed",
        "edgelearn/report/page.css",
        "edgelearn/testing/strategy.py.txt",
        "edgelearn/scenario/data/digits.npz",
        "edgelearn/scenario/data/LICENSES.md",
        "edgelearn/_scenarios/split-digits.toml",
        "edgelearn/_profiles/phone-mid.toml",
    ):
        assert needed in names


def test_it_works_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import edgelearn, sys\n"
        f"assert edgelearn.__file__.startswith({str(tmp_path)!r}), edgelearn.__file__\n"
        "from edgelearn.cli import main\n"
        "sys.exit(main(['validate', 'split-digits']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
