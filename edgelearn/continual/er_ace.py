"""Experience replay with asymmetric cross-entropy: new classes do not push old ones aside."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.scenario.stream import Experience


@final
class ERACE(ClientStrategy):
    r"""Let present samples compete among their own classes, and stored ones among all seen.

    In plain replay, the many present samples lower the logits of all classes that are not theirs,
    so that features of old classes are pushed away abruptly when an experience begins. Here

        L = CE(present; classes of the present samples) + CE(buffer; classes seen so far),

    where CE(. ; S) is the cross-entropy of a softmax over the classes of S alone. The classes of
    present samples are those in the batch, as in the authors' code; those seen so far are the ones
    of all experiences that the device has begun. The two terms are added, so a step is about twice
    as large as one of plain replay. Without stored samples there is nothing to protect, and the
    loss is plain cross-entropy (there, in the first task).

    The buffer of the second term must hold samples of the present experience too: nothing else lets
    new classes win against old ones. There, it takes them in as they arrive; here, only when the
    experience has ended. So the present samples of the batch stand for them, with the part p that
    they would have in a balanced buffer:

        CE(buffer; S) = (1 - p) CE(past; S) + p CE(present; S),

    where p is the mean, over the classes seen, of 1 / (experiences that had the class) for classes
    of the present experience and 0 for others: 1/2 in the second of equal experiences, 1/3 in the
    third.

    Reference: Caccia, Aljundi, Asadi, Tuytelaars, Pineau, Belilovsky, "New Insights on Reducing
    Abrupt Representation Change in Online Continual Learning", ICLR 2022, arXiv:2104.05025.

    Args:
        memory_kib: Size of the buffer on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        policy: What a full buffer keeps: "class-balanced" or "reservoir".
        replay_batch: Samples replayed per step; 0 replays as many as arrive.
    """

    replaces_loss = True

    def __init__(
        self,
        *,
        memory_kib: float = 0.0,
        capacity: int = 0,
        policy: str = "class-balanced",
        replay_batch: int = 0,
    ) -> None:
        self.replay = Replay(
            memory_kib=memory_kib, capacity=capacity, policy=policy, replay_batch=replay_batch
        )

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare the buffer, how often each class came, and which the present experience has."""
        return {
            **self.replay.declare(model, facts),
            "times": TensorSpec((facts.num_classes,), torch.int64),
            "present": TensorSpec((facts.num_classes,), torch.bool),
        }

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,
    ) -> Memory:
        """Take note of the classes that begin."""
        present = torch.zeros_like(memory["present"])
        present[list(experience.classes)] = True
        return memory.replace(times=memory["times"] + present, present=present)

    def rehearsal(self) -> Rehearsal:
        """Declare that samples of the buffer join every batch."""
        return self.replay.rehearsal()

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return the asymmetric cross-entropy."""
        logits = model(params, batch.x)
        if batch.places is None:
            return supervised_loss(logits, batch)
        present, past = batch.present, batch.past
        now, then = logits[: len(present)], logits[len(present) :]
        known, part = memory["times"] > 0, _part_of_present(memory)
        in_batch = (present.y[:, None] == torch.arange(logits.shape[1])).any(0)
        return (
            supervised_loss(_among(now, in_batch), present)
            + (1 - part) * supervised_loss(_among(then, known), past)
            + part * supervised_loss(_among(now, known), present)
        )

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


def _part_of_present(memory: Memory) -> Tensor:
    """Return the part that the present experience would have in a balanced buffer, scalar."""
    times = memory["times"]
    return (memory["present"] / times.clamp(min=1)).sum() / (times > 0).sum().clamp(min=1)


def _among(logits: Tensor, classes: Tensor) -> Tensor:
    """Return logits [n, C] that leave out all but some classes [C], bool."""
    return logits.masked_fill(~classes, float("-inf"))
