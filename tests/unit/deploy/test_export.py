"""A run's model as an ONNX file: what it computes, what it says, where its ranges come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import edgelearn
from edgelearn.cli import main
from edgelearn.deploy.export import calibration_of, calibration_samples, export_onnx
from edgelearn.device.learners import make_learner
from edgelearn.errors import RunError, StateError
from edgelearn.federated.rundir import read_model, write_model
from edgelearn.params import FlatModel
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.samples import SharedSamples
from edgelearn.scenario.world import build

onnx = pytest.importorskip("onnx")
engine = pytest.importorskip("onnxruntime")


@pytest.fixture
def directory(raw: dict[str, Any], tmp_path: Path) -> Path:
    raw["stream"] |= {"num_experiences": 2, "rounds_per_experience": 2}
    raw["client"] |= {"strategy": "replay", "lr": 0.1}
    edgelearn.simulate(from_dict(raw), out=tmp_path / "run")
    return tmp_path / "run"


def asked(path: Path, x: Tensor) -> Tensor:
    """Answer as a device does that has nothing but the engine."""
    session = engine.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])


def test_the_file_answers_as_the_run_s_model_does(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(directory), "--format", "onnx"]) == 0
    path = directory / "model.onnx"
    out = capsys.readouterr().out
    assert f"{path}: {path.stat().st_size:,} bytes, 7-bit weights, calibrated on 256" in out
    world = build(edgelearn.load(directory / "scenario.toml"))
    model = make_learner(world).model
    params = read_model(directory, model.layout)
    model.module.eval()
    test = world.test.batch(torch.arange(len(world.test.y))).x
    agree = (asked(path, test).argmax(1) == model(params, test).argmax(1)).float().mean()
    assert agree > 0.97
    assert main(["export", str(directory), "--weight-bits", "32", "--out", str(path)]) == 0
    torch.testing.assert_close(asked(path, test), model(params, test), rtol=1e-4, atol=1e-5)
    facts = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert facts["calibration"] == "none"


def test_ranges_are_taken_as_the_run_takes_them(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["stream"] |= {"num_experiences": 2, "rounds_per_experience": 1}
    files = []
    for place, args in enumerate(({}, {"calibration": "percentile", "percentile": 80})):
        raw["runtime"] = {"name": "int8", "args": args}
        edgelearn.simulate(from_dict(raw), out=tmp_path / f"{place}")
        exported = export_onnx(tmp_path / f"{place}", tmp_path / f"{place}.onnx")
        model = onnx.load(exported.path)
        files.append({t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer})
    plain, narrow = files
    weights = [name for name in plain if name.endswith("weight")]
    assert all(np.array_equal(plain[name], narrow[name]) for name in weights)
    steps = [name for name in plain if name.endswith(".scale") and plain[name].ndim == 0]
    assert steps
    assert all(narrow[name] < plain[name] for name in steps)


def test_ranges_are_taken_as_all_devices_take_them_or_as_the_runtime_says(
    raw: dict[str, Any],
) -> None:
    ways = {"calibration": "percentile", "percentile": 80}
    raw["fleet"] |= {"profiles": {"phone-mid": 0.5, "sensor-hub": 0.5}}
    raw["fleet"]["runtime_args"] = {"phone-mid": {**ways}, "sensor-hub": {**ways, "weight_bits": 4}}
    assert calibration_of(build(from_dict(raw))) == ways
    raw["fleet"]["runtime_args"]["sensor-hub"] = {}
    assert calibration_of(build(from_dict(raw))) == {}
    raw["runtime"] = {"name": "int8", "args": {"calibration": "moving-average"}}
    raw["fleet"]["runtime_args"]["phone-mid"] = {"calibration": "min-max"}
    assert calibration_of(build(from_dict(raw))) == {"calibration": "moving-average"}


def test_the_file_says_what_it_is_and_how_inputs_are_made(directory: Path) -> None:
    done = export_onnx(directory, directory / "a" / "b.onnx", num_calibration=10)
    world = build(edgelearn.load(directory / "scenario.toml"))
    model = onnx.load(done.path)
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts == done.facts
    assert facts["digest"] == world.scenario.digest
    assert facts["calibration"] == "10 training samples"
    stored = world.train.x[:3].float()
    numbers = {k: float(facts[f"input.{k}"]) for k in ("scale", "mean", "std")}
    x = (stored * numbers["scale"] - numbers["mean"]) / numbers["std"]
    torch.testing.assert_close(x, world.train.batch(torch.arange(3)).x)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [0, *world.sample_shape]


def test_no_test_sample_is_looked_at(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(edgelearn.load(directory / "scenario.toml"))
    first, second = calibration_samples(world, 50), calibration_samples(world, 50)
    assert first.store is world.train
    assert torch.equal(first.ids, second.ids)
    assert len(first.ids.unique()) == 50
    assert int(first.ids.max()) > 0.8 * len(world.train.y)  # drawn from all, not the first ones
    held = np.concatenate([world.train_ids(np.arange(6), position)[0] for position in range(2)])
    assert set(first.ids.tolist()) <= set(held.tolist())
    assert len(calibration_samples(world, 10**6)) == len(set(held.tolist()))
    expected = export_onnx(directory, directory / "a.onnx").path.read_bytes()
    asked_for: list[SharedSamples] = []
    batch = SharedSamples.batch

    def noted(store: SharedSamples, ids: Tensor) -> Any:
        asked_for.append(store)
        return batch(store, ids)

    monkeypatch.setattr(SharedSamples, "batch", noted)
    assert export_onnx(directory, directory / "b.onnx").path.read_bytes() == expected
    assert len({id(store) for store in asked_for}) == 1  # the one that the ranges come from


def test_a_run_that_is_not_finished_has_no_model(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(StateError, match="a run writes it when it is finished"):
        export_onnx(directory, directory / "model.onnx")
    other = FlatModel(torch.nn.Linear(2, 2))
    write_model(directory, other.layout, other.initial())
    with pytest.raises(StateError, match=r"model.safetensors: damaged or of another network"):
        export_onnx(directory, directory / "model.onnx")
    (directory / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StateError, match=r"model.safetensors: damaged or of another network"):
        export_onnx(directory, directory / "model.onnx")
    assert not (directory / "model.onnx").exists()


def test_a_model_that_no_device_answers_with_is_refused(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["stream"] |= {"num_experiences": 2, "rounds_per_experience": 1}
    raw["client"] |= {"strategy": "fedper"}
    edgelearn.simulate(from_dict(raw), out=tmp_path / "run")
    assert main(["export", str(tmp_path / "run")]) == 1
    assert "'fedper' each device answers with parameters of its own" in capsys.readouterr().err


def test_wrong_usage(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(directory), "--calibrate", "0"]) == 2
    assert "got --calibrate 0" in capsys.readouterr().err
    with pytest.raises(RunError, match="at least 1"):
        export_onnx(directory, directory / "model.onnx", num_calibration=0)
    with pytest.raises(RunError, match="those of the device"):
        export_onnx(directory, directory / "model.onnx", weight_bits=0)
