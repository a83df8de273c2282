"""Whether a network treats each row of a batch on its own, so that devices can share a batch.

Most do. Some do not: a network that standardizes over the batch, or one that folds rows into
another dimension before a layer (recurrent layers' [time, rows, features], say) so that a layer can
no longer tell whose input it has. Such a network answers one device at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel

_PARTS = [2, 3]
_TOLERANCE = 1e-4  # kernels add up in another order for another number of rows
_MOST_ROWS = 512  # with more, torch's own cost per operation no longer counts
_FEWEST_ROWS = 16
_NUM_NUMBERS = 2**19  # what a layer takes or gives; beyond a cache, memory is what costs
_Decisions = dict[tuple[int, ...], int | None]
_decided: WeakKeyDictionary[nn.Module, _Decisions] = WeakKeyDictionary()


def shared_batch(model: FlatModel, shape: tuple[int, ...]) -> int | None:
    """Return how many rows of any devices a batch may hold; None if the network mixes rows.

    It doesn't if a batch gives the same as its parts, in every layer and in the answer.

    Tried once per network, on five inputs that depend on nothing but the shape and with the
    network's initial parameters, so that every process decides alike: each input of a linear or
    convolution layer, and the logits, must have a row for each row of the batch, and the same ones
    as two smaller batches have. A network that fails on such inputs counts as one that mixes rows.
    The number of rows depends on the size of the largest layer alone, again for all processes.

    Args:
        model: The network.
        shape: Shape of one input.

    Example:
        >>> shared_batch(FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))), (2, 2))
        512
        >>> class Centred(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x - x.mean(0))
        >>> shared_batch(FlatModel(Centred(4, 2)), (4,)) is None
        True
    """
    known = _decided.setdefault(model.module, {})
    if shape not in known:
        known[shape] = _try(model, shape)
    return known[shape]


@dataclass(frozen=True, slots=True)
class _Trace:
    """What a forward pass did: each layer's name and input, the logits, the size of a row."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    row_size: int


def _try(model: FlatModel, shape: tuple[int, ...]) -> int | None:
    x = 3 * torch.rand(sum(_PARTS), *shape, generator=torch.Generator().manual_seed(0))
    try:
        whole = _trace(model, x)
        parts = [_trace(model, part) for part in torch.split(x, _PARTS)]
    except Exception:  # whatever a network does with inputs that mean nothing to it
        return None
    if any(part.names != whole.names for part in parts):
        return None
    seen = zip(whole.tensors, *(part.tensors for part in parts), strict=True)
    if not all(_is_stacked(full, rest) for full, *rest in seen):
        return None
    return min(max(_NUM_NUMBERS // whole.row_size, _FEWEST_ROWS), _MOST_ROWS)


def _trace(model: FlatModel, x: Tensor) -> _Trace:
    names: list[str] = []
    tensors: list[Tensor] = []
    sizes = [x[0].numel()]

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            names.append(name)
            tensors.append(inputs[0])
            sizes.extend(t.numel() // len(x) for t in (inputs[0], output))

        return hook

    hooks = [
        layer.register_forward_hook(hook_of(name))
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    model.module.eval()
    try:
        with torch.no_grad():
            logits = model(model.initial(), x)
    finally:
        for hook in hooks:
            hook.remove()
    return _Trace(tuple(names), (*tensors, logits), max(sizes))


def _is_stacked(whole: Tensor, parts: list[Tensor]) -> bool:
    if any(len(part) != size for part, size in zip(parts, _PARTS, strict=True)):
        return False
    stacked = torch.cat(parts)
    if whole.shape != stacked.shape:
        return False
    largest = float(stacked.abs().max()) if stacked.numel() else 0.0
    return torch.allclose(whole, stacked, rtol=0, atol=_TOLERANCE * largest, equal_nan=True)
