"""Codecs in whole runs: what crosses the wire, what is booked, and what a device keeps of it."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgelearn.continual.strategy import Update
from edgelearn.device.fleet_store import RecordFile
from edgelearn.device.learners import make_learner
from edgelearn.device.state import RESIDUAL, Fit
from edgelearn.errors import RunError, ScenarioError
from edgelearn.federated import by_message
from edgelearn.federated import messages as wire
from edgelearn.fleet.simulate import resume, simulate
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build
from edgelearn.testing.toy import toy_scenario

Make = Callable[..., Scenario]
CODECS: dict[str, dict[str, Any]] = {
    "float16": {},
    "int8": {},
    "int4": {"block": 64},
    "top-k": {"share": 0.1},
    "random-k": {"share": 0.2, "values": "int8", "feedback": True},
    "int4+lzma": {},
    "top-k+lzma": {"share": 0.1},
    "random-k+lzma": {"share": 0.2, "values": "int4", "block": 64},
}
FEDERATIONS = ("faithful", "fused")
DIFFERS = {"wall_s", "cpu_s", "engine", "updates_per_s"}


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in DIFFERS} for line in found]


def model_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def distance(one: Path, other: Path) -> float:
    models = model_of(one), model_of(other)
    return max(float((models[0][name] - models[1][name]).abs().max()) for name in models[0])


def assert_alike(one: Path, other: Path, *, within: float = 1e-6, sizes_vary: bool = False) -> None:
    for found, expected in zip(lines(one), lines(other), strict=True):
        for name in ("bytes_down", "outcomes", "cohort", "problems"):
            assert found.get(name) == expected.get(name)
        for name in ("bytes_up", "clock_s"):
            if name in expected:
                share = 0.01 if sizes_vary else 0.0
                assert found[name] == pytest.approx(expected[name], rel=share, abs=0)
    assert distance(one, other) <= within


@pytest.mark.parametrize("codec", CODECS)
def test_fused_equals_faithful(small: Make, tmp_path: Path, codec: str) -> None:
    """To rounding in the first round, from equal parameters; the same bytes in all.

    Where bytes depend on the update, they do from the second round on, as its codes do.
    """
    spec = {"codec": codec, "args": CODECS[codec]}
    for name, stream in (("one", {"num_experiences": 1, "rounds_per_experience": 1}), ("all", {})):
        base = {"num_experiences": 2, "rounds_per_experience": 2}
        scenario = small(wire=spec, stream={**base, **stream}, fleet={"cohort": 6})
        for mode in ("faithful", "fused"):
            record = simulate(scenario, out=tmp_path / f"{name}-{mode}", federation=mode)
            assert record.run["engine"]["federation"] == mode
            assert all(line["outcomes"]["ok"] == 6 for line in record.rounds)
    assert_alike(tmp_path / "one-fused", tmp_path / "one-faithful")
    # Rounding can move a number to the next code later on, which is within the codec's own error.
    assert_alike(
        tmp_path / "all-fused",
        tmp_path / "all-faithful",
        within=5e-3,
        sizes_vary=codec.endswith("lzma"),
    )


@pytest.mark.parametrize("strategy", ["replay", "ewc", "scaffold", "replay+ewc"])
@pytest.mark.parametrize("codec", ["int8", "top-k"])
def test_it_goes_with_any_client_strategy(
    small: Make, tmp_path: Path, strategy: str, codec: str
) -> None:
    scenario = small(
        client={"strategy": strategy, "args": {}}, wire={"codec": codec}, fleet={"cohort": 6}
    )
    plain = small(client={"strategy": strategy, "args": {}}, fleet={"cohort": 6})
    bytes_up = {}
    for name, one in (("coded", scenario), ("plain", plain)):
        record = simulate(one, out=tmp_path / name)
        assert all(line["outcomes"]["ok"] == 6 for line in record.rounds)
        bytes_up[name] = record.rounds[0]["bytes_up"]
    assert bytes_up["coded"] < 0.5 * bytes_up["plain"]
    assert 0 < distance(tmp_path / "coded", tmp_path / "plain") < 0.5
    how = "faithful" if strategy == "replay" else "fused"
    simulate(scenario, out=tmp_path / "workers", engine="pool", num_workers=2, federation=how)
    simulate(scenario, out=tmp_path / "alone", engine="reference", federation=how)
    assert (tmp_path / "workers" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    assert lines(tmp_path / "workers") == lines(tmp_path / "alone")


@pytest.mark.parametrize(
    ("codec", "args", "federation"),
    [
        *((c, {}, f) for c in ("int8", "top-k", "random-k", "top-k+lzma") for f in FEDERATIONS),
        ("top-k", {"values": "int4", "block": 16}, "faithful"),
        ("random-k+lzma", {"values": "int4", "block": 16, "feedback": True}, "fused"),
        ("top-k", {"values": "int8", "block": 7, "feedback": False, "rescale": True}, "fused"),
    ],
)
def test_a_resumed_run_has_the_same_bits(
    small: Make, tmp_path: Path, codec: str, args: dict[str, Any], federation: str
) -> None:
    class Crash(BaseException):
        pass

    def stop(progress: Any) -> None:
        if progress.server_round == 3:
            raise Crash

    scenario = small(wire={"codec": codec, "args": args}, fleet={"cohort": 4})
    simulate(scenario, out=tmp_path / "whole", federation=federation)
    cut = tmp_path / "cut"
    with pytest.raises(Crash):
        simulate(scenario, out=cut, federation=federation, on_round=stop, checkpoint_every_s=0)
    resume(cut)
    assert lines(cut) == lines(tmp_path / "whole")
    assert (cut / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_the_message_is_what_crosses_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, tuple[str, tuple[int, ...]]], int]] = []
    original = by_message.ByMessage._admit

    def admit(self: Any, device: int, reply: Any, params: torch.Tensor, limit: float) -> Any:
        arrays = wire.arrays_of(reply)
        kinds = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
        seen.append((kinds, wire.num_bytes(reply.content)))
        return original(self, device, reply, params, limit)

    monkeypatch.setattr(by_message.ByMessage, "_admit", admit)
    record = simulate(toy_scenario(wire={"codec": "int4"}), federation="faithful")
    size = make_learner(build(toy_scenario())).model.layout.size
    expected = {"codes": ("uint8", (-(-size // 2),)), "scales": ("float32", (4,))}
    assert len(seen) == 16
    assert all(kinds == expected for kinds, _ in seen)
    assert record.rounds[0]["bytes_up"] >= sum(count for _, count in seen[:4])


@pytest.mark.parametrize("federation", ["faithful", "fused"])
def test_bytes_are_those_of_what_is_sent(federation: str) -> None:
    """A large network, so that headers don't matter: 4 bytes become what the codec states."""
    model = {"name": "mlp", "args": {"hidden": [400]}}

    def sent(**table: Any) -> int:
        scenario = toy_scenario(wire=table, model=model)
        return int(simulate(scenario, federation=federation).rounds[0]["bytes_up"])

    whole = sent()
    for table, ratio in (
        ({"codec": "float16"}, 2.0),
        ({"codec": "int8"}, 4 / (1 + 4 / 256)),
        ({"codec": "int4"}, 4 / (0.5 + 4 / 256)),
        ({"codec": "top-k", "args": {"share": 0.1}}, 4 / (0.4 + 1 / 8)),
        ({"codec": "top-k", "args": {"share": 0.01, "values": "int8"}}, 4 / 0.05),
        ({"codec": "random-k", "args": {"share": 0.1}}, 10.0),
        ({"codec": "random-k", "args": {"share": 0.1, "values": "int4", "block": 64}}, 71.0),
    ):
        # Four devices' replies, and beside them what they say when they evaluate.
        overhead = 4 * 1200
        assert whole / ratio - overhead < sent(**table) < whole / ratio + overhead, table


