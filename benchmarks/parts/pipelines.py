"""What pipelines of compression save, and what they cost in accuracy."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import results
from harness.paths import ROOT
from harness.results import Options

from edgelearn.compressing.run import compress
from edgelearn.compressing.subject import find
from edgelearn.fleet.reference import one_thread
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.measure import measure as measure_runtime

PART = "pipelines"
DATASET = "fashion-mnist"
ARTEFACTS = ROOT / "build" / PART
_TRAIN = "batch_size=128, lr=0.002, schedule='cosine'"
_SERVE = "quantize(8, runtime='onnxruntime')"
SMALL_CNN = {"channels": [16, 32], "hidden": 128}


@dataclass(frozen=True)
class Pipeline:
    """A network, and what is done to it.

    Attributes:
        model: Name of the network; empty where it is what another pipeline has trained.
        stages: What is done.
        args: Arguments of the network.
        after: The other pipeline.
        seeds: Seeds, from 0.
    """

    model: str
    stages: str
    args: Mapping[str, Any] = field(default_factory=dict)
    after: str = ""
    seeds: int = 3


PIPELINES: Mapping[str, Pipeline] = {
    "small CNN, pruned": Pipeline(
        "cnn",
        f"train(5, {_TRAIN}) | prune(0.9, num_prunings=3, epochs=2) | quantize | pack",
        args=SMALL_CNN,
    ),
    "small CNN, channels": Pipeline(
        "",
        f"prune_channels(0.5, epochs=0) | distill(epochs=4, {_TRAIN}) | {_SERVE}",
        after="small CNN, pruned",
    ),
    # A MobileNetV2 trains for minutes: one seed.
    "MobileNetV2, int8": Pipeline("mobilenet_v2", f"train(4, {_TRAIN}) | {_SERVE}", seeds=1),
    "MobileNetV2, channels": Pipeline(
        "",
        f"prune_channels(0.5, epochs=0) | distill(epochs=4, {_TRAIN}) | {_SERVE}",
        after="MobileNetV2, int8",
        seeds=1,
    ),
}
_TRAINED = "1-train.safetensors"


def measure(options: Options) -> dict[str, Any]:
    """Run every pipeline; every turn is a seed."""

    def runs(seed: int) -> dict[str, results.Run]:
        return {
            name: partial(_run, name, seed=seed, quick=options.quick)
            for name, pipeline in PIPELINES.items()
            if seed < pipeline.seeds
        }

    config = {
        "dataset": DATASET,
        "pipelines": {name: asdict(pipeline) for name, pipeline in PIPELINES.items()},
        "command": f"python benchmarks/engines.py --only {PART}",
    }
    count = 1 if options.quick else max(pipeline.seeds for pipeline in PIPELINES.values())
    return results.repeat(PART, runs, options, config=config, repetitions=count, backwards=False)


def _folder(name: str, *, seed: int, quick: bool) -> Path:
    return ARTEFACTS / ("quick" if quick else f"seed-{seed}") / name.replace(", ", "-")


def _run(name: str, *, seed: int, quick: bool) -> dict[str, Any]:
    pipeline = PIPELINES[name]
    cuts = {"max_train": 400, "max_test": 200} if quick else {}
    target, num_runs = pipeline.model, 20 if quick else 500
    if pipeline.after:
        target = str(_folder(pipeline.after, seed=seed, quick=quick) / _TRAINED)
    subject = find(target, dataset=DATASET, args=pipeline.args, seed=seed, **cuts)
    folder = _folder(name, seed=seed, quick=quick)
    shutil.rmtree(folder, ignore_errors=True)
    report = compress(
        subject.module,
        train=subject.train,
        test=subject.test,
        pipeline=pipeline.stages,
        seed=seed,
        factory=subject.factory,
        facts=subject.facts,
        out=folder,
        num_runs=num_runs,
    )
    first = 0 if pipeline.after else 1  # the trained network
    eager = FlatModel(report.networks[first])
    x = subject.test.batch(slice(0, 200)).x
    with one_thread():
        predict = FloatRuntime().prepare(eager, eager.initial()).calibrated(x)
        found = measure_runtime(predict, predict, x, batches=(1,), num_runs=num_runs)
    rows = [asdict(row) for row in report.rows[first:]]
    return {
        "rows": rows,
        "eager_p50_ms": found.latencies[0].p50_ms,
        "eager_p99_ms": found.latencies[0].p99_ms,
        "lost": 100 * (rows[0]["accuracy"] - rows[-1]["accuracy"]),
        "fewer_bytes": rows[0]["disk_bytes"] / rows[-1]["disk_bytes"],
        "quicker": found.latencies[0].p50_ms / rows[-1]["p50_ms"],
    }


def figure(result: dict[str, Any], name: str, field: str) -> float | None:
    """Return the mean over seeds of a pipeline's figure."""
    found = results.values(result, name, field)
    return statistics.mean(found) if found else None


def section(result: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [
        (
            "On Fashion-MNIST (60,000 training images). Bytes are those of the file after the "
            "stage; times are of one answer, one thread, by the runtime that is named; "
            "accuracy on the 10,000 test images. Mean over seeds; of times the median."
        ),
    ]
    for name, pipeline in result["config"]["pipelines"].items():
        found = results.runs_of(result, name)
        if not found:
            continue
        lines += [
            "",
            f"**{name}** ({_begin(pipeline)}; {len(found)} seed(s)): `{pipeline['stages']}`",
            "",
            "| stage | parameters | not 0 | MACs | bytes | accuracy, % | p50 ms | p99 ms | by |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for place in range(len(found[0]["rows"])):
            lines.append(_row([run["rows"][place] for run in found]))
        eager = statistics.median(run["eager_p50_ms"] for run in found)
        lost = [run["lost"] for run in found]
        spread = f" ± {statistics.stdev(lost):.2f}" if len(lost) > 1 else ""
        lines += [
            "",
            (
                f"From the trained float network to the end: "
                f"{statistics.mean(run['fewer_bytes'] for run in found):.1f} x fewer bytes, "
                f"{_lost(statistics.mean(lost))}{spread}; an answer takes "
                f"{_time(statistics.median(run['quicker'] for run in found))} than the trained "
                f"network in eager torch ({eager:.2f} ms)."
            ),
        ]
    return "\n".join(lines)


def _lost(points: float) -> str:
    return f"{abs(points):.2f} points {'lost' if points >= 0 else 'gained'}"


def _time(quicker: float) -> str:
    return f"{quicker:.1f} x less time" if quicker >= 1 else f"{1 / quicker:.1f} x more time"


def _begin(pipeline: Mapping[str, Any]) -> str:
    if pipeline["after"]:
        return f'from what "{pipeline["after"]}" has trained'
    args = ", ".join(f"{name} = {value}" for name, value in pipeline["args"].items())
    return f"`{pipeline['model']}`" + (f", {args}" if args else "")


def _row(rows: list[dict[str, Any]]) -> str:
    def mean(field: str) -> float:
        return statistics.mean(row[field] for row in rows)

    def median(field: str) -> float:
        return statistics.median(row[field] for row in rows)

    counts = " | ".join(
        f"{mean(field):,.0f}" for field in ("parameters", "nonzero", "macs", "disk_bytes")
    )
    return (
        f"| `{rows[0]['stage']}` | {counts} | {100 * mean('accuracy'):.2f} "
        f"| {median('p50_ms'):.3f} | {median('p99_ms'):.3f} | {rows[0]['runtime']} |"
    )
