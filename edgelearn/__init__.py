"""edgelearn: fleets of devices that keep learning.

A scenario says what is learned, who sees which part of it, and when. A fleet of devices lives
through it: each answers with a quantized model, learns locally without forgetting, and exchanges
model updates, never data, with a Flower server.

Example:
    >>> import edgelearn
    >>> scenario = edgelearn.load("split-digits", client={"strategy": "naive"})
    >>> record = edgelearn.simulate(scenario)  # doctest: +SKIP
    >>> record.scores().average_accuracy  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Flower reports usage and looks for updates unless told otherwise before it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgelearn.api import compare, load, simulate
    from edgelearn.continual.memory import Memory, SampleSpec, TensorSpec
    from edgelearn.continual.strategy import ClientStrategy, Facts, Update
    from edgelearn.errors import EdgelearnError
    from edgelearn.federated.record import RunRecord
    from edgelearn.params import FlatModel
    from edgelearn.scenario.samples import Batch, Samples
    from edgelearn.scenario.spec import Scenario
    from edgelearn.scenario.stream import Experience

# Name -> module. Imported when first used: `edgelearn --help` needs neither torch nor flwr.
_PUBLIC = {
    "Batch": "edgelearn.scenario.samples",
    "ClientStrategy": "edgelearn.continual.strategy",
    "EdgelearnError": "edgelearn.errors",
    "Experience": "edgelearn.scenario.stream",
    "Facts": "edgelearn.continual.strategy",
    "FlatModel": "edgelearn.params",
    "Memory": "edgelearn.continual.memory",
    "RunRecord": "edgelearn.federated.record",
    "SampleSpec": "edgelearn.continual.memory",
    "Samples": "edgelearn.scenario.samples",
    "Scenario": "edgelearn.scenario.spec",
    "TensorSpec": "edgelearn.continual.memory",
    "Update": "edgelearn.continual.strategy",
    "compare": "edgelearn.api",
    "load": "edgelearn.api",
    "simulate": "edgelearn.api",
}

__all__ = [
    "Batch",
    "ClientStrategy",
    "EdgelearnError",
    "Experience",
    "Facts",
    "FlatModel",
    "Memory",
    "RunRecord",
    "SampleSpec",
    "Samples",
    "Scenario",
    "TensorSpec",
    "Update",
    "__version__",
    "compare",
    "load",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgelearn' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