def test_what_was_not_sent_is_kept_and_sent_later(tmp_path: Path) -> None:
    """One device, whose every update but for a tenth is held back: sums are the same at the end."""
    scenario = toy_scenario(
        wire={"codec": "top-k", "args": {"share": 0.1}}, fleet={"num_devices": 1, "cohort": 1}
    )
    learner = make_learner(build(scenario))
    layout = learner.model.layout
    assert learner.declaration[RESIDUAL].shape == (layout.size,)
    raw, sent = torch.zeros(layout.size), torch.zeros(layout.size)
    fit = type(learner).fit
    encode = type(learner).encode
    residual: list[torch.Tensor] = []

    def watched_fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = fit(self, *args, **kwargs)
        raw.add_(layout.flatten(found.update.arrays))
        return found

    def watched_encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = encode(self, *args, **kwargs)
        sent.add_(self.codec.decode(layout, found.update.arrays))
        residual[:] = [found.state.memory[RESIDUAL]]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(learner), "fit", watched_fit)
        patch.setattr(type(learner), "encode", watched_encode)
        simulate(scenario, out=tmp_path / "run", engine="reference")
    assert float(residual[0].abs().max()) > 0
    torch.testing.assert_close(sent + residual[0], raw, rtol=0, atol=1e-5)
    final = learner.model.layout.flatten(model_of(tmp_path / "run"))
    torch.testing.assert_close(final, learner.model.initial() + sent, rtol=0, atol=1e-5)


