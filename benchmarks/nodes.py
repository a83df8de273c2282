"""Measure where ONNX Runtime's microseconds and bytes go, and rewrite docs/benchmarks.md.

python benchmarks/nodes.py             about two minutes of a core
python benchmarks/nodes.py --quick     proves that it works; means nothing
"""

from __future__ import annotations

import argparse

import render
from harness.paths import PAGE, QUICK_RESULTS
from harness.results import Options
from parts import nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="turns; default 3")
    parser.add_argument("--quick", action="store_true", help="one short turn")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted invocation")
    asked = parser.parse_args()
    options = Options(
        quick=asked.quick,
        repetitions=1 if asked.quick else asked.repetitions,
        fresh=asked.fresh or asked.quick,
    )
    print(nodes.section(nodes.measure(options)))
    print(render.render(options.folder, QUICK_RESULTS / "benchmarks.md" if asked.quick else PAGE))


if __name__ == "__main__":
    main()
