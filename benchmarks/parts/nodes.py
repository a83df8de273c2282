"""Where an answer by ONNX Runtime takes its time, operator by operator, and a file its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from harness import onnx_files, results
from harness.onnx_files import Array
from harness.results import Options
from torch import nn
from torchvision.models import mobilenet_v2

from edgelearn.params import FlatModel
from edgelearn.runtime.onnxruntime import OnnxRuntime, exact_here
from edgelearn.scenario.models import cnn

PART = "nodes"
TITLE = "Where ONNX Runtime's microseconds and bytes go"
SMALL, MOBILENET = "small CNN", "MobileNetV2, 32 x 32"
_GREY, _COLOURS = (1, 28, 28), (3, 32, 32)
_WIDTHS = ((8, 16), (16, 32), (32, 64), (64, 64))
# A convolution: channels that it takes and makes, its kernel's width.
_CONVOLUTIONS = ((1, 8, 3), (9, 8, 1), (1, 16, 3), (4, 16, 3), (16, 16, 1))


def _cnn(*channels: int) -> nn.Module:
    return cnn(input_shape=_GREY, num_classes=10, channels=channels)


def measure(options: Options) -> dict[str, Any]:
    """Measure; weights are random, since neither times nor bytes hang on them."""
    torch.set_num_threads(1)
    bits = exact_here()
    runs = {
        **{_width(channels): partial(_wide, channels, bits, options) for channels in _WIDTHS},
        f"{SMALL}: operators": partial(_operators, bits, options),
        "convolutions": partial(_convolutions, options),
        f"{SMALL}: bytes": partial(_bytes, _cnn(*_WIDTHS[0]), _GREY, bits),
        f"{MOBILENET}: bytes": partial(_bytes, mobilenet_v2(num_classes=10), _COLOURS, bits),
    }
    config = {
        "weight_bits": bits,
        "peers": {"engine": {name: version(name) for name in ("onnxruntime", "onnx")}},
        "command": "python benchmarks/nodes.py",
    }
    return results.repeat(PART, runs, options, config=config)


def _artefacts(
    module: nn.Module, shape: tuple[int, ...], bits: int
) -> tuple[dict[str, bytes], Array]:
    """Return the files of a network, float and int8, and one input."""
    generator = torch.Generator().manual_seed(0)
    module.eval()
    model, x = FlatModel(module), torch.randn(32, *shape, generator=generator)
    params, kinds = model.initial(), {"float": 32, "int8": bits}
    with torch.no_grad():
        found = {
            name: OnnxRuntime(weight_bits=b).prepare(model, params).artefact(x)
            for name, b in kinds.items()
        }
    return found, x[:1].numpy()


def _in_turns(calls: Mapping[str, Callable[[], Any]], options: Options) -> dict[str, float]:
    """Return microseconds of calls that take turns: of each the median in its quickest turn."""
    num_turns, num_calls = (2, 5) if options.quick else (40, 200)
    order = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, num_turns):  # the first one warms
        for name in order.permutation(list(calls)):
            taken = np.empty(num_calls)
            for place in range(num_calls):
                begun = time.perf_counter_ns()
                calls[name]()
                taken[place] = time.perf_counter_ns() - begun
            if turn >= 0:
                found[name].append(float(np.median(taken)) / 1000)
    return {name: min(medians) for name, medians in found.items()}


def _operators(bits: int, options: Options) -> dict[str, Any]:
    """Return the microseconds of each operator of the small CNN."""
    artefacts, x = _artefacts(_cnn(*_WIDTHS[0]), _GREY, bits)
    calls = {
        f"{kind} {name}": call
        for kind, artefact in artefacts.items()
        for name, call in onnx_files.prefixes(artefact, x).items()
    }
    until, found = _in_turns(calls, options), {}
    for kind in artefacts:
        before = 0.0
        for name, after in until.items():
            if name.startswith(f"{kind} "):
                found[name], before = after - before, after
    return found


def _convolutions(options: Options) -> dict[str, Any]:
    """Return the microseconds of integer convolutions on 28 x 28 places, each alone."""
    calls = {_shape(one): onnx_files.convolving(*one, places=_GREY[1]) for one in _CONVOLUTIONS}
    until = _in_turns({"call": onnx_files.doing_nothing()} | calls, options)
    return {name: until[name] - until["call"] for name in calls}


def _wide(channels: tuple[int, ...], bits: int, options: Options) -> dict[str, Any]:
    """Return the microseconds of an answer, and the bytes."""
    artefacts, x = _artefacts(_cnn(*channels), _GREY, bits)
    taken = _in_turns({k: onnx_files.asking(a, x) for k, a in artefacts.items()}, options)
    return {**taken, **{f"{kind} bytes": len(artefact) for kind, artefact in artefacts.items()}}


def _bytes(module: nn.Module, shape: tuple[int, ...], bits: int) -> dict[str, Any]:
    """Return the bytes of each kind."""
    artefacts, _ = _artefacts(module, shape, bits)
    return {
        f"{kind} {name}": count
        for kind, artefact in artefacts.items()
        for name, count in onnx_files.bytes_by_kind(artefact).items()
    }


def _shape(convolution: tuple[int, int, int]) -> str:
    taken, made, kernel = convolution
    return f"{taken} to {made} channels, {kernel} x {kernel}"


def _width(channels: tuple[int, ...]) -> str:
    return f"channels {' and '.join(map(str, channels))}"


# -- the page --------------------------------------------------------------------------------------


def section(result: dict[str, Any]) -> str:
    """Return the tables."""
    bits = result["config"]["weight_bits"]
    head = (
        "Microseconds of one answer (batch 1, one thread) for float32 [1, 1, 28, 28], by operators "
        "that the engine makes of the file: the time of the network cut off behind the operator, "
        "less that of the network cut off before it. All of these take turns in one process; of "
        f"each the median of 200 calls in its quickest turn of 40 counts. Weights are random, of "
        f"{bits} bits in int8."
    )
    tables = (_times, _alone, _widths, _shares)
    return "\n\n".join([head, *(table(result) for table in tables)])


def _kinds(result: dict[str, Any], name: str, kind: str) -> dict[str, float]:
    """Return medians of all fields of a kind, by the rest of their names."""
    runs = results.runs_of(result, name)
    fields = [field for field in (runs[0] if runs else {}) if field.startswith(f"{kind} ")]
    found = {f: results.median(results.values(result, name, f)) or 0.0 for f in fields}
    return {field.partition(" ")[2]: value for field, value in found.items()}


def _named(field: str) -> str:
    return field.partition(" ")[2] or "being called"


def _times(result: dict[str, Any]) -> str:
    lines = [f"**{SMALL}**, {_width(_WIDTHS[0])}", ""]
    lines += ["| float: operator | µs | int8: operator | µs |", "|---|---|---|---|"]
    columns = []
    for kind in ("float", "int8"):
        taken = _kinds(result, f"{SMALL}: operators", kind)
        cells = [f"{_named(name)} | {us:.1f}" for name, us in taken.items()]
        columns.append([*cells, f"**together** | **{sum(taken.values()):.1f}**"])
    height = max(map(len, columns))
    for column in columns:
        column[-1:-1] = [" | "] * (height - len(column))
    return "\n".join([*lines, *(f"| {a} | {b} |" for a, b in zip(*columns, strict=True))])


def _alone(result: dict[str, Any]) -> str:
    lines = [
        f"**Integer convolutions alone**, on {_GREY[1]} x {_GREY[1]} places",
        "",
        "| QLinearConv | µs |",
        "|---|---|",
    ]
    for name in map(_shape, _CONVOLUTIONS):
        taken = results.median(results.values(result, "convolutions", name))
        lines.append(f"| {name} | {taken:.1f} |")
    return "\n".join(lines)


def _widths(result: dict[str, Any]) -> str:
    lines = [
        "**Wider networks of the same kind**: where int8 begins to gain",
        "",
        "| network | float µs | int8 µs | int8 is quicker by | bytes of int8, of those of float |",
        "|---|---|---|---|---|",
    ]
    for channels in _WIDTHS:
        name = _width(channels)
        exact, served = (results.median(results.values(result, name, k)) for k in ("float", "int8"))
        quicker = results.median(
            run["float"] / run["int8"] for run in results.runs_of(result, name)
        )
        share = results.median(
            run["int8 bytes"] / run["float bytes"] for run in results.runs_of(result, name)
        )
        lines.append(f"| {name} | {exact:.1f} | {served:.1f} | {quicker:.2f} x | {share:.4f} |")
    return "\n".join(lines)


def _shares(result: dict[str, Any]) -> str:
    lines = ["**Bytes of the files**", ""]
    names, rows = [], []
    for subject in (SMALL, MOBILENET):
        for kind in ("float", "int8"):
            names.append(f"{subject}: {kind}")
            rows.append(_kinds(result, f"{subject}: bytes", kind))
    lines += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind in rows[0]:
        lines.append(f"| {kind} | {' | '.join(f'{row[kind]:,.0f}' for row in rows)} |")
    totals = [sum(row.values()) for row in rows]
    lines.append(f"| together | {' | '.join(f'{total:,.0f}' for total in totals)} |")
    of_float = (f"{totals[place] / totals[place - place % 2]:.4f}" for place in range(len(totals)))
    lines.append(f"| of float | {' | '.join(of_float)} |")
    return "\n".join(lines)
