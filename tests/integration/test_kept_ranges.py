"""Whole runs in which devices keep activation ranges: how often they observe, and same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.learners import FleetLearners
from edgelearn.device.runtimes import NUM_OBSERVED, RANGES
from edgelearn.federated.checkpoint import Checkpoint
from edgelearn.federated.journal import FileJournal
from edgelearn.fleet import native
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.fleet.simulated import tables_of
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build

Make = Callable[..., Scenario]
ON_DRIFT = {"recalibrate": "on-drift"}
TRACKED = {"recalibrate": "tracked"}
NUM_DEVICES = 6


def remembered(scenario: Scenario, directory: Path, name: str) -> NDArray[Any]:
    """What all devices have under a name at the end of a run [D, ...]."""
    learners = FleetLearners(build(scenario))
    checkpoint = FileJournal(directory).resume()
    assert isinstance(checkpoint, Checkpoint)
    store = FleetStore(
        directory / "devices.bin",
        learners.whole.declaration,
        NUM_DEVICES,
        tables_of(checkpoint.tensors),
        record_bytes=learners.record_bytes,
    )
    devices = np.arange(NUM_DEVICES)
    slots, _ = store.slots_of(devices)
    return store.file.gather(name, devices, slots, fill=0)


def evaluations(directory: Path) -> list[Any]:
    """What the record says of the served and the float model."""
    lines = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()]
    rows = [line["accuracy"] for line in lines if line.get("accuracy")]
    return [*rows, *[line for line in lines if line["kind"] == "devices"]]


def result(scenario: Scenario, directory: Path, **options: Any) -> tuple[Any, ...]:
    simulate(scenario, out=directory, **options)
    return outcome(scenario, directory)


def outcome(scenario: Scenario, directory: Path) -> tuple[Any, ...]:
    tables = remembered(scenario, directory, RANGES).tobytes()
    counts = remembered(scenario, directory, NUM_OBSERVED).ravel().tolist()
    model = (directory / "model.safetensors").read_bytes()
    return evaluations(directory), model, tables, counts


def test_ranges_of_a_model_that_stands_still_are_observed_once(small: Make, tmp_path: Path) -> None:
    """And those of each evaluation give the same answers, since they are the same."""
    still = small(
        client={"lr": 1e-30},
        stream={"num_experiences": 1, "rounds_per_experience": 3},
        runtime=ON_DRIFT,
    )
    rows, model, _, counts = result(still, tmp_path / "kept")
    assert counts == [1] * NUM_DEVICES
    always = small(client={"lr": 1e-30}, stream={"num_experiences": 1, "rounds_per_experience": 3})
    simulate(always, out=tmp_path / "always")
    assert evaluations(tmp_path / "always") == rows
    assert (tmp_path / "always" / "model.safetensors").read_bytes() == model
    assert len(rows) == 5  # at the start, after three rounds, and each device's own


DOUBLING = """
import edgelearn

class Doubling(edgelearn.ClientStrategy):
    def leave(self, passage, memory):
        return 2 * passage.given, memory
