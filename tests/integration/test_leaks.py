"""Strategies that try to send a sample: none gets it, or anything of it, off its device."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import edgelearn
from edgelearn.errors import RunError
from edgelearn.federated.record import RunRecord
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.world import build
from edgelearn.testing.toy import toy_scenario

FILE = Path(__file__).with_name("leaky.py")


def _plugins() -> Any:
    spec = importlib.util.spec_from_file_location("leaky_plugins", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaky_plugins"] = module
    spec.loader.exec_module(module)
    return module


leaky = _plugins()


def scenario(strategy: str, *, dataset: str = "dataset", num_devices: int = 4) -> Any:
    return toy_scenario(
        data={"dataset": f"{FILE}:{dataset}"},
        fleet={"num_devices": num_devices, "cohort": num_devices},
        client={"strategy": f"{FILE}:{strategy}", "lr": 0.3},
        server={"strategy": f"{FILE}:Eavesdropper"},
    )


@pytest.fixture
def overheard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "overheard"
    monkeypatch.setenv("EDGELEARN_TEST_EAVESDROP", str(path))
    return path


def holder() -> int:
    """Return the device that holds the canary."""
    world = build(scenario("Honest"))
    owners = [d for d, part in enumerate(world.train_parts) if leaky.PLACE in part]
    assert len(owners) == 1
    return owners[0]


def everything_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_no_canary(places: dict[str, bytes]) -> None:
    for name, content in places.items():
        for form in leaky.forms():
            assert form not in content, f"{form!r} in {name}"


def assert_refused(record: RunRecord, device: int, message: str) -> None:
    """In the first experience, which has the canary, the device fails in every round; not later."""
    for line in record.rounds:
        if line["position"] > 0:
            assert line["problems"] == []
            assert line["outcomes"]["ok"] == 4
            continue
        assert line["outcomes"]["failed"] == 1
        assert line["outcomes"]["ok"] == 3
        (problem,) = line["problems"]
        assert (problem["device"], problem["outcome"]) == (device, "failed")
        assert problem["reason"].startswith("EgressError: not sent: ")
        assert message in problem["reason"]


def test_there_are_leaks_for_every_kind_of_thing_that_a_reply_can_hold() -> None:
    own = {
        value
        for value in vars(leaky).values()
        if isinstance(value, type) and issubclass(value, leaky.Leaky) and value is not leaky.Leaky
    }
    assert own - set(leaky.LEAKS) == {leaky.TwoFacedMetrics}


@pytest.mark.parametrize("kind", leaky.LEAKS, ids=lambda kind: kind.__name__)
def test_a_leak_is_stopped_on_the_device(kind: Any, tmp_path: Path, overheard: Path) -> None:
    out = tmp_path / "run"
    record = simulate(scenario(kind.__name__), out=out, checkpoint_every_s=0)
    assert_refused(record, holder(), leaky.LEAKS[kind])
    places = everything_in(out)
    assert {"record.jsonl", "model.safetensors", "devices.bin"} <= set(places)
    places["replies"] = overheard.read_bytes()
    assert len(places["replies"]) > 10_000
    assert_no_canary(places)


def test_worker_processes_stop_it_too(tmp_path: Path, overheard: Path) -> None:
    out = tmp_path / "run"
    record = simulate(scenario("HugeNumber"), out=out, engine="pool", num_workers=2)
    assert_refused(record, holder(), "the metric 'num-examples'")
    assert_no_canary({**everything_in(out), "replies": overheard.read_bytes()})


def test_what_is_checked_is_what_is_sent(tmp_path: Path, overheard: Path) -> None:
    """Metrics that show the guard one face and the wire another: only the first is ever seen."""
    out = tmp_path / "run"
    record = simulate(scenario("TwoFacedMetrics"), out=out, checkpoint_every_s=0)
    assert all(line["outcomes"]["ok"] == 4 for line in record.rounds)
    assert_no_canary({**everything_in(out), "replies": overheard.read_bytes()})


def test_the_model_does_not_depend_on_a_sample_whose_device_was_refused(
    tmp_path: Path, overheard: Path
) -> None:
    def model(strategy: str, dataset: str) -> dict[str, np.ndarray]:
        out = tmp_path / f"{strategy}-{dataset}"
        simulate(scenario(strategy, dataset=dataset), out=out)
        return load_file(out / "model.safetensors")

    def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
        return all(np.array_equal(one[name], other[name]) for name in one)

    names = ("dataset", "dataset_with_another_canary")
    assert not same(*(model("Honest", name) for name in names))
    assert same(*(model("WrongDtype", name) for name in names))


def test_where_every_device_leaks_the_run_ends_and_says_why(overheard: Path) -> None:
    with pytest.raises(RunError, match=r"every device .* EgressError: not sent: a metric") as error:
        simulate(scenario("ListInMetrics", num_devices=1))
    assert_no_canary({"error": str(error.value).encode()})


SECRETIVE = """
    from edgelearn import ClientStrategy
    from edgelearn.errors import RunError


    class Text(ClientStrategy):
        def loss(self, model, params, batch, memory):
            raise ValueError(f"pixels {batch.x[0].flatten().tolist()}")


    class Kind(ClientStrategy):
        def loss(self, model, params, batch, memory):
            raise type(f"pixels_{int(batch.x.sum())}", (ValueError,), {})()


    class Ours(ClientStrategy):
        def loss(self, model, params, batch, memory):
            raise RunError(f"pixels {batch.x[0].flatten().tolist()}")


    class Memory(ClientStrategy):
        def after_step(self, before, after, gradients, memory):
            return {f"pixels {float(after.sum())}": after}
"""


@pytest.mark.parametrize("name", ["Text", "Kind", "Ours", "Memory"])
def test_the_text_of_an_error_stays_on_the_device(tmp_path: Path, name: str) -> None:
    path = tmp_path / "secretive.py"
    path.write_text(textwrap.dedent(SECRETIVE))
    out = tmp_path / "run"
    scenario = edgelearn.load("split-digits", client={"strategy": f"{path}:{name}", "args": {}})
    with pytest.raises(RunError, match="the device's own log says more") as caught:
        simulate(scenario, out=out)
    assert "pixels" not in str(caught.value)
    assert "pixels" not in (out / "record.jsonl").read_text()
