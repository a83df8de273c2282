"""The principal subspace of what a fleet's layers see, from sketches that can be averaged.

A sketch Y = C Omega of a moment matrix C [D, D] is linear in C: the mean of the devices' sketches
is the sketch of the fleet's moment, and those of two experiences add up. Omega has signs drawn from
a counter, so that every device has the same one, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgelearn.continual.layers import Layer, observe
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.seeds import derive, split_all

_ROWS = 64  # samples whose layers' inputs are held at once
_NOISE = 1e-5  # eigenvalues below this part of the largest are rounding


def random_directions(width: int, rank: int) -> Tensor:
    """Return Omega [D, min(D, rank)]: signs / sqrt(rank), or the identity where that is as small.

    Args:
        width: D.
        rank: Columns wanted.
    """
    if width <= rank:
        return torch.eye(width)
    words = split_all(derive(0, "sketch", width, rank), np.arange(width * rank))
    signs = 1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64)
    return torch.from_numpy(signs / np.sqrt(rank)).to(torch.float32).view(width, rank)


@torch.no_grad()
def sketches(
    model: FlatModel, params: Tensor, data: Samples, layers: Sequence[Layer], rank: int
) -> list[Tensor]:
    """Return the sketch of each layer's moment, C = sum a a^T / sum |a|^2, of trace 1.

    Args:
        model: The network, in eval mode.
        params: Trained parameters [T].
        data: Samples, at least one.
        layers: Layers of the network; a layer's inputs a [D] are those of `Layer.columns`.
        rank: Columns of a sketch.

    Returns:
        [D, min(D, rank)] for each layer.
    """
    omegas = [random_directions(layer.width, rank) for layer in layers]
    found = [torch.zeros_like(omega) for omega in omegas]
    traces = [torch.zeros(()) for _ in layers]
    for start in range(0, len(data), _ROWS):
        batch = data.batch(slice(start, min(start + _ROWS, len(data))))
        _, inputs = observe(model, params, batch.x, layers)
        for i, (layer, seen) in enumerate(zip(layers, inputs, strict=True)):
            columns = layer.columns(seen).flatten(0, 1)
            found[i] += columns.t() @ (columns @ omegas[i])
            traces[i] += columns.square().sum()
    # A layer that sees nothing but zeros has no subspace.
    return [y / trace.clamp(min=1e-12) for y, trace in zip(found, traces, strict=True)]


@torch.no_grad()
def principal_subspace(sketch: Tensor, *, trace: float, energy: float) -> Tensor:
    """Return an orthonormal basis [D, k] of the moment's principal subspace.

    By the Nystroem approximation C ~ Y (Omega^T Y)^+ Y^T, whose eigenvalues never exceed those of
    C (Gittens and Mahoney, "Revisiting the Nystroem Method", ICML 2013, arXiv:1303.1849); k is the
    least number of directions with the wanted part of the trace, or all that the sketch has.

    Args:
        sketch: Y [D, r].
        trace: Trace of C.
        energy: Part of the trace to cover, in [0, 1].
    """
    y = sketch.double()
    omega = random_directions(*sketch.shape).double()
    core = omega.t() @ y
    values, vectors = torch.linalg.eigh((core + core.t()) / 2)
    is_real = values > _NOISE * values[-1].clamp(min=0)
    factor = y @ (vectors[:, is_real] / values[is_real].sqrt())
    basis, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    covered = singular.square().cumsum(0)
    enough = int((covered < energy * trace * (1 - 1e-6)).sum()) + 1
    found: Tensor = basis[:, :enough].to(sketch.dtype)
    return found


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return a matrix [outputs, D] that maps nothing of the basis [D, k]: M - M U U^T."""
    return matrix - (matrix @ basis) @ basis.t()