"""


def test_ranges_of_a_model_that_leaps_are_observed_each_time(small: Make, tmp_path: Path) -> None:
    """And then all is as it is where none are kept."""
    (tmp_path / "doubling.py").write_text(DOUBLING)
    wild = {"client": {"strategy": f"{tmp_path}/doubling.py:Doubling", "args": {}}}
    rows, model, _, counts = result(small(**wild, runtime=ON_DRIFT), tmp_path / "kept")
    assert counts == [5] * NUM_DEVICES  # at the start, and after each of four rounds
    simulate(small(**wild), out=tmp_path / "always")
    assert evaluations(tmp_path / "always") == rows
    assert (tmp_path / "always" / "model.safetensors").read_bytes() == model


def test_what_training_has_shown_need_not_be_observed(small: Make, tmp_path: Path) -> None:
    """Each device serves the weights that it had after training, and has seen their ranges."""
    (tmp_path / "doubling.py").write_text(DOUBLING)
    wild = {
        "client": {"strategy": f"{tmp_path}/doubling.py:Doubling", "args": {}},
        "fleet": {"num_devices": NUM_DEVICES, "cohort": NUM_DEVICES},
        "stream": {"num_experiences": 1, "rounds_per_experience": 3},
    }
    for runtime, expected in ((ON_DRIFT, 4), (TRACKED, 1)):
        counts = result(small(**wild, runtime=runtime), tmp_path / runtime["recalibrate"])[-1]
        assert counts == [expected] * NUM_DEVICES


def test_any_number_of_workers(small: Make, tmp_path: Path) -> None:
    """And the ranges have no effect on learning."""
    scenario, alone = small(runtime=TRACKED), {"engine": "reference"}
    expected = result(scenario, tmp_path / "alone", **alone)
    assert NUM_DEVICES < sum(expected[-1]) < 5 * NUM_DEVICES
    assert result(scenario, tmp_path / "two", engine="pool", num_workers=2) == expected
    simulate(small(), out=tmp_path / "always", **alone)
    assert (tmp_path / "always" / "model.safetensors").read_bytes() == expected[1]


def test_engines_agree(small: Make, tmp_path: Path) -> None:
    """To rounding in the weights, so in the ranges; `si` has memory that every engine writes."""
    scenario = small(client={"strategy": "si", "args": {}}, runtime=TRACKED)
    rows, _, _, counts = result(scenario, tmp_path / "reference", engine="reference")
    ranges = remembered(scenario, tmp_path / "reference", RANGES)
    for tier in ("batched", *["native"] * native.is_installed()):
        found = result(scenario, tmp_path / tier, engine=tier, num_workers=1)
        assert (found[0], found[-1]) == (rows, counts)
        np.testing.assert_allclose(remembered(scenario, tmp_path / tier, RANGES), ranges, rtol=1e-4)
    if native.is_installed():
        assert result(scenario, tmp_path / "two", engine="native", num_workers=2) == found


class Crash(BaseException):
    """Stands for the death of the process: nothing that handles errors may see it."""


def test_a_run_that_is_resumed_goes_on_with_its_ranges(small: Make, tmp_path: Path) -> None:
    scenario = small(runtime=TRACKED)
    expected = result(scenario, tmp_path / "whole", checkpoint_every_s=0)

    def stop(progress: Any) -> None:
        if progress.server_round == 3:
            raise Crash

    with pytest.raises(Crash):
        simulate(scenario, out=tmp_path / "run", on_round=stop, checkpoint_every_s=0)
    assert 0 < remembered(scenario, tmp_path / "run", NUM_OBSERVED).sum() < sum(expected[-1])
    resume(tmp_path / "run", checkpoint_every_s=0)
    assert outcome(scenario, tmp_path / "run") == expected


def test_ranges_count_in_the_memory_of_a_device(small: Make) -> None:
    """Two linear layers: an int8 network has a range for the input of each."""
    learners = [FleetLearners(build(small(runtime=r))).whole for r in ({}, ON_DRIFT)]
    assert learners[1].memory_bytes - learners[0].memory_bytes == 2 * 4 * 4 + 8
    assert learners[1].declaration[RANGES].shape == (2, 4)
    floats = FleetLearners(build(small(runtime={**ON_DRIFT, "name": "float"}))).whole
    assert floats.memory_bytes == learners[0].memory_bytes


def test_kinds_of_devices_have_ranges_where_their_own_runtime_does(
    small: Make, tmp_path: Path
) -> None:
    """Float devices beside quantized ones: one declaration, and nothing in it for the former."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    scenario = small(
        fleet={
            "profiles": {"phone-mid": 0.5, "sensor-hub": 0.5},
            "runtime_args": {"sensor-hub": {"weight_bits": 32}},
        },
        runtime={"name": "onnxruntime", "args": {"weight_bits": 7}, **ON_DRIFT},
    )
    counts = result(scenario, tmp_path / "run")[-1]
    kinds = build(scenario).kinds
    names = [kinds.of_device(device).name for device in range(NUM_DEVICES)]
    assert {n for n, count in zip(names, counts, strict=True) if count} == {"phone-mid"}
    assert all(count > 0 for n, count in zip(names, counts, strict=True) if n == "phone-mid")
