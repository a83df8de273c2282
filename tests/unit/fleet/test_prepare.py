"""Faults that show only once the parts of a run are put together, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgelearn.cli import main
from edgelearn.compress.codec import Codec, Piece
from edgelearn.continual.memory import Declaration
from edgelearn.continual.naive import Naive
from edgelearn.continual.strategy import Facts
from edgelearn.errors import Fault, RunError, ScenarioError
from edgelearn.fleet.prepare import prepare
from edgelearn.fleet.simulate import simulate
from edgelearn.params import FlatModel, Layout
from edgelearn.scenario.load import to_toml
from edgelearn.testing.toy import NUM_CLASSES, SHAPE, toy_scenario

SMALL = {"name": "mlp", "args": {"hidden": [4]}}


def tanh_network(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network that no engine but torch can serve."""
    assert (input_shape, num_classes) == (SHAPE, NUM_CLASSES)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, num_classes))


def narrow_network(**_: Any) -> nn.Module:
    """A network for samples of another size."""
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4))


class Bounded(Codec):
    """A codec whose messages differ in size."""

    def pieces(self, layout: Layout) -> dict[str, Piece]:
        return {"values": Piece((layout.size,), torch.float32, is_bound=True)}

    def encode(self, layout: Layout, update: Tensor, generator: torch.Generator) -> Any:
        raise NotImplementedError

    def decode(self, layout: Layout, message: Any) -> Tensor:
        raise NotImplementedError

    def error(self, layout: Layout, update: Tensor) -> Tensor:
        raise NotImplementedError


class Demanding(Naive):
    """A strategy that can't do with just any network."""

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        raise RunError("a network of 7 parameters is needed")


def board(folder: Path, text: str = "") -> str:
    path = folder / "board.toml"
    rest = "downlink_mbps = 1\nuplink_mbps = 1\npower_w = 1\nradio_j_per_mb = 1\n"
    path.write_text(text or f"memory_mib = 0.0003\ntrain_gflops = 1\n{rest}")
    return str(path)


