"""What an answer costs by each runtime, and how far its answers are from the float model's.

Trains a network on the training images of a data set, then serves it by every runtime, calibrated
on training images. Prints milliseconds for a call (median and 99th percentile at batch 1 and 32,
one thread), milliseconds from new parameters to a predictor that is ready, bytes, the share of test
images with the float model's answer, and accuracy. Some minutes on an idle core, seconds with
--dataset digits: python benchmarks/runtimes.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from harness.machine import describe, load
from torch import Tensor

import edgelearn
from edgelearn.params import FlatModel
from edgelearn.runtime.measure import BATCHES, Measured, measure, refresh_ms
from edgelearn.runtime.protocol import make_runtime
from edgelearn.scenario.world import World, build
from edgelearn.seeds import torch_generator

NUM_CALIBRATION = 256
FLOAT = "float, torch"
RUNTIMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    FLOAT: ("float", {}),
    "float, onnxruntime": ("onnxruntime", {"weight_bits": 32}),
    "int8, torch (reference)": ("int8", {}),
    "int8, onnxruntime, 7-bit weights": ("onnxruntime", {"weight_bits": 7}),
    "int8, onnxruntime, 8-bit weights": ("onnxruntime", {"weight_bits": 8}),
}


def world_of(dataset: str, network: str, *, seed: int) -> World:
    """Return the samples and the network; who holds which plays no part here."""
    data, model = {"dataset": dataset}, {"name": network, "args": {}}
    return build(edgelearn.load("split-digits", data=data, model=model, seed=seed))


def trained(model: FlatModel, world: World, *, epochs: int) -> Tensor:
    """Return parameters [P] after some epochs of Adam on all training samples."""
    params = model.initial().requires_grad_()
    optimizer = torch.optim.Adam([params], lr=1e-3)
    for epoch in range(epochs):
        generator = torch_generator(world.scenario.seed, "shuffle", epoch)
        order = torch.randperm(len(world.train.y), generator=generator)
        for ids in torch.split(order, 64):
            batch = world.train.batch(ids)
            loss = F.cross_entropy(model(params, batch.x), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return params.detach()


def rows(world: World, params: Tensor, model: FlatModel, *, num_runs: int) -> dict[str, Any]:
    """Measure every runtime."""
    calibration = world.train.batch(torch.arange(min(NUM_CALIBRATION, len(world.train.y)))).x
    test = world.test.batch(torch.arange(len(world.test.y)))
    reference = make_runtime("float", {}).prepare(model, params).calibrated(calibration)
    found = {}
    for label, (name, arguments) in RUNTIMES.items():
        runtime = make_runtime(name, arguments)
        predict = runtime.prepare(model, params).calibrated(calibration)
        measured = measure(predict, reference, test.x, test.y, num_runs=num_runs)
        found[label] = (measured, refresh_ms(runtime, model, params, calibration))
    return found


def format_row(label: str, measured: Measured, refresh: float) -> str:
    """Return a line of the table."""
    times = " | ".join(f"{t.p50_ms:.3f} | {t.p99_ms:.3f}" for t in measured.latencies)
    assert measured.accuracy is not None
    shares = f"{100 * measured.agreement:.2f} | {100 * measured.accuracy:.2f}"
    return f"| {label} | {times} | {refresh:.1f} | {measured.model_bytes:,} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--model", default="cnn", help="mlp or cnn")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2000, help="calls that count, for each number")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    world = world_of(asked.dataset, asked.model, seed=asked.seed)
    model = world.model()
    params = trained(model, world, epochs=asked.epochs)
    model.module.eval()
    print(json.dumps(describe()))
    print(f"load average before: {load():.2f} (numbers mean something on an idle machine only)")
    times = " | ".join(f"b{batch} p50 ms | p99" for batch in BATCHES)
    print(f"| runtime | {times} | refresh ms | bytes | agrees with float % | accuracy % |")
    print("|---" * (6 + len(BATCHES)) + "|---|")
    for label, (measured, refresh) in rows(world, params, model, num_runs=asked.runs).items():
        print(format_row(label, measured, refresh), flush=True)
    print(f"load average after: {load():.2f}")


if __name__ == "__main__":
    main()
