"""Lines of stages: what they say, and all that can be wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelearn.errors import ScenarioError
from edgelearn.scenario.load import from_dict, load
from edgelearn.scenario.stages import (
    KINDS,
    Distill,
    Pack,
    Prune,
    PruneChannels,
    Quantize,
    Train,
    faults_of,
    parse,
    written,
)


def faults(text: str) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        parse(text)
    return [str(fault) for fault in caught.value.faults]


def test_a_line_is_read_as_it_is_written() -> None:
    line = """train(5, schedule="cosine") | prune-channels(0.3)
        |distill("mlp", args={hidden=[4, 2]}, kind='hard')| prune (0.9,epochs = 2)|quantize( 4 )
        | pack()"""
    assert parse(line) == (
        Train(epochs=5, schedule="cosine"),
        PruneChannels(ratio=0.3),
        Distill(model="mlp", args={"hidden": (4, 2)}, kind="hard"),
        Prune(sparsity=0.9, epochs=2),
        Quantize(bits=4),
        Pack(),
    )
    assert parse(written(parse(line))) == parse(line)
    assert parse('distill(args={name="a|b, (c"})')[0].args == {"name": "a|b, (c"}


@given(
    sparsity=st.floats(0, 0.999),
    lr=st.floats(1e-12, 1e6),
    epochs=st.integers(0, 100),
    text=st.text(st.characters(codec="ascii", exclude_characters="\r"), max_size=20),
)
def test_what_is_written_is_read_back(sparsity: float, lr: float, epochs: int, text: str) -> None:
    stages = (
        Train(epochs=epochs, lr=lr),
        Distill(args={"text": text, "deep": {"list": (1, 2.5, True)}}),
        Prune(sparsity=sparsity, epochs=epochs),
        Quantize(),
    )
    assert parse(written(stages)) == stages


def test_all_faults_are_told_at_once_with_the_nearest_names() -> None:
    found = faults(
        'prun(0.9) | quantize(5) | pack(3) | prune(epoch=2, lr=-1, sparsity="a") | x y | '
        'quantize(runtime="onxruntime") | train(epochs) | distill("cn")'
    )
    names = ", ".join(KINDS)
    assert found == [
        f"[stage 1] stage: unknown stage 'prun' (did you mean 'prune'?); allowed: {names}",
        "[stage 2, quantize] bits: got 5; allowed: 4, 8",
        "[stage 3, pack] arguments: got 3; it takes none",
        *(fault for fault in found if fault.startswith("[stage 4, prune]")),
        "[stage 5] syntax: got 'x y'; expected a stage, such as prune(0.9, epochs=2)",
        *(fault for fault in found if fault.startswith("[stage 6, quantize] runtime: unknown")),
        *(fault for fault in found if fault.startswith("[stage 7, train] arguments: got 'epochs")),
        *(fault for fault in found if fault.startswith("[stage 8, distill] model: unknown name")),
    ]
    assert len(found) == 10
    text = "\n".join(found)
    for part in ("(did you mean 'epochs'?)", "got -1.0; must be above 0", "(did you mean 'onnxr"):
        assert part in text, part


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "[stage 1] syntax: got ''"),
        ("prune(0.9", "[stage 1] syntax: got 'prune(0.9'"),
        ("train |", "[stage 2] syntax: got ''"),
        ("prune(0.9, sparsity=0.8)", "[stage 1, prune] arguments: got 'sparsity = 0.9, spars"),
        ("prune(1)", "[stage 1, prune] sparsity: got 1.0; at most 0.999"),
        ("pack", "[stage 1, pack] order: it stores integer weights; put quantize before it"),
        ("quantize | train", "[stage 2, train] order: stage 1 has quantized the network"),
        ("quantize | quantize", "[stage 2, quantize] order: stage 1 has quantized"),
        ("quantize | pack | pack", "[stage 3, pack] order: stage 2 is pack, which is the last"),
        ("prune | prune_channels", "[stage 2, prune_channels] order: stage 1 has pruned weights"),
        ("prune | distill('mlp')", "[stage 2, distill] order: stage 1 has pruned weights"),
        ('quantize(runtime="float")', "[stage 1, quantize] runtime: got one that serves the float"),
        ("quantize(args={weight_bits=2})", "[stage 1, quantize] args.weight_bits: got 2; the file"),
        ("quantize(args={weight_bits=32})", "[stage 1, quantize] runtime: got one that serves"),
    ],
)
def test_a_fault_says_where_it_is(line: str, expected: str) -> None:
    (found,) = faults(line)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "line", ["quantize(4, args={weight_bits=4})", "quantize(args={weight_bits=7})"]
)
def test_a_runtime_may_have_as_many_bits_as_the_file(line: str) -> None:
    assert not faults_of(line)


def test_the_present_network_may_be_taught_after_pruning() -> None:
    assert [s.verb for s in parse("prune | distill | quantize")] == ["prune", "distill", "quantize"]


def test_a_scenario_declares_a_pipeline_in_its_table(raw: dict[str, Any]) -> None:
    plain = from_dict(raw)
    raw["compress"] = {"pipeline": "prune(0.9) | quantize"}
    scenario = from_dict(raw)
    assert scenario.compress.pipeline == "prune(0.9) | quantize"
    assert scenario.digest != plain.digest
    raw["compress"] = {}
    assert from_dict(raw) == plain
    assert from_dict(raw).digest == plain.digest


def test_scenarios_without_the_table_have_the_digest_that_they_had() -> None:
    assert load("split-digits").digest == "9b71dab60b63b635"


def test_faults_of_the_table_are_told_with_all_others(raw: dict[str, Any]) -> None:
    raw["compress"] = {"pipeline": "prun(0.9) | quantize(3)", "pipline": "x"}
    raw["client"]["lr"] = -1
    with pytest.raises(ScenarioError) as caught:
        from_dict(raw)
    found = [str(fault) for fault in caught.value.faults]
    assert len(found) == 4
    text = "\n".join(found)
    assert "[client] lr" in text
    assert "[compress] pipline: unknown key (did you mean 'pipeline'?)" in text
    assert "[compress] pipeline: [stage 1] stage: unknown stage 'prun' (did you mean" in text
    assert "[compress] pipeline: [stage 2, quantize] bits: got 3" in text
