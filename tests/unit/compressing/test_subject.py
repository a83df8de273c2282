"""`edgelearn compress`: models by name, its own files, and runs; and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgelearn
from edgelearn.cli import main
from edgelearn.compress.tune import logits_of
from edgelearn.compressing.subject import AFTERWARDS, FROM_SCRATCH, find
from edgelearn.errors import RunError, StateError
from edgelearn.federated.rundir import read_model
from edgelearn.params import FlatModel
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.models import mlp
from edgelearn.scenario.world import build

TOY = "edgelearn.testing.toy:toy_dataset"


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "first"
    raw = {
        "name": "first",
        "seed": 3,
        "data": {"dataset": TOY},
        "model": {"name": "mlp", "args": {"hidden": [6]}},
        "fleet": {"num_devices": 3, "cohort": 2},
        "stream": {
            "kind": "domain-incremental",
            "num_experiences": 2,
            "rounds_per_experience": 2,
        },
        "client": {"strategy": "naive", "lr": 0.3, "epochs": 5},
        "compress": {"pipeline": "prune(0.5, epochs=1) | quantize"},
    }
    edgelearn.simulate(from_dict(raw), out=directory)
    return directory


def answers(module: nn.Module) -> torch.Tensor:
    x = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module.eval()(x)


def test_a_model_has_digits_and_begins_with_training() -> None:
    subject = find("mlp", args={"hidden": [5]}, max_train=100, max_test=30, seed=4)
    assert (len(subject.train), len(subject.test), subject.seed) == (100, 30, 4)
    assert subject.pipeline == FROM_SCRATCH
    assert (subject.facts["dataset"], subject.facts["args"]) == ("digits", '{"hidden": [5]}')
    assert subject.module[1].out_features == 5
    other = subject.factory("", {"hidden": [2]})
    assert other[1].out_features == 2
    assert (
        find("mlp", args={"hidden": [5]}, seed=5)
        .module[1]
        .weight.ne(subject.module[1].weight)
        .any()
    )


def test_of_a_run_it_is_the_final_model_with_the_samples_of_all(run_directory: Path) -> None:
    subject = find(str(run_directory))
    world = build(edgelearn.load(run_directory / "scenario.toml"))
    model = world.model()
    params = read_model(run_directory, model.layout)
    x = world.test.batch(torch.arange(8)).x
    model.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(subject.module(x), model(params, x))
    assert subject.pipeline == "prune(0.5, epochs=1) | quantize"
    assert (subject.seed, subject.facts["scenario"]) == (3, "first")
    domains = 2
    assert len(subject.train) == domains * len(world.train.y)
    assert len(subject.test) == domains * len(world.test.y)
    assert sorted(set(subject.test.ids.tolist())) == subject.test.ids.tolist()
    elsewhere = find(str(run_directory), dataset=TOY, max_train=20)
    assert (len(elsewhere.train), elsewhere.seed) == (20, 3)
    assert find(str(run_directory), dataset=TOY, seed=0).seed == 0
    assert find(str(run_directory), seed=0).seed == 0
    assert torch.equal(answers(elsewhere.module), answers(subject.module))


def test_the_command_compresses_a_run_and_its_own_files(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert main(["compress", str(run_directory), "--runs", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("mlp on edgelearn.testing", "given", "prune", "quantize", "accuracy", "p99 ms"):
        assert part in printed, part
    assert f"report: {out / 'report.json'}" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["pipeline"] == "prune(0.5, epochs=1) | quantize(8)"
    assert report["digest"] == edgelearn.load(run_directory / "scenario.toml").digest
    file = out / report["rows"][1]["artefact"]
    subject = find(str(file))
    assert subject.pipeline == AFTERWARDS
    with pytest.raises(StateError, match="does not fit samples"):
        find(str(file), dataset="digits")
    zeros = sum(int((p == 0).sum()) for p in subject.module.parameters())
    assert zeros == report["rows"][1]["parameters"] - report["rows"][1]["nonzero"] > 0
    assert main(["compress", str(file), "--runs", "2", "--pipeline", "quantize | pack"]) == 0
    assert "pack" in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="needs edgelearn[prune]"
)
def test_a_network_without_some_channels_is_read_back(tmp_path: Path) -> None:
    out = tmp_path / "small"
    line = "train(1) | prune_channels(0.5, epochs=1) | quantize(4) | pack"
    command = ["compress", "cnn", "--args", "hidden=8", "--max-train", "80", "--max-test", "40"]
    assert main([*command, "--runs", "2", "--pipeline", line, "--out", str(out)]) == 0
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert rows[2]["macs"] < 0.5 * rows[1]["macs"]
    for row in rows[2:]:
        subject = find(str(out / row["artefact"]), max_test=40)
        assert sum(p.numel() for p in subject.module.parameters()) == rows[2]["parameters"]
        right = logits_of(subject.module, subject.test).argmax(1) == subject.test.labels
        assert float(right.double().mean()) == pytest.approx(row["accuracy"], abs=0.15)


def own_model(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return mlp(input_shape=input_shape, num_classes=num_classes, hidden=(3,))


def test_a_distilled_network_is_read_back_by_its_own_name(tmp_path: Path) -> None:
    out = tmp_path / "small"
    line = f'train(1) | distill("{Path(__file__)}:own_model", epochs=1)'
    command = ["compress", "mlp", "--data", TOY, "--runs", "2", "--out", str(out)]
    assert main([*command, "--pipeline", line]) == 0
    subject = find(str(out / "2-distill.safetensors"))
    assert subject.module[1].out_features == 3
    assert subject.facts["dataset"] == TOY
    model = FlatModel(subject.module)
    assert float(model.initial().abs().sum()) > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["cn"], 2, "did you mean 'cnn'"),
        (["cnn", "--data", "digit"], 2, "did you mean 'digits'"),
        (["cnn", "--pipeline", "prun | pack"], 2, "--pipeline: 1 fault"),
        (["cnn", "--args", "hidden=a"], 2, "--args: got 'hidden=a'"),
        (["cnn", "--args", "hiden=3"], 2, "hiden"),
        (["cnn", "--runs", "0"], 2, "--runs: got 0; at least 1"),
        (["cnn", "--max-train", "-1"], 2, "--max-train: got -1; at least 0"),
        (["cnn", "--data", "image-folder"], 1, "name its folder: --root DIR\n"),
        (["nothing.safetensors"], 1, "the file is missing"),
    ],
)
def test_wrong_usage_is_told(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *arguments]) == code
    assert message in capsys.readouterr().err


def test_what_a_run_cannot_give_is_refused(
    run_directory: Path, tmp_path: Path, raw: dict[str, Any]
) -> None:
    for options, message in (
        ({"max_train": 5}, "samples of a run are all used"),
        ({"args": {"hidden": [3]}}, "has its arguments already"),
        ({"dataset": "digits"}, "does not fit samples of 'digits'"),
    ):
        with pytest.raises(RunError, match=message):
            find(str(run_directory), **options)
    with pytest.raises(StateError, match="there is no run here"):
        find(str(tmp_path))
    with pytest.raises(StateError, match="not a network with its name"):
        find(str(run_directory / "model.safetensors"))
    raw["stream"] |= {"num_experiences": 1, "rounds_per_experience": 1}
    raw["client"] |= {"strategy": "fedper"}
    edgelearn.simulate(from_dict(raw), out=tmp_path / "personal")
    with pytest.raises(RunError, match="each device answers with parameters of its own"):
        find(str(tmp_path / "personal"))
