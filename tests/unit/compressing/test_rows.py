"""A pipeline measured: rows, files, the report, and what is refused before anything is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgelearn.compress import structured
from edgelearn.compress.cost import cost
from edgelearn.compress.stored import read
from edgelearn.compressing.command import compress_subject
from edgelearn.compressing.run import Report, compress
from edgelearn.compressing.subject import Subject
from edgelearn.errors import ExtraMissingError, RunError, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.samples import Samples
from edgelearn.testing.toy import toy_model, toy_samples

PIPELINE = "train(12, lr=0.02) | prune(0.5) | quantize | pack"


def samples(num_per_class: int = 15) -> Samples:
    store = toy_samples(num_per_class)
    return Samples(store, torch.arange(len(store.y), dtype=torch.int32))


def small(**options: Any) -> Report:
    options = {
        "train": samples(),
        "test": samples(5),
        "pipeline": PIPELINE,
        "num_runs": 3,
        "facts": {"model": "toy"},
        **options,
    }
    return compress(toy_model().module, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("compressing") / "out"
    return small(out=out), out


def test_each_stage_has_a_row_that_says_what_the_network_costs(done: tuple[Report, Path]) -> None:
    report, _ = done
    stages = ["given", "train(12, lr=0.02)", "prune(0.5)", "quantize(8)", "pack"]
    assert [row.stage for row in report.rows] == stages
    x = samples().batch().x
    for row, module in zip(report.rows, report.networks, strict=True):
        found = cost(module, x)
        assert (row.parameters, row.nonzero, row.macs) == (172, found.nonzero, 16 * 8 + 8 * 4)
        assert 0 < row.p50_ms <= row.p99_ms
    assert [row.nonzero for row in report.rows[1:3]] == [172, 172 - 80]
    assert [row.runtime for row in report.rows] == ["float, torch"] * 3 + [
        "int8, 8-bit weights"
    ] * 2
    assert report.rows[0].accuracy < report.rows[1].accuracy == 1.0


def test_accuracy_is_that_of_the_served_network_on_the_test_samples(
    done: tuple[Report, Path],
) -> None:
    report, _ = done
    model = FlatModel(report.networks[3])
    test, train = samples(5).batch(), samples().batch()
    predict = Int8Runtime().prepare(model, model.initial()).calibrated(train.x)  # all 60
    right = float((predict(test.x).argmax(1) == test.y).double().mean())
    assert report.rows[3].accuracy == right
    assert report.rows[3].memory_bytes == predict.model_bytes


def test_the_files_are_what_the_rows_say(done: tuple[Report, Path]) -> None:
    report, out = done
    names = [row.artefact for row in report.rows]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "report.json"])
    for row, module in zip(report.rows, report.networks, strict=True):
        data = (out / row.artefact).read_bytes()
        assert len(data) == row.disk_bytes
        found = read(data, source=row.artefact)
        assert found.facts["model"] == "toy"
        assert found.facts["pipeline"].startswith("train(12")
        model = FlatModel(module)
        for name, value in model.layout.views(model.initial()).items():
            step = float(value.abs().max()) / 127
            torch.testing.assert_close(found.tensors[name], value, rtol=0, atol=0.51 * step)
    disk = [row.disk_bytes for row in report.rows]
    assert disk[3] < disk[2] == disk[1]


def test_the_report_holds_the_rows_and_what_they_depend_on(done: tuple[Report, Path]) -> None:
    report, out = done
    found = json.loads((out / "report.json").read_text())
    assert found == json.loads(json.dumps(report.as_dict()))
    assert found["pipeline"] == "train(12, lr=0.02) | prune(0.5) | quantize(8) | pack"
    assert (found["num_train"], found["num_test"], found["model"]) == (60, 20, "toy")
    assert found["rows"][2]["nonzero"] == 92
    assert set(found["versions"]) == {"torch", "numpy"}


def test_without_a_folder_nothing_is_written_and_the_numbers_are_the_same(
    done: tuple[Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    again = small(on_row=lambda row: seen.append(row.stage))
    assert not list(tmp_path.iterdir())
    assert seen == [row.stage for row in again.rows]
    timed = {"p50_ms", "p99_ms"}
    for one, other in zip(done[0].as_dict()["rows"], again.as_dict()["rows"], strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(RunError, match="is not empty; nothing was changed"):
        small(out=tmp_path)
    with pytest.raises(RunError, match="is not empty"):
        small(out=tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_faults_are_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = Samples(toy_samples(), torch.empty(0, dtype=torch.int32))

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(structured, "import_module", missing)
    for options, kind, message in (
        ({"pipeline": "train | prun"}, ScenarioError, "did you mean 'prune'"),
        ({"pipeline": "train | quantize(args={bits=3})"}, ScenarioError, "runtime.args"),
        ({"pipeline": "train | prune_channels"}, ExtraMissingError, "torch-pruning"),
        ({"test": nobody}, RunError, "60 training samples and 0 test samples"),
    ):
        with pytest.raises(kind, match=message):
            small(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


class Mixing(nn.Module):
    """Multiplies the pixels of an image with each other, outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)
        return self.head(torch.bmm(x, x).flatten(1))


def test_macs_that_can_not_be_counted_are_no_number_and_no_obstacle(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    subject = Subject(
        module=Mixing(),
        train=samples(),
        test=samples(5),
        factory=lambda *_: Mixing(),
        facts={"model": "mixing", "dataset": "toy"},
        pipeline="quantize",
        seed=0,
    )
    out = tmp_path / "out"
    report = compress_subject(subject, pipeline="prune(0.5) | quantize", out=out, num_runs=2)
    assert [(row.macs, row.uncounted) for row in report.rows] == [(None, "bmm")] * 3
    assert capsys.readouterr().out.count("not counted: bmm") == 3
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert rows[0]["macs"] is None


def test_a_row_says_how_many_bits_are_served() -> None:
    report = small(pipeline="quantize(4, args={weight_bits=4})")
    assert [row.runtime for row in report.rows] == ["float, torch", "int8, 4-bit weights"]
    seen = small(pipeline="quantize(4)")
    assert seen.rows[1].runtime == "int8, 8-bit weights", "by default codes of 4 are served as 8"


def test_onnxruntime_executes_float_and_integers_alike(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    line = 'train(10, lr=0.02) | quantize(runtime="onnxruntime", args={weight_bits=7}) | pack'
    report = small(pipeline=line, out=tmp_path / "out")
    float_engine, integers = "float, onnxruntime", "onnxruntime, 7-bit weights"
    assert [row.runtime for row in report.rows] == [float_engine] * 2 + [integers] * 2
    assert [row.accuracy for row in report.rows[1:]] == [1.0] * 3
    row = report.rows[2]
    assert row.artefact == "2-quantize.onnx"
    stored = onnx.load(tmp_path / "out" / row.artefact)
    assert {p.key: p.value for p in stored.metadata_props}["model"] == "toy"
    kinds = {node.op_type for node in stored.graph.node}
    assert "QuantizeLinear" in kinds
