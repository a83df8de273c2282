"""Where things lie."""

from __future__ import annotations

from pathlib import Path

BENCH = Path(__file__).parents[1]
ROOT = BENCH.parent
RESULTS = BENCH / "results"
QUICK_RESULTS = ROOT / "build" / "bench-quick"  # never mixed with measurements
DATA = ROOT / "build" / "bench-data"
VENVS = ROOT / "build" / "bench-venvs"
WORKLOADS = BENCH / "workloads"
PEERS = BENCH / "peers"
CHILDREN = BENCH / "children"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "benchmarks.md"
