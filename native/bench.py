"""What a device's training costs: CPU time per update, and GF/s beside the machine's own sgemm.

CPU time, not wall time, so that other programs on the machine matter little.

    python native/bench.py [W1] [W2] [W3] [--isa avx2,avx512] [--pull]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

sys.path.pop(0)  # this folder has the package's sources, without the compiled part
import edgelearn_native

Layers = list[tuple[str | int, ...]]


def mlp(*sizes: int) -> tuple[Layers, int, int]:
    """Return layers, number of parameters, and FLOP per trained sample."""
    layers: Layers = []
    at = flop = 0
    for i, (n, m) in enumerate(pairwise(sizes)):
        layers += [("linear", at, at + n * m, m), ("relu",)]
        at += n * m + m
        flop += 2 * n * m * (2 if i == 0 else 3)  # nobody needs the gradient of the input
    return layers[:-1], at, flop


def cnn() -> tuple[Layers, int, int]:
    """Return the same of the CNN of McMahan et al. (2017)."""
    layers: Layers = [
        ("conv2d", 0, 800, 32, 5, 5, 2, 2),
        ("relu",),
        ("maxpool2d", 2),
        ("conv2d", 832, 832 + 51_200, 64, 5, 5, 2, 2),
        ("relu",),
        ("maxpool2d", 2),
        ("flatten",),
        ("linear", 52_096, 52_096 + 3136 * 512, 512),
        ("relu",),
        ("linear", 1_658_240, 1_663_360, 10),
    ]
    convs = 2 * 2 * 784 * 25 * 32 + 3 * 2 * 196 * 800 * 64
    return layers, 1_663_370, convs + 3 * 2 * (3136 * 512 + 512 * 10)


WORKLOADS = {
    "W1 CNN, 60 samples": ((1, 28, 28), cnn(), 60, 4),
    "W2 784-200-200-10, 60 samples": ((784,), mlp(784, 200, 200, 10), 60, 40),
    "W3 64-32-10, 20 samples": ((64,), mlp(64, 32, 10), 20, 400),
}


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of the process that a call took."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def sgemm_peak() -> float:
    """Return torch's GF/s on one thread, at its best size."""
    torch.set_num_threads(1)
    best = 0.0
    for n in (256, 512, 768):
        a, b, c = (torch.rand(n, n) for _ in range(3))
        seconds = cpu_seconds(partial(torch.mm, a, b, out=c), 15)
        best = max(best, 2 * n**3 / seconds / 1e9)
    return best


def training(
    shape: tuple[int, ...],
    layers: Layers,
    size: int,
    samples: int,
    devices: int,
    isa: str,
    chosen: argparse.Namespace,
) -> Callable[[int], object]:
    """Return what trains the devices with a number of threads."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6000, *shape), dtype=np.uint8)
    data = edgelearn_native.Data(x, rng.integers(0, 10, 6000), 1 / 255 / 0.3, 0.4)
    params = rng.standard_normal(size, dtype=np.float32) * np.float32(0.03)
    updates = np.zeros((devices, size), np.float32)
    seeds = np.arange(devices, dtype=np.uint64)
    options: dict[str, Any] = {
        "ids": rng.integers(0, 6000, devices * samples).astype(np.int32),
        "starts": np.arange(devices + 1) * samples,
        "seeds": seeds,
        "epochs": chosen.epochs,
        "batch_size": 10,
        "lr": 0.05,
    }
    pulls = rng.random((2 * devices if chosen.pull else 0, size), dtype=np.float32)
    if chosen.pull:
        steps = np.arange(2 * devices, dtype=np.uint64) * np.uint64(4 * size)
        address = np.uint64(pulls.ctypes.data) + steps
        options |= {"curvature": address[:devices], "anchor": address[devices:]}
        options |= {"curvature_size": size, "strength": 0.1}
    if chosen.momentum:
        options["momentum"] = 0.9
    if chosen.replay:
        options["replay_ids"] = rng.integers(0, 6000, devices * 200).astype(np.int32)
        options["replay_starts"] = np.arange(devices + 1) * 200
        options["draw_seeds"] = seeds
    plan = edgelearn_native.Plan(shape, size, layers, isa=isa)

    def run(num_threads: int) -> object:
        assert len(pulls) in (0, 2 * devices)  # kept alive: the kernels have their addresses
        return plan.fit(data, params, updates, num_threads=num_threads, **options)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help="such as W1")
    parser.add_argument("--isa", default=",".join(edgelearn_native.isas()))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pull", action="store_true", help="with an implicit quadratic pull")
    parser.add_argument("--momentum", action="store_true")
    parser.add_argument("--replay", action="store_true", help="of 200 stored samples")
    args = parser.parse_args()
    for name, (shape, (layers, size, flop), samples, devices) in WORKLOADS.items():
        if args.workloads and not any(name.startswith(w) for w in args.workloads):
            continue
        for isa in args.isa.split(","):
            run = training(shape, layers, size, samples, devices, isa, args)
            for num_threads in map(int, args.threads.split(",")):
                run(num_threads)
                ratios = []
                for _ in range(3):
                    peak = sgemm_peak()
                    seconds = cpu_seconds(partial(run, num_threads), args.repeats) / devices
                    rate = flop * samples * args.epochs / seconds / 1e9
                    ratios.append((rate / peak, rate, peak, seconds))
                share, rate, peak, seconds = sorted(ratios)[1]
                print(
                    f"{name:30} {isa:9} {num_threads} threads: {seconds * 1e6:9.1f} us CPU per "
                    f"update, {rate:6.1f} GF/s, {100 * share:4.0f} % of sgemm ({peak:.0f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
