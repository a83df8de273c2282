"""Reptile: move a part of the way to where local training leads, and adapt before answering."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.adapt import adapted, check_descent
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples


@final
class Reptile(ClientStrategy):
    r"""Learn parameters from which a few steps on a device's own samples lead far.

    A device trains as usual, from theta to W, and sends the update of theta + epsilon (W - theta).
    FedAvg's mean of these is Reptile with a batch of tasks, one device a task (Nichol et al.,
    equation 5: theta <- theta + epsilon mean_i (W_i - theta)); its weights are in proportion to the
    devices' samples. With two local steps or more the expected update also raises the inner product
    of gradients of different batches, as they show: a step on one then helps the other.

    With epsilon = 1 this is FedAvg (McMahan et al. 2017), so what is left to compare is adaptation:
    the device answers with parameters that took `adapt_steps` steps on all of its current samples.
    In a class-incremental stream these are of the newest classes alone, and adapting to them
    forgets the others; use it where devices differ, or with `adapt_steps` = 0.

    Reference: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018,
    arXiv:1803.02999. We differ: epsilon is constant; the authors anneal it to 0 (for images from 1)
    over a run whose end they know.

    Args:
        epsilon: Part of the way, in (0, 1].
        adapt_steps: Steps before answering; 0 answers with the global parameters.
        adapt_lr: Their size, above 0.
    """

    def __init__(
        self, *, epsilon: float = 0.5, adapt_steps: int = 5, adapt_lr: float = 0.02
    ) -> None:
        if not 0 < epsilon <= 1:
            raise ValueError(f"epsilon is {epsilon}; allowed: above 0, to 1")
        check_descent("adapt", adapt_steps, adapt_lr, fewest=0)
        self.epsilon = epsilon
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Go back to theta + epsilon (W - theta); what is shared beside the network stays."""
        count = passage.model.layout.num_network
        moved = passage.given[:count].lerp(passage.local[:count], self.epsilon)
        return torch.cat([moved, passage.local[count:]]), memory

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Adapt to the device's current samples."""
        return adapted(model, params, data, steps=self.adapt_steps, lr=self.adapt_lr)
