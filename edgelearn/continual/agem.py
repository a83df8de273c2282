"""Averaged gradient episodic memory: no step may raise the loss on stored samples."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples


@final
class AGEM(ClientStrategy):
    r"""Project the gradient so that it does not point against that of stored samples.

    With the gradient g of the loss on present samples and g_ref of that on stored ones, the step
    follows

        g                                      if g . g_ref >= 0,
        g - (g . g_ref / g_ref . g_ref) g_ref  otherwise,

    the closest vector to g that does not raise the loss on stored samples (to first order). Stored
    samples are never trained on themselves. In class-incremental streams that is weaker than plain
    replay; it costs the same when as many samples are stored per step.

    Reference: Chaudhry, Ranzato, Rohrbach, Elhoseiny, "Efficient Lifelong Learning with A-GEM",
    ICLR 2019, arXiv:1812.00420, equation 11. We differ: the buffer is filled at the end of an
    experience, and is balanced by class (or a reservoir), not by experience. Batch-norm statistics
    see the stored samples too, as in Avalanche.

    Args:
        memory_kib: Size of the buffer on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        policy: What a full buffer keeps: "class-balanced" or "reservoir".
        replay_batch: Stored samples for g_ref in each step, all of them where there are fewer; 0
            takes as many as arrive. The default is the paper's for permuted MNIST: with few, g_ref
            is noise, and the projection with it.
    """

    def __init__(
        self,
        *,
        memory_kib: float = 0.0,
        capacity: int = 0,
        policy: str = "class-balanced",
        replay_batch: int = 256,
    ) -> None:
        self.replay = Replay(
            memory_kib=memory_kib, capacity=capacity, policy=policy, replay_batch=replay_batch
        )

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare the buffer."""
        return self.replay.declare(model, facts)

    def rehearsal(self) -> Rehearsal:
        """Declare that samples of the buffer come with every batch."""
        return self.replay.rehearsal()

    def gradient(
        self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Return the loss on present samples, and its gradient, projected."""
        loss, gradient = super().gradient(model, params, batch.present, memory)
        if batch.places is None:
            return loss, gradient
        _, reference = super().gradient(model, params, batch.past, memory)
        return loss, project(gradient, reference)

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Take the experience that has ended into the buffer."""
        return self.replay.finish(model, params, data, memory, generator)


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """Return the closest vector to `gradient` [T] that has no negative product with `reference`.

    A reference of zeros leaves it as it is.
    """
    product = gradient @ reference
    square = (reference @ reference).clamp(min=torch.finfo(reference.dtype).tiny)
    return gradient - (product.clamp(max=0.0) / square) * reference
