"""A run's model as an ExecuTorch file: what it answers, what it says, what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgelearn
from edgelearn.cli import main
from edgelearn.deploy import executorch
from edgelearn.deploy.executorch import ExecuTorchPredictor, lower
from edgelearn.deploy.export import calibration_samples, export_pte
from edgelearn.device.learners import make_learner
from edgelearn.errors import ExtraMissingError, RunError
from edgelearn.federated.rundir import read_model
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.world import build

IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("executorch", "torchao"))
installed = pytest.mark.skipif(
    not IS_INSTALLED, reason="needs the extra edgelearn[executorch], which `all` does not have"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small CNN on digits, and its file: lowering takes long."""
    path = tmp_path_factory.mktemp("pte") / "run"
    scenario = {
        "name": "toy",
        "data": {"dataset": "digits"},
        "model": {"name": "cnn"},
        "fleet": {"num_devices": 4, "cohort": 4},
        "stream": {
            "kind": "class-incremental",
            "num_experiences": 1,
            "rounds_per_experience": 10,
        },
        "client": {"strategy": "naive", "lr": 0.2, "epochs": 8},
    }
    edgelearn.simulate(from_dict(scenario), out=path)
    assert main(["export", str(path), "--format", "pte"]) == 0
    return path


@installed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # at executorch's import
def test_the_file_answers_as_the_int8_runtime_does(directory: Path) -> None:
    world = build(edgelearn.load(directory / "scenario.toml"))
    model = make_learner(world).model
    params = read_model(directory, model.layout)
    model.module.eval()
    test = world.test.batch(torch.arange(len(world.test.y)))
    calibration = calibration_samples(world, 256).batch().x
    expected = Int8Runtime().prepare(model, params).calibrated(calibration)(test.x).argmax(1)
    predict = ExecuTorchPredictor((directory / "model.pte").read_bytes())
    found = predict(test.x).argmax(1)
    accuracy = float((found == test.y).double().mean())
    assert float((expected == test.y).double().mean()) > 0.85
    assert float((found == expected).double().mean()) >= 0.99
    assert abs(accuracy - float((expected == test.y).double().mean())) <= 0.005
    exact = model(params, test.x)
    assert not torch.allclose(predict(test.x), exact, atol=1e-4)  # it is not the float network
    assert predict.model_bytes < 0.7 * 4 * model.layout.num_network
    with pytest.raises(ValueError, match="0 rows"):
        predict(test.x[:0])


@installed
@pytest.mark.slow
def test_facts_stand_beside_the_file(directory: Path) -> None:
    facts = json.loads((directory / "model.pte.json").read_text())
    world = build(edgelearn.load(directory / "scenario.toml"))
    assert facts["digest"] == world.scenario.digest
    assert (facts["batch"], facts["weight_bits"]) == ("1", "8")
    assert facts["calibration"] == "256 training samples"
    assert float(facts["input.scale"]) == world.train.encoding.scale


@installed
@pytest.mark.slow
def test_a_network_that_can_t_be_exported_is_refused() -> None:
    class Deciding(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = FlatModel(Deciding(4, 4))
    with pytest.raises(RunError, match="can't be exported"):
        lower(model, model.initial(), torch.rand(3, 4), is_quantized=True)
    with pytest.raises(ValueError, match="batch is 4; allowed: 1 to 3"):
        lower(model, model.initial(), torch.rand(3, 4), is_quantized=True, batch=4)


def test_a_lowering_that_fails_says_why() -> None:
    with pytest.raises(RunError, match=r"failed: .*a reason"):
        executorch._run([sys.executable, "-c", "raise SystemExit('a reason')"], 60.0)
    with pytest.raises(RunError, match="took more than 0 s"):
        executorch._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.1)


def test_without_the_extra_there_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "executorch" else found(name, *rest)

    monkeypatch.setattr(executorch, "find_spec", missing)
    with pytest.raises(ExtraMissingError, match=r"'edgelearn\[executorch\]'"):
        export_pte(tmp_path, tmp_path / "model.pte")
    assert main(["export", str(tmp_path), "--format", "pte"]) == 1
    assert "pip install 'edgelearn[executorch]'" in capsys.readouterr().err


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--format", "pte", "--weight-bits", "7"]) == 2
    assert "--format pte has --weight-bits 8 or 32" in capsys.readouterr().err
    with pytest.raises(RunError, match="weight_bits is 7"):
        export_pte(tmp_path, tmp_path / "model.pte", weight_bits=7)
