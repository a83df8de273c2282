"""What quantization-aware training brings, and training of int8 codes, over some seeds.

Two parts: a fleet that learns split Fashion-MNIST, served with 8 and with 4 bits; and one device
that adapts to turned images without float weights. Accuracy only, so the machine may be busy.
Stores benchmarks/results/quantization.json and int8-training.json and rewrites docs/benchmarks.md.
Some minutes of one core; needs Fashion-MNIST: python benchmarks/quantization.py --seeds 3.
"""

from __future__ import annotations

import argparse

import render
import torch
from harness.paths import PAGE, QUICK_RESULTS
from harness.results import Options
from parts import int8_training, quantization


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="proves that it works; means nothing")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted invocation")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = Options(quick=asked.quick, fresh=asked.fresh or asked.quick)
    for part in (quantization, int8_training):
        part.measure(options, num_seeds=asked.seeds)
    page = QUICK_RESULTS / "benchmarks.md" if options.quick else PAGE
    print(render.render(options.folder, page))


if __name__ == "__main__":
    main()
