"""The public functions that scripts call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgelearn.api import validate
from edgelearn.cli import main
from edgelearn.errors import DatasetError, DatasetMissingError, ScenarioError
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.load import to_toml
from edgelearn.scenario.spec import DataSpec
from edgelearn.testing.toy import toy_scenario


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"client": {"args": {"size": 1}}}, "[client.args] size: "),
        ({"wire": {"codec": "top-k", "args": {"shares": 1}}}, "[wire.args] shares: "),
        ({"wire": {"codec": "int4+lzma", "args": {"bits": 1}}}, "[wire.args] bits: "),
        ({"runtime": {"args": {"bits": 4}}}, "[runtime.args] bits: "),
        (
            {"fleet": {"runtime_args": {"phone-mid": {"bits": 4}}}},
            "[fleet.runtime_args] phone-mid: bits: ",
        ),
    ],
)
def test_arguments_of_every_plugin_are_checked(tables: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        validate(toy_scenario(**tables))
    assert told in str(caught.value)


def far_away(spec: DataSpec) -> Dataset:
    """A data set that is nowhere on this machine."""
    assert not spec.download, "whoever validates does not want gigabytes"
    raise DatasetMissingError("nowhere on this machine")


def cut_short(_: DataSpec) -> Dataset:
    """A data set whose files are damaged."""
    raise DatasetError("damaged or truncated")


def test_without_its_data_the_rest_of_a_scenario_is_checked() -> None:
    assert validate(toy_scenario()) is None
    data = {"dataset": f"{__file__}:far_away", "download": True}
    unseen = validate(toy_scenario(data=data))
    assert isinstance(unseen, DatasetMissingError)
    assert "nowhere on this machine" in str(unseen)
    with pytest.raises(ScenarioError, match=r"\[server\] strategy: unknown name 'FedAvgg'"):
        validate(toy_scenario(data=data, server={"strategy": "FedAvgg"}))


def test_data_that_is_damaged_is_refused_as_by_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(toy_scenario(data={"dataset": f"{__file__}:cut_short"})))
    for command in (["validate", str(path)], ["run", str(path), "--out", str(tmp_path / "out")]):
        assert main(command) == 1
        out, err = capsys.readouterr()
        assert "damaged or truncated" in err
        assert "valid" not in out


def far_but_fetched(_: DataSpec) -> Dataset:
    """A data set that a download would bring."""
    raise DatasetMissingError("nowhere on this machine", is_fetched=True)


@pytest.mark.parametrize("download", [False, True])
def test_a_download_is_offered_only_where_it_is_not_allowed_yet(
    download: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    data = {"dataset": f"{__file__}:far_but_fetched", "download": download}
    path.write_text(to_toml(toy_scenario(data=data)))
    assert main(["validate", str(path)]) == 0
    err = capsys.readouterr().err
    assert ("allow the download: --set data.download=true" in err) is not download
    assert ("a run downloads it" in err) is download
