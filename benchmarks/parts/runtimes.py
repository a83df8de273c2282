"""What an answer costs by each runtime, what a changed model costs, and whose answers they are."""

from __future__ import annotations

import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import results, subjects
from harness.paths import BENCH
from harness.processes import own_environment, run_child
from harness.results import Options
from harness.subjects import CNN, LARGE, MOBILENET, Subject
from safetensors.torch import save
from torch import Tensor

from edgelearn.deploy.executorch import ExecuTorchPredictor, lower
from edgelearn.runtime.measure import latency, refresh_ms
from edgelearn.runtime.onnxruntime import OnnxPredictor, exact_here
from edgelearn.runtime.protocol import Predictor, Runtime, make_runtime

PART = "runtimes"
TITLE = "What an answer costs by each runtime"
BATCHES = (1, 32)
FLOAT, EXECUTORCH = "float, torch", "int8, ExecuTorch"
TORCH, ONNX = "int8, torch", "int8, onnxruntime"
_FEWEST_FOR_P99 = 100


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        dataset: Its images.
        mobilenet: Weights of MobileNetV2, see `harness.subjects.mobilenet`.
        epochs: Of the small CNN.
        steps: Of MobileNetV2, without a file.
        num_calibration: Training inputs for ranges.
        num_test: Test inputs, at most.
        most_runs: Calls that count, for each number.
        budget_s: For these; at least 5 are made.
        only: Networks.
        seed: Of data and weights.
    """

    dataset: str = "fashion-mnist"
    mobilenet: Path | None = None
    epochs: int = 3
    steps: int = 600
    num_calibration: int = 64
    num_test: int = 10_000
    most_runs: int = 1000
    budget_s: float = 3.0
    only: tuple[str, ...] = (CNN, MOBILENET, LARGE)
    seed: int = 0


def measure(options: Options, asked: Asked | None = None) -> dict[str, Any]:
    """Measure every runtime on every network, in turn."""
    asked = asked or Asked()
    if options.quick:
        asked = Asked(
            dataset="digits", epochs=1, steps=2, num_calibration=32, num_test=64, most_runs=6,
            budget_s=0.2, only=asked.only, mobilenet=asked.mobilenet,
        )  # fmt: skip
    torch.set_num_threads(1)
    bits = exact_here()
    engines = {
        FLOAT: ("float", {}),
        "float, onnxruntime": ("onnxruntime", {"weight_bits": 32}),
        TORCH: ("int8", {"weight_bits": bits}),
        ONNX: ("onnxruntime", {"weight_bits": bits}),
    }
    known = dict(_subjects(asked))
    benches: dict[str, _Bench] = {}
    for subject, one in known.items():
        for engine, (name, arguments) in engines.items():
            benches[_name(subject, engine)] = _Served(name, arguments, one, asked)
        if find_spec("executorch"):
            benches[_name(subject, EXECUTORCH)] = _Lowered(one, asked)

    def runs(turn: int) -> Mapping[str, results.Run]:
        return {name: partial(bench.run, is_first=turn == 0) for name, bench in benches.items()}

    config = {
        "subjects": {name: one.how for name, one in known.items()},
        "engines": [*engines, *([EXECUTORCH] if find_spec("executorch") else [])],
        "weight_bits": bits,
        "num_calibration": asked.num_calibration,
        "num_test": {name: len(one.x) for name, one in known.items()},
        "peers": {"engines": _versions()},
        "workload": {"seed": asked.seed},
        "command": "python benchmarks/runtimes.py"
        + (f" --mobilenet {asked.mobilenet.name}" if asked.mobilenet else ""),
    }
    return results.repeat(PART, runs, options, config=config)


def _subjects(asked: Asked) -> list[tuple[str, Subject]]:
    size = {"num_calibration": asked.num_calibration, "num_test": asked.num_test}
    found = []
    world = subjects.world_of(asked.dataset, seed=asked.seed)
    if CNN in asked.only:
        found.append((CNN, subjects.small(world, epochs=asked.epochs, **size)))
    if MOBILENET in asked.only:
        one = subjects.mobilenet(world, asked.mobilenet, steps=asked.steps, **size)
        found.append((MOBILENET, one))
    if LARGE in asked.only:
        few = min(asked.num_calibration, 32)
        found.append((LARGE, subjects.large(seed=asked.seed, num_calibration=few, num_test=32)))
    return found


def _versions() -> dict[str, str]:
    names = ("onnxruntime", "onnx", "torchvision", "executorch", "torchao")
    return {name: version(name) for name in names if find_spec(name)}


def _name(subject: str, engine: str) -> str:
    return f"{subject}: {engine}"


def _resident(runtime: str, data: bytes, subject: Subject, **asked: Any) -> dict[str, float]:
    """Return what a process of its own holds that answers with a file's model."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "model"
        file.write_bytes(data)
        argument = {
            "runtime": runtime, "file": str(file), "shape": list(subject.x.shape[1:]), **asked
        }  # fmt: skip
        command = [sys.executable, str(BENCH / "children" / "resident.py")]
        ended = run_child(command, argument, environment=own_environment())
    if ended.result is None:
        raise RuntimeError(ended.error)
    return {name: ended.result[name] for name in ("imported_mib", "answering_mib", "most_mib")}


