"""Resident memory of a process that does nothing but answer with one model, one sample a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clock import argument, finish

_NUM_ANSWERS = 50


def resident_mib(field: str = "VmRSS") -> float:
    """Return the resident memory of this process now (VmRSS), or at its most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def by_onnxruntime(asked: dict[str, Any]) -> tuple[float, Callable[[], object]]:
    """Return the memory after the imports, and how to answer; no torch in this process."""
    import numpy as np
    import onnxruntime

    imported = resident_mib()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(asked["file"], options)
    x = np.zeros((1, *asked["shape"]), np.float32)
    assert "torch" not in sys.modules
    return imported, lambda: session.run(None, {"input": x})


def by_torch(asked: dict[str, Any]) -> tuple[float, Callable[[], object]]:
    """Return the same, with a runtime that executes in torch."""
    import torch
    from safetensors.torch import load_file

    from edgelearn.params import FlatModel
    from edgelearn.runtime.protocol import make_runtime

    if asked["network"] == "cnn":
        from edgelearn.scenario.models import cnn as factory
    else:
        from torchvision.models import mobilenet_v2 as factory
    torch.set_num_threads(1)
    imported = resident_mib()
    model = FlatModel(factory(**asked["arguments"]))
    model.module.eval()
    runtime = make_runtime(asked["runtime"], asked["runtime_args"])
    x = torch.rand(1, *asked["shape"])
    with torch.no_grad():
        served = runtime.prepare(model, load_file(asked["file"])["params"]).calibrated(x)

    def answer() -> object:
        with torch.no_grad():
            return served(x)

    return imported, answer


def by_executorch(asked: dict[str, Any]) -> tuple[float, Callable[[], object]]:
    """Return the same, for a file of ExecuTorch; its Python runtime takes tensors of torch."""
    import torch

    from edgelearn.deploy.executorch import ExecuTorchPredictor

    x = torch.rand(1, *asked["shape"])
    imported = resident_mib()
    served = ExecuTorchPredictor(Path(asked["file"]).read_bytes())
    return imported, lambda: served(x)


def main() -> None:
    asked = argument()
    ways = {"onnxruntime": by_onnxruntime, "executorch": by_executorch}
    imported, answer = ways.get(asked["runtime"], by_torch)(asked)
    for _ in range(_NUM_ANSWERS):
        answer()
    finish(
        {
            "imported_mib": imported,
            "answering_mib": resident_mib(),
            "most_mib": resident_mib("VmHWM"),
        }
    )


if __name__ == "__main__":
    main()
