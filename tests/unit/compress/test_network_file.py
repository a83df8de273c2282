"""A stored network as a scenario's model: it begins with the file's sizes and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgelearn
from edgelearn.compress.network_file import stored
from edgelearn.compress.stored import store
from edgelearn.compress.structured import prune_channels
from edgelearn.compressing.subject import find
from edgelearn.errors import StateError
from edgelearn.scenario.models import mlp
from edgelearn.scenario.world import build
from edgelearn.testing.toy import toy_scenario

FACTS = {"model": "mlp", "args": '{"hidden": [32]}', "dataset": "digits"}
SHAPE, CLASSES = (1, 8, 8), 10


@pytest.fixture
def smaller() -> nn.Module:
    torch.manual_seed(3)
    whole = mlp(input_shape=SHAPE, num_classes=CLASSES, hidden=[32])
    return prune_channels(whole, torch.zeros(1, *SHAPE), ratio=0.5)


@pytest.fixture
def file(tmp_path: Path, smaller: nn.Module) -> Path:
    path = tmp_path / "small.safetensors"
    path.write_bytes(store(smaller, facts=FACTS))
    return path


def test_a_fleet_begins_with_what_the_file_holds(file: Path, smaller: nn.Module) -> None:
    scenario = edgelearn.load("split-digits", model={"name": "stored", "args": {"file": str(file)}})
    model = build(scenario).model()
    expected = torch.cat([parameter.flatten() for parameter in smaller.parameters()])
    assert torch.equal(model.initial(), expected)
    assert model.layout.shapes[0] == (16, 64)


def test_the_digest_is_of_what_the_file_holds(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(path: Path) -> str:
        return toy_scenario(model={"name": "stored", "args": {"file": str(path)}}).digest

    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(file.read_bytes())
    other.write_bytes(file.read_bytes() + b"x")
    assert digest(file) == digest(moved) != digest(other)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert digest(Path("~/moved.safetensors")) == digest(file)


def test_what_does_not_fit_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"does not fit samples \(1, 9, 9\) of 10 classes"):
        stored(input_shape=(1, 9, 9), num_classes=CLASSES, file=str(file))
    with pytest.raises(StateError, match="it answers"):
        stored(input_shape=SHAPE, num_classes=12, file=str(file))
    with pytest.raises(StateError, match="nowhere"):
        stored(input_shape=SHAPE, num_classes=CLASSES, file=str(tmp_path / "nowhere"))
    with pytest.raises(StateError, match="cannot be read: Is a directory"):
        stored(input_shape=SHAPE, num_classes=CLASSES, file=str(tmp_path))
    anonymous = tmp_path / "anonymous.safetensors"
    anonymous.write_bytes(store(nn.Linear(2, 2)))
    with pytest.raises(StateError, match="does not say its model"):
        stored(input_shape=SHAPE, num_classes=CLASSES, file=str(anonymous))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StateError, match="small"):
        stored(input_shape=SHAPE, num_classes=CLASSES, file=str(file))


@pytest.mark.parametrize("args", ["not JSON", "[1]"])
def test_arguments_that_are_none_are_damage(tmp_path: Path, args: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(store(nn.Linear(2, 2), facts={**FACTS, "args": args}))
    with pytest.raises(StateError, match=r"odd\.safetensors: damaged: its args"):
        stored(input_shape=SHAPE, num_classes=CLASSES, file=str(path))


def test_a_file_of_a_stored_network_says_what_it_was_stored_as(file: Path) -> None:
    subject = find("stored", args={"file": str(file)}, max_train=20, max_test=10)
    assert subject.facts["model"] == "mlp"
    assert subject.facts["args"] == FACTS["args"]