class _Bench(ABC):
    """A predictor for each size of a batch, and the way to one for new parameters."""

    def __init__(self, subject: Subject, asked: Asked) -> None:
        self.subject, self.asked = subject, asked
        self.predictors: Mapping[int, Predictor] = {}

    def run(self, *, is_first: bool) -> dict[str, Any]:
        """Measure once; what is the same each time, only the first time."""
        try:
            self.prepare()
            with torch.no_grad():
                found: dict[str, Any] = self._times()
                if is_first:
                    found |= self._shares()
            found |= self.resident()
            return {**found, **self.refreshed(), "bytes": self.predictors[1].model_bytes}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    @abstractmethod
    def prepare(self) -> None:
        """Make the predictors."""

    @abstractmethod
    def refreshed(self) -> dict[str, Any]:
        """Return the cost of new parameters."""

    @abstractmethod
    def resident(self) -> dict[str, float]:
        """Return what a process that answers holds in memory."""

    def _times(self) -> dict[str, float]:
        found = {}
        for batch in BATCHES:
            predict, x = self.predictors[batch], self.subject.x
            num_runs = _num_runs(predict, x[:batch], self.asked)
            warm = max(2, num_runs // 10)
            seen = latency(predict, x, batch, num_warm=warm, num_runs=num_runs)
            found |= {f"b{batch}_p50_ms": seen.p50_ms, f"b{batch}_runs": num_runs}
            if num_runs >= _FEWEST_FOR_P99:
                found[f"b{batch}_p99_ms"] = seen.p99_ms
        return found

    def _shares(self) -> dict[str, float]:
        one = self.subject
        if one.y is None:
            return {}
        exact = _answers(lambda x: one.model(one.params, x), one.x)
        int8 = make_runtime("int8", {"weight_bits": exact_here()})
        integers = _answers(int8.prepare(one.model, one.params).calibrated(one.calibration), one.x)
        answers = _answers(self.predictors[32], one.x)
        return {
            "agreement": float((answers == exact).double().mean()),
            "int8_agreement": float((answers == integers).double().mean()),
            "accuracy": float((answers == one.y).double().mean()),
        }


class _Served(_Bench):
    """A runtime of edgelearn."""

    def __init__(
        self, name: str, arguments: Mapping[str, Any], subject: Subject, asked: Asked
    ) -> None:
        super().__init__(subject, asked)
        self._name, self._arguments = name, dict(arguments)
        self._runtime: Runtime = make_runtime(name, arguments)

    def prepare(self) -> None:
        if not self.predictors:
            one = self.subject
            with torch.no_grad():
                predict = self._runtime.prepare(one.model, one.params).calibrated(one.calibration)
            self.predictors = dict.fromkeys(BATCHES, predict)

    def resident(self) -> dict[str, float]:
        one, predict = self.subject, self.predictors[1]
        if isinstance(predict, OnnxPredictor):
            return _resident(self._name, predict.artefact, one)
        return _resident(
            self._name, save({"params": one.params}), one, runtime_args=self._arguments,
            network=one.network, arguments=one.arguments,
        )  # fmt: skip

    def refreshed(self) -> dict[str, Any]:
        one, found = self.subject, {}
        for name, keeps in (("refresh_ms", True), ("recalibrate_ms", False)):
            found[name] = refresh_ms(
                self._runtime,
                one.model,
                one.params,
                one.calibration,
                keeps_ranges=keeps,
                num_runs=2 if self.asked.budget_s < 1 or one.y is None else 10,
            )
        return found


class _Lowered(_Bench):
    """ExecuTorch: a file for each size of a batch, lowered once."""

    def prepare(self) -> None:
        if self.predictors:
            return
        one, found = self.subject, {}
        _one_thread()
        for batch in BATCHES:
            begun = time.perf_counter()
            artefact = lower(one.model, one.params, one.calibration, is_quantized=True, batch=batch)
            found[batch] = ExecuTorchPredictor(artefact, batch=batch)
            if batch == 1:
                self._artefact = artefact
                self._lower_ms = 1000 * (time.perf_counter() - begun)
        self.predictors = found

    def refreshed(self) -> dict[str, Any]:
        return {"recalibrate_ms": self._lower_ms}

    def resident(self) -> dict[str, float]:
        return _resident("executorch", self._artefact, self.subject)


def _one_thread() -> None:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(1)


def _num_runs(predict: Predictor, x: Tensor, asked: Asked) -> int:
    predict(x)
    begun = time.perf_counter()
    predict(x)
    once_s = time.perf_counter() - begun
    return max(5, min(asked.most_runs, int(asked.budget_s / once_s)))


def _answers(predict: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([predict(part).argmax(1) for part in torch.split(x, 32)])


# -- the page --------------------------------------------------------------------------------------


def refresh(result: dict[str, Any], subject: str) -> float | None:
    """Return milliseconds until ONNX Runtime serves new weights with known ranges."""
    return results.median(results.values(result, _name(subject, ONNX), "refresh_ms"))


def agreement(result: dict[str, Any], subject: str) -> float | None:
    """Return the share of test inputs that int8 torch and ONNX Runtime answer alike, in percent."""
    value = results.median(results.values(result, _name(subject, ONNX), "int8_agreement"))
    return None if value is None else 100 * value


FLOAT_ONNX = "float, onnxruntime"


def _of(result: dict[str, Any], subject: str, engine: str, field: str) -> float | None:
    return results.median(results.values(result, _name(subject, engine), field))


def _divided(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def over_eager(result: dict[str, Any], subject: str) -> float | None:
    """Return how many times less an answer of int8 takes than one of eager float, batch 1."""
    return _quicker(result, subject, FLOAT)


def over_float(result: dict[str, Any], subject: str) -> float | None:
    """Return how many times less it takes than one of the same engine's float, batch 1."""
    return _quicker(result, subject, FLOAT_ONNX)


def _quicker(result: dict[str, Any], subject: str, than: str) -> float | None:
    """Return the median of ratios, each taken within a turn."""
    found = results.ratio(result, "b1_p50_ms", _name(subject, than), _name(subject, ONNX))
    return None if found is None else found[0]


def lost(result: dict[str, Any], subject: str) -> float | None:
    """Return the points of accuracy that int8 loses to float."""
    exact, served = (_of(result, subject, engine, "accuracy") for engine in (FLOAT, ONNX))
    return None if exact is None or served is None else 100 * (exact - served)


def share_of_bytes(result: dict[str, Any], subject: str) -> float | None:
    """Return the bytes of the int8 file, as a share of those of the same engine's float."""
    served = _of(result, subject, ONNX, "bytes")
    return _divided(served, _of(result, subject, FLOAT_ONNX, "bytes"))


def difference(result: dict[str, Any], subject: str) -> float | None:
    """Return how many percentage points of accuracy lie between the two."""
    found = [
        results.median(results.values(result, _name(subject, engine), "accuracy"))
        for engine in (TORCH, ONNX)
    ]
    if found[0] is None or found[1] is None:
        return None
    return 100 * abs(found[0] - found[1])


def section(result: dict[str, Any]) -> str:
    """Return the tables."""
    config = result["config"]
    vnni = [flag for flag in result["cpu_flags"] if "vnni" in flag or "amx" in flag]
    has = f"has {' and '.join(vnni)}" if vnni else "has neither VNNI nor AMX"
    head = (
        "One thread each, in one process, in turns; milliseconds of a call, median over turns. "
        f"The processor {has}; weights have {config['weight_bits']} bits in torch and ONNX Runtime "
        "(8 where its kernels multiply them exactly), 8 in ExecuTorch. *New weights*: from changed "
        "parameters to a model that answers, activation ranges kept; *and ranges*: observed anew "
        f"on {config['num_calibration']} samples. ExecuTorch lowers a file anew, for one size of a "
        "batch. Agreement: the share of test inputs with the answer of the float model, and with "
        "that of torch's int8, which is the reference in arithmetic, not in speed. *Memory*: what "
        "is resident in a process of its own that has answered 50 times, MiB; before it opened the "
        "model in brackets, interpreter and libraries (ONNX Runtime's process has no torch)."
    )
    titles = "b1 p50 | b1 p99 | b32 p50 | b32 p99 | new weights | and ranges | memory | bytes"
    lines = [head]
    for subject, how in config["subjects"].items():
        lines += [
            "",
            f"**{subject}** ({how}; {config['num_test'][subject]:,} test inputs)",
            "",
            f"| runtime | {titles} | float's answer % | int8 torch's % | accuracy % |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for engine in config["engines"]:
            name = _name(subject, engine)
            if name in result["skipped"]:
                lines.append(f"| {engine} | {result['skipped'][name]} |" + " |" * 10)
                continue
            fields = [f"b{b}_{p}_ms" for b in BATCHES for p in ("p50", "p99")]
            cells = [_cell(result, name, f) for f in [*fields, "refresh_ms", "recalibrate_ms"]]
            held, libraries = (
                results.median(results.values(result, name, field))
                for field in ("answering_mib", "imported_mib")
            )
            cells.append("" if held is None else f"{held:.0f} ({libraries:.0f})")
            size = results.median(results.values(result, name, "bytes"))
            cells.append("" if size is None else f"{size:,.0f}")
            for share in ("agreement", "int8_agreement", "accuracy"):
                value = results.median(results.values(result, name, share))
                cells.append("" if value is None else f"{100 * value:.2f}")
            lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: dict[str, Any], name: str, field: str) -> str:
    value = results.median(results.values(result, name, field))
    if value is None:
        return ""
    return f"{value:,.3f}" if value < 1 else f"{value:,.1f}"
