"""Lower an exported network for ExecuTorch, in a process of its own: `python -m` this module.

Lowering leaves traces in a process: what is compiled there afterwards was seen to be wrong, and a
second lowering to fail. So `edgelearn.deploy.executorch` starts this module for each.

Reference: ExecuTorch's XNNPACK backend; quantization by export (PT2E) of torchao.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram


def lowered(program: ExportedProgram, example: Tensor, calibration: Tensor | None) -> bytes:
    """Return the file of an exported network whose layers XNNPACK computes.

    Args:
        program: The network, exported for a batch of this size.
        example: Inputs [B, ...].
        calibration: Inputs [n, ...], n a multiple of B, that ranges of activations come from; then
            weights are symmetric int8 per output channel, activations affine int8 per tensor. None:
            the network stays float.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    if calibration is not None:
        program = _quantized(program, example, calibration)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    data: bytes = edge.to_executorch().buffer
    return data


def _quantized(program: ExportedProgram, example: Tensor, calibration: Tensor) -> ExportedProgram:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed: Any = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for batch in torch.split(calibration, len(example)):
            observed(batch)
    return torch.export.export(convert_pt2e(observed), (example,))


def main() -> None:
    """Read the network and its inputs, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path, help="the network, by torch.export.save")
    parser.add_argument("inputs", type=Path, help="safetensors: example, and calibration if int8")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    inputs = load_file(asked.inputs)
    program = torch.export.load(asked.program)
    data = lowered(program, inputs["example"], inputs.get("calibration"))
    asked.out.write_bytes(data)


if __name__ == "__main__":
    main()
