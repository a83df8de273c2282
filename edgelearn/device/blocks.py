"""Blocks of a network that are computed again in the backward pass instead of being kept.

The children of each outermost `nn.Sequential`, those of nested ones in their place; what has no
parameters belongs to the block before it. Networks that hold their layers otherwise have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Bound = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A sequence of layers, cut into blocks.

    Attributes:
        sequence: The module.
        blocks: Its layers.
        num_kept: How many blocks, from the back, are kept: nothing is gained by computing again
            what the backward pass begins with.
    """

    sequence: nn.Sequential
    blocks: tuple[tuple[nn.Module, ...], ...]
    num_kept: int


def blocks_of(module: nn.Module) -> list[Blocks]:
    """Return what can be computed again in a network; empty if nothing can."""
    found = []
    for sequence in _outermost(module):
        blocks: list[list[nn.Module]] = []
        for layer in _layers(sequence):
            if not blocks or (_owns(layer) and any(map(_owns, blocks[-1]))):
                blocks.append([])
            blocks[-1].append(layer)
        if len(blocks) > 1:
            is_last = sequence is module
            found.append(Blocks(sequence, tuple(map(tuple, blocks)), int(is_last)))
    return found


@contextmanager
def checkpointed(found: Sequence[Blocks], bound: Bound) -> Iterator[None]:
    """Let a network keep the inputs of its blocks only, for the while of a forward pass.

    Args:
        found: Its blocks.
        bound: Makes the network see the same tensors again, when blocks are computed again.
    """
    with ExitStack() as stack:
        for blocks in found:
            blocks.sequence.forward = _Again(blocks, bound)  # type: ignore[method-assign]
            stack.callback(delattr, blocks.sequence, "forward")
        yield


class _Again:
    """The forward pass of a sequence of blocks."""

    def __init__(self, blocks: Blocks, bound: Bound) -> None:
        self._blocks, self._bound = blocks, bound

    def __call__(self, x: Tensor) -> Tensor:
        blocks = self._blocks.blocks
        for number, layers in enumerate(blocks):
            is_kept = number >= len(blocks) - self._blocks.num_kept
            if is_kept or not (torch.is_grad_enabled() and _has_graph(layers, x)):
                x = _through(layers, x)
                continue
            x = checkpoint(
                self._run,
                layers,
                x,
                use_reentrant=False,
                context_fn=partial(_contexts, layers),
            )
        return x

    def _run(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        with self._bound():
            return _through(layers, x)


def _contexts(
    layers: Sequence[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what a block runs in, first and again."""
    return nullcontext(), _unnoticed(layers)


def _through(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _has_graph(layers: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether a block has anything to keep."""
    if x.requires_grad:
        return True
    slots = (part._parameters for layer in layers for part in layer.modules())
    return any(p is not None and p.requires_grad for owned in slots for p in owned.values())


@contextmanager
def _unnoticed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch norm see a batch a second time without taking note of it."""
    norms = [
        part
        for layer in layers
        for part in layer.modules()
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms]
    counts = [None if counter is None else counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0  # the new statistics count nothing
    try:
        yield
    finally:
        for norm, momentum, counter, count in zip(norms, momenta, counters, counts, strict=True):
            norm.momentum = momentum
            if counter is not None and count is not None:
                counter.copy_(count)


def _outermost(module: nn.Module) -> Iterator[nn.Sequential]:
    if type(module) is nn.Sequential:
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _layers(sequence: nn.Sequential) -> Iterator[nn.Module]:
    for layer in sequence:
        is_plain = type(layer) is nn.Sequential and not (
            layer._forward_hooks or layer._forward_pre_hooks
        )
        if is_plain and isinstance(layer, nn.Sequential):
            yield from _layers(layer)
        else:
            yield layer


def _owns(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None
