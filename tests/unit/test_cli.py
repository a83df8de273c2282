"""The command line, without a process of its own."""

from __future__ import annotations

import pytest

from edgelearn import cli
from edgelearn.cli import main


def test_several_strategies_as_one_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "ewc+replay"]) == 0
    assert "ewc.fisher" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("ewc+repla", "did you mean 'replay'"),
        ("replay+der", "only one part can be one that replays"),
        ("avalanche:EWX", "did you mean"),
    ],
)
def test_a_reference_that_leads_nowhere_is_wrong_usage(
    reference: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", reference]) == 2
    assert message in capsys.readouterr().err


def test_arguments_that_would_be_dropped_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    drop = ["--client", "replay", "--set", "client.args.capacity=5"]
    assert main(["run", "split-digits", *drop]) == 2
    assert "--client resets them" in capsys.readouterr().err


def test_a_file_that_can_not_be_written_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_options: object) -> int:
        raise OSError(28, "No space left on device", "model.onnx")

    monkeypatch.setitem(cli._COMMANDS, "report", full)
    assert main(["report", "runs/first"]) == 1
    assert capsys.readouterr().err == (
        "edgelearn: [Errno 28] No space left on device: 'model.onnx'\n"
    )
