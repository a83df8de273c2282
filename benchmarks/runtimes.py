"""Measure what an answer costs by each runtime, and rewrite docs/benchmarks.md.

    python benchmarks/runtimes.py                           about half an hour on an idle core
    python benchmarks/runtimes.py --mobilenet weights.safetensors
    python benchmarks/runtimes.py --only CNN                without MobileNetV2
    python benchmarks/runtimes.py --quick                   proves that it works; means nothing

A small CNN and MobileNetV2 (torchvision's), each by float torch, float ONNX Runtime, int8 torch,
int8 ONNX Runtime and, where the extra is installed, int8 ExecuTorch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import render
from harness.paths import PAGE, QUICK_RESULTS
from harness.results import Options
from harness.subjects import CNN, LARGE, MOBILENET
from parts import runtimes

_NAMES = {"CNN": CNN, "mobilenet-32": MOBILENET, "mobilenet-224": LARGE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mobilenet", type=Path, metavar="FILE", help="weights (safetensors)")
    parser.add_argument("--only", default=",".join(_NAMES), help="networks, by comma")
    parser.add_argument("--steps", type=int, default=600, help="of MobileNetV2, without a file")
    parser.add_argument("--repetitions", type=int, default=5, help="turns; default 5")
    parser.add_argument("--quick", action="store_true", help="one short turn of each")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted invocation")
    asked = parser.parse_args()
    wanted = [name.strip() for name in asked.only.split(",")]
    if unknown := [name for name in wanted if name not in _NAMES]:
        parser.error(f"unknown network {', '.join(unknown)}; there are {', '.join(_NAMES)}")
    options = Options(
        quick=asked.quick,
        repetitions=1 if asked.quick else asked.repetitions,
        fresh=asked.fresh or asked.quick,
    )
    only = tuple(_NAMES[name] for name in wanted)
    chosen = runtimes.Asked(mobilenet=asked.mobilenet, steps=asked.steps, only=only)
    result = runtimes.measure(options, chosen)
    print(runtimes.section(result))
    print(render.render(options.folder, QUICK_RESULTS / "benchmarks.md" if asked.quick else PAGE))


if __name__ == "__main__":
    main()
