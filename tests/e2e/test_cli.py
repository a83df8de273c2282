"""The command line, as a user runs it: real processes, exit codes, stdout and stderr apart."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgelearn.cli import main

SMALL = [
    "--set", "data.max_train=200", "--set", "data.max_test=50",
    "--set", "fleet.num_devices=4", "--set", "fleet.cohort=2",
    "--set", "stream.num_experiences=2", "--set", "stream.rounds_per_experience=2",
]  # fmt: skip


def edgelearn(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line; check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "edgelearn.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_run_leaves_a_complete_directory(tmp_path: Path) -> None:
    done = edgelearn("run", "split-digits", *SMALL, "--out", "out", cwd=tmp_path)
    assert "run directory: out" in done.stdout
    assert re.search(r"round 4/4 +experience 1 +accuracy", done.stderr)
    assert "round" not in done.stdout.split("run directory")[1]
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    assert {
        "scenario.toml", "record.jsonl", "checkpoint", "checkpoint/checkpoint.json",
        "model.safetensors", "devices.bin", "report.html", "figures",
    } <= names  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    again = edgelearn("run", "--resume", "out", cwd=tmp_path)
    assert "run directory: out" in again.stdout


def test_wrong_usage_is_2_and_one_clear_error(tmp_path: Path) -> None:
    done = edgelearn("run", "split-digit", cwd=tmp_path, code=2)
    assert "did you mean 'split-digits'?" in done.stderr
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--set", "client.lrr=1"], "unknown key (did you mean 'lr'?)"),
        (["--client", "replya"], "did you mean 'replay'?"),
        (["--set", "client.args.capacty=3"], "did you mean 'capacity'?"),
        (["--set", "server.strategy=FedAvgg"], "did you mean 'FedAvg'?"),
    ],
)
def test_a_misspelling_is_2_and_what_was_meant(
    wrong: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "split-digits", *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_1_with_the_first_cause(tmp_path: Path) -> None:
    done = edgelearn("run", "split-digits", *SMALL, "--set", "client.lr=1e30", "--set",
                     "client.epochs=3", "--out", "out", cwd=tmp_path, code=1)  # fmt: skip
    assert "training diverged on device" in done.stderr
    assert "Traceback" not in done.stderr
    edgelearn("run", "--resume", "nowhere", cwd=tmp_path, code=1)


def test_validate_lists_every_fault(tmp_path: Path) -> None:
    edgelearn("copy", "split-digits", "mine.toml", cwd=tmp_path)
    done = edgelearn("validate", "mine.toml", cwd=tmp_path)
    assert "valid, 30 rounds" in done.stdout
    text = (tmp_path / "mine.toml").read_text()
    text = text.replace('dataset = "digits"', 'dataset = "digit"').replace("lr = 0.2", "lr = -1")
    (tmp_path / "mine.toml").write_text(text.replace('kind = "dirichlet"', 'kind = "dirichle"'))
    done = edgelearn("validate", "mine.toml", cwd=tmp_path, code=2)
    assert "3 faults" in done.stderr
    for part in ("did you mean 'digits'", "did you mean 'dirichlet'", "must be above 0"):
        assert part in done.stderr
    edgelearn("copy", "split-digits", "mine.toml", cwd=tmp_path, code=2)  # never overwritten


def test_compare_prints_csv_and_json_on_stdout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "split-digits", *SMALL, "--client", "naive,ewc,replay", "--seeds", "2"]
    rows = list(csv.DictReader(io.StringIO(edgelearn(*arguments, "--format", "csv",
                                                     cwd=tmp_path).stdout)))  # fmt: skip
    assert len({row["strategy"] for row in rows}) == 3
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_new_check_and_run_a_strategy_of_ones_own(tmp_path: Path) -> None:
    made = edgelearn("new", "strategy", "my-strategy", cwd=tmp_path)
    (file,) = tmp_path.glob("*.py")
    assert file.name in made.stdout
    name = re.search(r"^class (\w+)\(", file.read_text(), re.MULTILINE)
    assert name is not None
    reference = f"{file.name}:{name[1]}"
    edgelearn("check", reference, cwd=tmp_path)
    edgelearn("run", "split-digits", *SMALL, "--client", reference, "--out", "out", cwd=tmp_path)
    edgelearn("new", "strategy", "my-strategy", cwd=tmp_path, code=2)  # never overwritten
    file.write_text(
        file.read_text().replace(
            "def loss(", "def loss(self, *_):\n        return 1\n\n    def other("
        )
    )
    edgelearn("check", reference, cwd=tmp_path, code=1)


def test_help_imports_neither_torch_nor_flwr() -> None:
    code = (
        "import sys, edgelearn.cli\n"
        "try: edgelearn.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'flwr', 'numpy', 'avalanche'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_imports_no_avalanche(tmp_path: Path) -> None:
    code = (
        "import sys, edgelearn\n"
        "edgelearn.simulate(edgelearn.load('split-digits', stream={'num_experiences': 1,"
        " 'rounds_per_experience': 1}))\n"
        "sys.exit('imported avalanche' if 'avalanche' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


README = Path(__file__).parents[2] / "README.md"
COMMANDS = re.findall(r"^\$ (edgelearn .*)$", README.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, which imports torch once and not for each."""
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        assert main(shlex.split(command)[1:]) == 0, command
