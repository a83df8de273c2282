"""Memory of a training step: computed by `edgelearn.device.footprint`, and measured.

Takes a few steps of each network with each way of training in less memory. Prints a table, and with
--out writes the figures; bytes depend on torch and its kernels, not on what else the machine does.
Run: python benchmarks/training_memory.py --out benchmarks/results/training_memory.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe
from torch import nn

from edgelearn.continual.strategy import Facts, make_strategy
from edgelearn.device.allocated import allocated_peak
from edgelearn.device.footprint import Round, needs
from edgelearn.device.learner import Learner
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import make_runtime
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples
from edgelearn.scenario.spec import ClientSpec

NUM_CLASSES, BATCH = 10, 32
OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "adam": {"optimizer": "adam"},
}
# Biases and a few weights near the end, in the spirit of Lin et al. 2022; nothing was searched.
SPARSE: Mapping[str, tuple[str, ...]] = {
    "mlp": ("1.bias", "3.bias", "5"),
    "cnn": ("3", "7.bias", "9"),
    "mobilenet-v2": (
        "features.15.conv.0.0",
        "features.16.conv.0.0",
        "features.17.conv.0.0",
        "classifier",
    ),
}


def options(network: str) -> dict[str, dict[str, Any]]:
    """Return the ways of training, by what a table calls them."""
    sparse = {"train": SPARSE[network]}
    return {
        "all": {},
        "all, accumulate 8": {"accumulate": 8},
        "all, checkpoint": {"checkpoint": True},
        "last:2": {"train": "last:2"},
        "last:1": {"train": "last:1"},
        "bias": {"train": "bias"},
        "norm": {"train": "norm"},
        "sparse": sparse,
        "sparse, accumulate 8": {**sparse, "accumulate": 8},
        "sparse, checkpoint": {**sparse, "checkpoint": True},
        "sparse, accumulate 8, checkpoint": {**sparse, "accumulate": 8, "checkpoint": True},
    }


def network_of(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == "mobilenet-v2":
        from torchvision.models import mobilenet_v2

        return mobilenet_v2(num_classes=NUM_CLASSES), (3, 32, 32)
    shape = (1, 28, 28)
    if name == "mlp":
        return mlp(input_shape=shape, num_classes=NUM_CLASSES, hidden=(256, 256)), shape
    return cnn(input_shape=shape, num_classes=NUM_CLASSES), shape


def samples_of(shape: tuple[int, ...]) -> Samples:
    """Return one batch of noise: what is in an image does not change its size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (BATCH, *shape), dtype=torch.uint8, generator=generator)
    store = SharedSamples(x, torch.arange(BATCH) % NUM_CLASSES, Encoding(1 / 255, 0.5, 0.5))
    return Samples(store, torch.arange(BATCH, dtype=torch.int32))


def row(
    model: FlatModel, samples: Samples, strategy: str, spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of one way of training one network."""
    learner = Learner(
        model=model,
        strategy=make_strategy(strategy, {}),
        spec=ClientSpec(strategy=strategy, lr=0.01, batch_size=BATCH, **spec),
        facts=Facts(2, NUM_CLASSES, samples.store.sample_bytes),
        seed=0,
    )
    found = needs(learner, make_runtime("int8", {}), samples)
    round_ = Round.of(learner, samples)
    round_.run()  # the first time sets up what is kept for the process
    return {
        "computed": sum(found.made.values()),
        "measured": allocated_peak(round_.run),
        "step": dict(found.step.parts),
        "sending": dict(found.sending.parts),
        "answering": dict(found.answering.parts),
    }


def table(rows: list[dict[str, Any]], optimizer: str) -> str:
    """Return a table in Markdown of what a step takes beside what is there before it."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    lines = [
        "| `[client]` | " + " | ".join(f"{n}: computed | measured | off" for n in networks) + " |",
        "|---|" + "---:|" * (3 * len(networks)),
    ]
    for name in dict.fromkeys(r["option"] for r in rows):
        cells = []
        for network in networks:
            key = (network, optimizer, name)
            found = [r for r in rows if (r["network"], r["optimizer"], r["option"]) == key]
            if not found or "refused" in found[0]:
                cells += ["\N{EN DASH}"] * 3
                continue
            computed, measured = found[0]["computed"], found[0]["measured"]
            off = f"{100 * (computed / measured - 1):+.1f}%".replace("-", "\N{MINUS SIGN}")
            cells += [f"{computed / 1024:,.0f}", f"{measured / 1024:,.0f}", off]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(SPARSE), choices=list(SPARSE))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--client", default="naive", help="client strategy (default: naive)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for network in arguments.networks:
        module, shape = network_of(network)
        model, samples = FlatModel(module), samples_of(shape)
        for optimizer in arguments.optimizers:
            for option, spec in options(network).items():
                what = {"network": network, "optimizer": optimizer, "option": option}
                try:
                    found = row(model, samples, arguments.client, OPTIMIZERS[optimizer] | spec)
                except ScenarioError as error:
                    found = {"refused": "; ".join(fault.message for fault in error.faults)}
                rows.append(what | found)
    for optimizer in arguments.optimizers:
        print(f"\n{optimizer}, KiB:\n\n{table(rows, optimizer)}")
    if arguments.out:
        setup = {"batch": BATCH, "client": arguments.client, "threads": 1}
        text = json.dumps({**describe(), **setup, "rows": rows}, indent=1)
        arguments.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