def test_who_has_nothing_to_send_keeps_what_it_held_back(small: Make) -> None:
    """An idle device's reply is not aggregated, so its residual must not go with it."""
    scenario = small(wire={"codec": "top-k"})
    world = build(scenario)
    learner = make_learner(world)
    held = torch.arange(learner.model.layout.size, dtype=torch.float32)
    state = learner.initial_state(world.train)

    state = replace(state, memory=state.memory.replace(**{RESIDUAL: held}))
    zeros = learner.model.layout.views(torch.zeros_like(held))
    for count, kept in ((0, held), (5, None)):
        fit = Fit(state, Update(zeros, {"num-examples": count, "loss": 0.0, "num-steps": 0}), 0)
        found = learner.encode(fit, server_round=1, device=0)
        sent = learner.codec.decode(learner.model.layout, found.update.arrays)  # type: ignore[union-attr]
        if kept is not None:
            assert torch.equal(found.state.memory[RESIDUAL], kept)
            assert not bool(sent.any())
        else:
            assert torch.equal(found.state.memory[RESIDUAL] + sent, held)
            assert bool(sent.any())


def test_error_feedback_learns_what_is_lost_without_it(small: Make) -> None:
    """A hundredth of each update: with what was held back, the training loss falls further."""

    def last_loss(**args: Any) -> float:
        table = {"codec": "top-k", "args": {"share": 0.01, **args}}
        stream = {"num_experiences": 1, "rounds_per_experience": 12}
        scenario = small(wire=table, stream=stream, fleet={"num_devices": 3, "cohort": 3})
        return float(simulate(scenario).rounds[-1]["loss"])

    assert last_loss() < last_loss(feedback=False)


BATCH_NORM = """
    from torch import nn


    def network(input_shape, num_classes):
        size = input_shape[0] * input_shape[1] * input_shape[2]
        return nn.Sequential(
            nn.Flatten(), nn.Linear(size, 32), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, num_classes),
        )
"""


