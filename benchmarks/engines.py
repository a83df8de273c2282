"""Measure edgelearn's engines and its peers, and rewrite docs/benchmarks.md.

    python benchmarks/engines.py                    everything; hours on 2 cores
    python benchmarks/engines.py --only w1,memory   some parts; each has a result file of its own
    python benchmarks/engines.py --quick            proves that the scripts work; means nothing

An interrupted part goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import render
from harness.paths import PAGE, QUICK_RESULTS
from harness.results import Options, say
from parts import (
    calibration,
    codecs,
    comparison,
    continual,
    device,
    evaluation,
    ewc,
    feedback,
    memory,
    pipelines,
    pruning,
    scaling,
    steps,
)

PARTS: dict[str, Callable[[Options], dict[str, Any]]] = {
    **{w: partial(comparison.measure, w) for w in comparison.WORKLOADS_OF_PART},
    "memory": memory.measure,
    "evaluation": evaluation.measure,
    "ewc": ewc.measure,
    "steps": steps.measure,
    "continual": continual.measure,
    "device": device.measure,
    "scaling": scaling.measure,
    "codecs": codecs.measure,
    calibration.PART: calibration.measure,
    feedback.PART: feedback.measure,
    pipelines.PART: pipelines.measure,
    pruning.PART: pruning.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--repetitions", type=int, default=5, help="turns; default 5")
    parser.add_argument("--quick", action="store_true", help="one short turn of each")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted invocation")
    parser.add_argument("--no-peers", action="store_true", help="only edgelearn and the naive loop")
    asked = parser.parse_args()
    wanted = [name.strip() for name in asked.only.split(",")]
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options = Options(
        quick=asked.quick,
        repetitions=1 if asked.quick else asked.repetitions,
        fresh=asked.fresh or asked.quick,
        peers=not asked.no_peers,
    )
    for name in wanted:
        started = time.perf_counter()
        PARTS[name](options)
        say(f"{name}: {time.perf_counter() - started:.0f} s")
    page = QUICK_RESULTS / "benchmarks.md" if options.quick else PAGE
    print(render.render(options.folder, page))


if __name__ == "__main__":
    main()
