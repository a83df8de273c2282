"""FedPer and FedRep: the body of a network is everyone's, its head is each device's own."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.features import last_linear
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples


@final
class FedPer(ClientStrategy):
    r"""Keep the last linear layer on the device; train and answer with it.

    A device remembers how far its head is from that of the global network, which begins as
    everyone's and never changes: the head's update is zero. It still travels, as zeros, so the
    bytes are those of FedAvg; the head (4 bytes for each of its numbers) is what a device stores.

    Reference: Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization
    Layers", 2019, arXiv:1912.00818, with one personal layer.
    """

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the head."""
        return {"head": TensorSpec((num_in_head(model),))}

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Train from the own head."""
        return with_head(model, params, memory["head"]), memory

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Keep the head, and send none."""
        return leave_head(passage, memory)

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,  # noqa: ARG002
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Answer with the own head."""
        return with_head(model, params, memory["head"])


@final
class FedRep(ClientStrategy):
    r"""As `FedPer`, but train the head first and the body after it, never both at once.

    In each round the first steps move the head alone, on the representation that everyone shares;
    the others move the body alone, through a head that fits the device.

    Reference: Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for
    Personalized Federated Learning", ICML 2021, arXiv:2102.07078. We differ: the head's part of a
    round is given in steps, not in epochs (ten of the head and one of the body, in the authors'
    scripts).

    Args:
        head_steps: Steps of a round that train the head, at least 1. A device that takes no more
            than these trains its head alone.
    """

    def __init__(self, *, head_steps: int = 10) -> None:
        if head_steps < 1:
            raise ValueError(f"head_steps is {head_steps}; at least 1 is allowed")
        self.head_steps = head_steps

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the head, and what a round needs to hold the other part still."""
        size = model.layout.num_trained
        return {
            "head": TensorSpec((num_in_head(model),)),
            "step": TensorSpec((1,), torch.int64, is_kept=False),
            "is_head": TensorSpec((size,), torch.bool, is_kept=False),
            "held": TensorSpec((size,), is_kept=False),
        }

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Train from the own head."""
        local, size = with_head(model, params, memory["head"]), model.layout.num_trained
        is_head = torch.zeros(size, dtype=torch.bool)
        for place in _places(model):
            is_head[place] = True
        return local, memory.replace(is_head=is_head, held=local[:size].clone())

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        """Leave the gradient of the part that moves."""
        return torch.where(self._moves(memory), gradients, 0.0)

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:  # noqa: ARG002
        """Put the other part back, which momentum or weight decay may have moved."""
        return torch.where(self._moves(memory), params, memory["held"])

    def after_step(
        self,
        before: Tensor,  # noqa: ARG002
        after: Tensor,
        gradients: Tensor,  # noqa: ARG002
        memory: Memory,
    ) -> Memory:
        """Count the step."""
        return memory.replace(step=memory["step"] + 1, held=after)

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Keep the head, and send none."""
        return leave_head(passage, memory)

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,  # noqa: ARG002
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Answer with the own head."""
        return with_head(model, params, memory["head"])

    def _moves(self, memory: Memory) -> Tensor:
        """Return which parameters this step moves [T]."""
        return memory["is_head"] == (memory["step"] < self.head_steps)


def num_in_head(model: FlatModel) -> int:
    """Return the numbers in a network's last linear layer."""
    return sum(place.stop - place.start for place in _places(model))


def with_head(model: FlatModel, params: Tensor, offset: Tensor) -> Tensor:
    """Return parameters [P] with a device's own head, given by its offset from the global one."""
    own, start = params.clone(), 0
    for place in _places(model):
        size = place.stop - place.start
        own[place] += offset[start : start + size]
        start += size
    return own


def leave_head(passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
    """Take the head out of what is sent, into the memory."""
    local, places = passage.local.clone(), _places(passage.model)
    offset = torch.cat([passage.local[place] - passage.given[place] for place in places])
    for place in places:
        local[place] = passage.given[place]
    return local, memory.replace(head=offset)


def _places(model: FlatModel) -> list[slice]:
    head = last_linear(model)
    return [head.weight] if head.bias is None else [head.weight, head.bias]