@pytest.mark.parametrize(
    ("codec", "args"),
    [
        ("top-k", {"share": 0.01, "feedback": False, "rescale": True}),
        ("random-k", {"share": 0.03}),
    ],
)
def test_a_network_with_batch_norm_learns_from_a_few_numbers(
    small: Make, tmp_path: Path, codec: str, args: dict[str, Any]
) -> None:
    """A hundredth of its variances, or a few of them multiplied by thirty, left it at chance."""
    path = tmp_path / "norm.py"
    path.write_text(textwrap.dedent(BATCH_NORM))
    scenario = small(
        model={"name": f"{path}:network", "args": {}},
        client={"strategy": "naive", "args": {}},
        wire={"codec": codec, "args": args},
        stream={"num_experiences": 1, "rounds_per_experience": 10},
        fleet={"num_devices": 4, "cohort": 4},
        evaluate={"every_rounds": 10},
    )
    run = simulate(scenario, out=tmp_path / "run", engine="reference")
    assert run.scores().average_accuracy > 0.5
    assert float(model_of(tmp_path / "run")["2.running_var"].min()) > 0


def test_devices_that_keep_a_residual_are_not_trained_together() -> None:
    for engine in ("batched", "native"):
        with pytest.raises(RunError, match=r"TopK keeps what it did not send|not installed"):
            simulate(toy_scenario(wire={"codec": "top-k"}), engine=engine)
    record = simulate(toy_scenario(wire={"codec": "top-k"}))
    assert record.run["engine"]["tier"] in ("reference", "pool")
    record = simulate(toy_scenario(wire={"codec": "top-k", "args": {"feedback": False}}))
    assert record.run["engine"]["tier"] in ("native", "batched")


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
@pytest.mark.parametrize("federation", ["faithful", "fused"])
def test_devices_that_are_trained_together_send_the_same(
    tmp_path: Path, codec: str, federation: str
) -> None:
    one_round = {"num_experiences": 1, "rounds_per_experience": 1}
    scenario = toy_scenario(wire={"codec": codec}, stream=one_round)
    for engine in ("reference", "batched"):
        simulate(scenario, out=tmp_path / engine, engine=engine, federation=federation)
    assert_alike(tmp_path / "batched", tmp_path / "reference")


def test_the_residual_is_in_the_fleet_file(tmp_path: Path) -> None:
    scenario = toy_scenario(wire={"codec": "top-k"})
    seen: list[torch.Tensor] = []
    write = RecordFile.write

    def watched(self: RecordFile, device: int, slot: int, memory: Any) -> int:
        seen.append(memory[RESIDUAL])
        return write(self, device, slot, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordFile, "write", watched)
        simulate(scenario, out=tmp_path / "run", engine="reference")
    data = (tmp_path / "run" / "devices.bin").read_bytes()
    assert seen[-1].numpy().tobytes() in data


# -- the guard -------------------------------------------------------------------------------------

LEAKY = Path(__file__).with_name("leaky.py")


