"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import edgelearn
from harness.paths import ROOT

_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx_vnni",
    "avx512_vnni",
    "amx_tile",
    "amx_int8",
)


def describe() -> dict[str, Any]:
    """Return machine, versions and commit."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = set(re.search(r"flags\s*:\s*(.*)", text)[1].split()) if "flags" in text else set()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": platform.machine(),
        "cpu": name[1].strip() if name else platform.processor(),
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": round(memory_gib, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("torch", "flwr", "numpy")},
        "edgelearn": edgelearn.__version__,
        "commit": _commit(),
    }


def load() -> float:
    """Return the load average of the last minute: what else ran beside a measurement."""
    return os.getloadavg()[0]


def _commit() -> str:
    """Return the last commit that changed code, and whether there are changes beside it."""
    code = ["--", "edgelearn", "benchmarks", ":!benchmarks/results"]
    git = ["git", "-C", str(ROOT)]
    last = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--abbrev=10", *code],
        capture_output=True,
        text=True,
        check=False,
    )
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD", *code], check=False)
    return last.stdout.strip() + ("" if clean.returncode == 0 else "-changed")