def found(**tables: Any) -> tuple[Fault, ...]:
    with pytest.raises(ScenarioError) as caught:
        prepare(toy_scenario(**tables))
    return caught.value.faults


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "networks of which none stays on its device": (
        {"model": {"variants": {"small": {**SMALL, "share": 0.5}}}},
        "model.variants",
        "devices of different networks can't average them, as 'naive' does",
    ),
    "more layers than there are": (
        {"client": {"train": "last:9"}},
        "client.train",
        "got 'last:9'; the network has 2 layers with parameters",
    ),
    "a layer that is not there": (
        {"client": {"train": ["1.weigth"]}},
        "client.train",
        "'1.weigth' is no layer or tensor that is trained (did you mean '1.weight'?)",
    ),
    "parts of a batch for a strategy with a gradient of its own": (
        {"client": {"strategy": "gem", "accumulate": 2}},
        "client.accumulate",
        "'gem' takes the gradient by itself",
    ),
    "no public samples": (
        {"client": {"strategy": "fedmd"}},
        "data.public",
        "fedmd exchanges answers to public samples, and there are none",
    ),
    "a network that the runtime can't serve": (
        {
            "model": {"name": f"{__file__}:tanh_network", "args": {}},
            "runtime": {"name": "onnxruntime"},
        },
        "runtime.name",
        "'onnxruntime' can't serve the network: Tanh at '2' can't be written down",
    ),
    "a network for other samples": (
        {"model": {"name": f"{__file__}:narrow_network", "args": {}}},
        "model.name",
        "the network can't take samples (1, 4, 4): ",
    ),
    "a stored network whose file is not there": (
        {"model": {"name": "stored", "args": {"file": "nowhere.safetensors"}}},
        "model.args",
        "nowhere.safetensors: the file is missing",
    ),
    "messages of no fixed size, compressed": (
        {"wire": {"codec": f"{__file__}:Bounded+lzma"}},
        "wire.codec",
        "Bounded declares 'values' of no fixed size",
    ),
    "the same where ranges are kept": (
        {
            "model": {"name": f"{__file__}:narrow_network", "args": {}},
            "runtime": {"recalibrate": "on-drift"},
        },
        "model.name",
        "the network can't take samples (1, 4, 4): ",
    ),
    "a network whose ranges the runtime can't keep": (
        {
            "model": {"name": f"{__file__}:tanh_network", "args": {}},
            "runtime": {"name": "onnxruntime", "recalibrate": "tracked"},
        },
        "runtime.name",
        "'onnxruntime' can't serve the network: Tanh at '2' can't be written down",
    ),
    "a server that steps on what is only added up": (
        {"client": {"strategy": "scaffold"}, "server": {"strategy": "FedAdam"}},
        "server.strategy",
        "FedAdam makes steps of its own",
    ),
    "a strategy that can't learn so": (
        {"client": {"strategy": f"{__file__}:Demanding"}},
        "model.name",
        "a network of 7 parameters is needed",
    ),
    "a class that is not in its module": (
        {"client": {"strategy": "edgelearn.continual.naive:Niave"}},
        "client.strategy",
        "Niave",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_told_by_validate_and_by_run_alike(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, place, told = CASES[name]
    (fault,) = found(**tables)
    assert f"{fault.table}.{fault.key}" == place
    assert told in fault.message
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(toy_scenario(**tables)))
    assert main(["validate", str(path)]) == 2
    of_validate = capsys.readouterr().err
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    of_run = capsys.readouterr().err
    assert of_validate == of_run
    line = next(line for line in of_run.splitlines() if told in line)
    number = int(line.split(":")[0].removeprefix("  line "))
    at = path.read_text().splitlines()[number - 1]
    key = fault.key
    assert at.startswith((f"{key} = ", f"[{fault.table}]", f"[{fault.table}.{key}"))
    assert not (tmp_path / "out").exists()


def test_all_faults_are_told_at_once() -> None:
    tables = {
        "model": {"variants": {"small": {**SMALL, "share": 0.5}}},
        "data": {"public": 8},
        "client": {"strategy": "fedmd", "train": ["9"]},
        "server": {"strategy": "FedAvgg"},
        "fleet": {"profiles": {"phone": 1.0}},
    }
    places = [f"{fault.table}.{fault.key}" for fault in found(**tables)]
    assert places == ["server.strategy", "fleet.profiles.phone", "client.train"]


def test_a_faulty_profile_is_named_with_its_file(tmp_path: Path) -> None:
    reference = board(tmp_path, "memory_mib = -1\n")
    faults = found(fleet={"profiles": {reference: 1.0}})
    assert {(fault.table, fault.key) for fault in faults} == {("fleet.profiles", reference)}
    assert f"{reference}: memory_mib: got -1; expected a number above 0" in faults[0].message


def test_a_device_that_is_too_small_is_told_at_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = board(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(toy_scenario(fleet={"profiles": {"phone-mid": 1, reference: 1}})))
    assert main(["validate", str(path)]) == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if "answering needs" in text)
    number = int(line.split(":")[0].removeprefix("  line "))
    assert reference in path.read_text().splitlines()[number - 1]


def test_an_option_is_named_in_place_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "split-digits", "--set", "client.train=last:9"]) == 2
    assert "(from --set client.train)" in capsys.readouterr().err
    bad = ["--client", "fedmd", "--set", "data.max_train=200", "--seed", "1"]
    assert main(["run", "split-digits", *bad]) == 2
    err = capsys.readouterr().err
    assert "split-digits.toml: 1 fault" in err
    assert "[data] public: fedmd exchanges answers" in err


def test_what_fits_together_runs() -> None:
    parts = prepare(toy_scenario())
    assert len(parts.profiles) == 4
    assert simulate(toy_scenario()).is_complete