def _leaky() -> Any:
    spec = importlib.util.spec_from_file_location("leaky_on_the_wire", LEAKY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaky_on_the_wire"] = module
    spec.loader.exec_module(module)
    return module


leaky = _leaky()


@pytest.mark.parametrize("codec", ["int8", "top-k"])
@pytest.mark.parametrize("kind", leaky.LEAKS, ids=lambda kind: kind.__name__)
def test_leaks_are_still_caught(
    kind: Any, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overheard = tmp_path / "overheard"
    monkeypatch.setenv("EDGELEARN_TEST_EAVESDROP", str(overheard))
    scenario = toy_scenario(
        data={"dataset": f"{LEAKY}:dataset"},
        client={"strategy": f"{LEAKY}:{kind.__name__}", "lr": 0.3},
        server={"strategy": f"{LEAKY}:Eavesdropper"},
        wire={"codec": codec},
    )
    record = simulate(scenario, out=tmp_path / "run", checkpoint_every_s=0)
    refused = [line["problems"] for line in record.rounds if line["position"] == 0]
    assert len(refused) == 2
    for (problem,) in refused:
        assert problem["outcome"] == "failed"
        assert problem["reason"].startswith("EgressError: not sent: ")
        assert leaky.LEAKS[kind] in problem["reason"]
    for path in (overheard, tmp_path / "run" / "record.jsonl"):
        content = path.read_bytes()
        assert not any(form in content for form in leaky.forms())


CODECS_THAT_FAIL = """
    import torch

    from edgelearn.compress.codec import Codec, Piece


    class Base(Codec):
        def pieces(self, layout):
            return {"values": Piece((layout.size,), torch.float32)}

        def encode(self, layout, update, generator):
            return {"values": update.clone()}

        def decode(self, layout, message):
            return message["values"].clone()

        def error(self, layout, update):
            return torch.zeros(layout.size)


    class More(Base):
        def encode(self, layout, update, generator):
            return {"values": update.clone(), "secret": update.clone()}


    class Wider(Base):
        def encode(self, layout, update, generator):
            return {"values": update.double()}


    class Text(Base):
        def encode(self, layout, update, generator):
            raise ValueError(f"secret {update[0]}")


    class Decoding(Base):
        def decode(self, layout, message):
            raise ValueError(f"secret {message}")
"""


@pytest.mark.parametrize("engine", ["reference", "batched"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("More", "not sent: a tensor that is not declared"),
        ("Wider", "not sent: the tensor 'values' is not"),
        ("Text", "the device's own log says more"),
        ("Decoding", "Decoding can't decode the message"),
    ],
)
def test_a_codec_cannot_send_what_it_does_not_declare(
    tmp_path: Path, name: str, reason: str, engine: str
) -> None:
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(CODECS_THAT_FAIL))
    scenario = toy_scenario(wire={"codec": f"{path}:{name}"})
    for federation in ("faithful", "fused"):
        with pytest.raises(RunError, match="every device of the cohort failed") as caught:
            simulate(scenario, engine=engine, federation=federation)
        assert reason in str(caught.value)
        assert "secret" not in str(caught.value)


def test_an_update_beyond_half_precision_is_rejected_by_name(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text(
        "from edgelearn import ClientStrategy\n"
        "from edgelearn.continual.strategy import Update\n\n\n"
        "class Large(ClientStrategy):\n"
        "    def upload(self, update, samples, memory):\n"
        "        return Update({n: v + 1e5 for n, v in update.arrays.items()}, update.metrics)\n"
    )
    for federation in ("faithful", "fused"):
        scenario = toy_scenario(wire={"codec": "float16"}, client={"strategy": f"{path}:Large"})
        record = simulate(scenario, federation=federation)
        reasons = {p["reason"] for line in record.rounds for p in line["problems"]}
        assert reasons == {"the update is not finite"}
        assert all(line["outcomes"]["rejected"] == 4 for line in record.rounds)


@pytest.mark.parametrize("codec", ["int8", "top-k"])
def test_an_update_that_is_not_finite_is_not_encoded(tmp_path: Path, codec: str) -> None:
    """Once in the residual, it would be in every later update."""
    path = tmp_path / "once.py"
    path.write_text(
        "from edgelearn import ClientStrategy\n"
        "from edgelearn.continual.strategy import Update\n\n\n"
        "class Once(ClientStrategy):\n"
        "    def upload(self, update, samples, memory):\n"
        "        if not bool((samples.labels == 0).any()):  # it has them in the first experience\n"
        "            return update\n"
        "        arrays = {n: v / 0 for n, v in update.arrays.items()}\n"
        "        return Update(arrays, update.metrics)\n"
    )
    clients = {"strategy": f"{path}:Once"}
    for federation in ("faithful", "fused"):
        scenario = toy_scenario(
            wire={"codec": codec}, client=clients, stream={"order": "per-device"}, seed=1
        )
        rounds = simulate(scenario, federation=federation).rounds
        reasons = [p["reason"] for line in rounds for p in line["problems"]]
        assert reasons
        assert all("its update is not finite" in reason for reason in reasons)
        assert sum(line["outcomes"]["ok"] for line in rounds) + len(reasons) == 16


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(ScenarioError, match=r"unknown name 'int9', did you mean|allowed: none"):
        toy_scenario(wire={"codec": "int9"})
