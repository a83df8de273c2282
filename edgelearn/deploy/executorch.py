"""ExecuTorch files: a network as phones run it, on ARM and x86, by XNNPACK's kernels.

Lowering takes seconds to minutes, and weights can't be changed in the file afterwards. So it is a
step of a release, not of a round, and there is no runtime of this name: a fleet that learns is
served by `onnxruntime`. A file answers batches of one fixed size.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgelearn.errors import ExtraMissingError, RunError
from edgelearn.params import FlatModel

_NEEDED_FOR = "the format 'pte'"


def require() -> None:
    """See that ExecuTorch is there.

    Raises:
        ExtraMissingError: If executorch or torchao is not installed.
    """
    for package in ("executorch", "torchao"):
        if find_spec(package) is None:
            raise ExtraMissingError(package=package, extra="executorch", needed_for=_NEEDED_FOR)


def lower(
    model: FlatModel,
    params: Tensor,
    calibration: Tensor,
    *,
    is_quantized: bool,
    batch: int = 1,
    timeout_s: float = 900.0,
) -> bytes:
    """Return the ExecuTorch file of a network with parameters [P].

    In a process of its own, see `edgelearn.deploy.lowering`.

    Args:
        model: The network.
        params: Its parameters [P].
        calibration: Inputs [n, ...], n >= B; those of an incomplete last batch are left out.
        is_quantized: In int8; else the network stays float.
        batch: Rows of a call, B; the file answers no other number.
        timeout_s: For the lowering.

    Raises:
        ExtraMissingError: If executorch is not installed.
        RunError: If the network can't be exported or lowered; the cause is told.
        ValueError: If there are fewer inputs than a batch.
    """
    require()
    if not 1 <= batch <= len(calibration):
        raise ValueError(f"batch is {batch}; allowed: 1 to {len(calibration)} rows, the inputs")
    module = copy.deepcopy(model.module).eval().requires_grad_(False)
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    views = model.layout.views(params.detach())
    module.load_state_dict({n: v for n, v in views.items() if n in own}, strict=False)
    inputs = {"example": calibration[:batch].contiguous().clone()}
    if is_quantized:
        count = len(calibration) // batch * batch
        inputs["calibration"] = calibration[:count].contiguous().clone()
    try:
        program = torch.export.export(module, (inputs["example"],))
    except Exception as error:  # whatever a forward pass does that can't be followed
        raise RunError(f"the network can't be exported: {type(error).__name__}: {error}") from error
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.export.save(program, folder / "network.pt2")
        save_file(inputs, folder / "inputs.safetensors")
        paths = [str(folder / leaf) for leaf in ("network.pt2", "inputs.safetensors", "out.pte")]
        _run([sys.executable, "-m", "edgelearn.deploy.lowering", *paths], timeout_s)
        return (folder / "out.pte").read_bytes()


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"lowering for ExecuTorch took more than {timeout_s:.0f} s") from error
    if done.returncode:
        raise RunError(f"lowering for ExecuTorch failed: {done.stderr.strip()[-2000:]}")


@final
class ExecuTorchPredictor:
    """An ExecuTorch file in service by its Python runtime.

    Args:
        artefact: The file's bytes.
        batch: Its number of rows.

    Raises:
        ExtraMissingError: If executorch is not installed.
    """

    def __init__(self, artefact: bytes, *, batch: int = 1) -> None:
        require()
        from executorch.runtime import Runtime

        self._artefact, self._batch = artefact, batch  # the program reads from these bytes
        self._program: Any = Runtime.get().load_program(artefact)
        self._forward: Any = self._program.load_method("forward")

    @property
    def model_bytes(self) -> int:
        """Bytes of the artefact."""
        return len(self._artefact)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C], for any multiple of the file's number of rows.

        Raises:
            ValueError: If it is none.
        """
        if not len(x) or len(x) % self._batch:
            raise ValueError(f"{len(x)} rows; the file answers {self._batch} at a time")
        parts = torch.split(x.contiguous(), self._batch)
        return torch.cat([self._forward.execute([part])[0].clone() for part in parts])
