"""Whether a scenario fits a device, what would make it fit, and how the command says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelearn.cli import main
from edgelearn.device.profile import load_profile
from edgelearn.fit_check import FitCheck, check_fit
from edgelearn.scenario.load import from_dict

PROFILE = "train_gflops = 1\ndownlink_mbps = 1\nuplink_mbps = 1\npower_w = 1\nradio_j_per_mb = 1\n"
CNN = {"name": "cnn", "args": {"channels": [8, 8], "hidden": 16}}


def profile(folder: Path, num_bytes: float) -> Path:
    path = folder / "board.toml"
    path.write_text(f"memory_mib = {num_bytes / 2**20!r}\n{PROFILE}")
    return path


def checked(raw: dict[str, Any], folder: Path, num_bytes: float) -> FitCheck:
    raw["data"]["max_train"] = 300
    return check_fit(from_dict(raw), [load_profile(str(profile(folder, num_bytes)))])


def test_a_network_that_stays_is_not_sent(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"]["args"] = {"hidden": [64]}
    raw["data"]["public"] = 40
    parts = {}
    for name in ("naive", "fedmd"):
        raw["client"] |= {"strategy": name, "args": {}}
        parts[name] = checked(raw, tmp_path, 2**30).planned.needs.sending.parts
    network, logits = 4 * (64 * 64 + 64 + 64 * 10 + 10), 4 * 40 * 10
    assert parts["naive"]["message"] == network
    assert parts["fedmd"]["strategy"] == network + 9, "and how far it has come"
    made_of = network + logits  # what it has learned, of which the answers travel
    assert parts["fedmd"]["message"] - made_of == logits


def test_the_limit_is_exact_and_the_cheapest_way_is_found(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["model"] = CNN
    raw["client"] |= {"batch_size": 32, "momentum": 0.9}
    needed = checked(raw, tmp_path, 2**30).planned.needs.training.total
    assert checked(raw, tmp_path, needed).fits
    (verdict,) = checked(raw, tmp_path, needed - 1).verdicts
    assert verdict.can_answer
    assert not verdict.can_train
    assert verdict.remedy is not None
    assert verdict.remedy.changes == {"accumulate": 2}
    # What is suggested keeps its word.
    raw["client"] |= verdict.remedy.changes
    (verdict,) = checked(raw, tmp_path, verdict.remedy.needs.training.total).verdicts
    assert verdict.can_train


def test_a_device_needs_what_the_part_takes_that_it_holds(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["model"]["args"] = {"hidden": [64]}
    whole = checked(raw, tmp_path, 2**30).planned.needs
    raw["model"]["args"] = {"hidden": [16]}
    quarter = checked(raw, tmp_path, 2**30).planned.needs
    raw["model"]["args"] = {"hidden": [64]}
    board = str(tmp_path / "board.toml")
    raw["fleet"] |= {"profiles": {board: 1, "phone-mid": 1}, "width": {board: 0.25}}
    raw["server"] = {"strategy": "HeteroFL"}
    found = check_fit(from_dict(raw), [load_profile(board), load_profile("phone-mid")])
    assert [v.kind.network for v in found.verdicts] == [("", 0.25), ("", 1.0)]
    assert [v.planned.needs for v in found.verdicts] == [quarter, whole]
    assert found.planned.needs == whole
    limit = quarter.training.total
    assert checked(raw, tmp_path, limit).fits
    assert not checked(raw, tmp_path, limit - 1).fits


def test_of_networks_that_are_dealt_out_a_device_may_get_the_largest(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    small = {"name": "mlp", "args": {"hidden": [4]}}
    raw["data"]["public"] = 40
    raw["client"] |= {"strategy": "fedmd", "args": {}}
    raw["model"] = {"name": "mlp", "args": {"hidden": [64]}}
    whole = checked(raw, tmp_path, 2**30).planned.needs
    raw["model"]["variants"] = {"small": {**small, "share": 0.5}}
    assert checked(raw, tmp_path, 2**30).planned.needs == whole
    raw["model"]["variants"] = {"small": {**small, "profile": "phone-mid"}}
    found = check_fit(from_dict(raw), [load_profile("phone-mid")])
    assert found.verdicts[0].kind.variant == "small"
    assert found.planned.needs.training.total < whole.training.total


def test_where_no_option_helps_the_least_is_told(raw: dict[str, Any], tmp_path: Path) -> None:
    (verdict,) = checked(raw, tmp_path, 9_000).verdicts
    assert not verdict.can_train
    assert verdict.remedy is None
    assert verdict.least_bytes is not None
    assert verdict.least_bytes > 9_000


def test_what_a_strategy_rules_out_is_not_suggested(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["client"] |= {"strategy": "gem", "args": {"capacity": 20}, "batch_size": 32}
    needed = checked(raw, tmp_path, 2**30).planned.needs
    (verdict,) = checked(raw, tmp_path, needed.training.total - 1).verdicts
    assert verdict.remedy is None
    assert verdict.least_bytes == needed.training.total


def run(*arguments: str) -> int:
    return main(["fit-check", "split-digits", "--set", "data.max_train=300", *arguments])


def test_the_command_tells_all_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    for word in ("weights", "buffer", "served", "sum", "phone-low", "sensor-hub", "fits"):
        assert word in out


def test_the_command_says_by_its_exit_code_that_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--profile", str(profile(tmp_path, 30_000)), "--format", "json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["profiles"]["board"]["can_answer"] is True
    step = found["needs"]["step"]
    assert sum(b for name, b in step.items() if name != "total") == step["total"]
    assert run("--profile", str(profile(tmp_path, 1_000))) == 1
    assert "a smaller network" in " ".join(capsys.readouterr().out.split())


def test_overhead_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--profile", "sensor-hub", "--overhead", "64") == 1
    assert "overhead" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--profile", "nope"),
        ("--overhead", "-1"),
        ("--overhead", "nan"),
        ("--set", "client.train=last:9"),
        ("--set", "client.train=first"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err
