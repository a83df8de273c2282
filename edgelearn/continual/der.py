"""Dark experience replay: stored samples are replayed with the answers that the network once gave.

Two strategies: `DER` replays answers alone, `DERpp` labels as well.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Batch, Samples

_ROWS = 256  # samples in one forward pass


@final
class DER(ClientStrategy):
    r"""Replay samples and hold the network to the logits that it answered them with.

    The loss of a step with present samples (x, y) and stored ones (x', z'), where z' are logits, is

        CE(h(x), y) + alpha mean |h(x') - z'|^2,

    the first term over the present samples alone: labels of stored ones are not used. Logits say
    more than a label, about all classes, and hold the network without an old copy of it. The mean
    is over samples and classes, as in the authors' code; the squared norm of the paper is C times
    as large, and an alpha for it has to be divided by C.

    Reference: Buzzega, Boschini, Porrello, Abati, Calderara, "Dark Experience for General Continual
    Learning: a Strong, Simple Baseline", NeurIPS 2020, arXiv:2004.07211. We differ: there the
    buffer is a reservoir that takes in samples during training, with the logits of that moment;
    here it takes in an experience when it has ended, with the logits of the final global network (a
    device's own network half-way through a round is of no lasting interest to a fleet), and may be
    balanced by class. A sample that stays keeps its first logits.

    Args:
        alpha: Weight of the answers, at least 0; the default is the paper's for Seq-CIFAR-10.
        memory_kib: Size of the buffer on a device, in KiB of stored samples (logits come on top).
        capacity: The same in samples; give one of the two, or none for 200 samples.
        policy: What a full buffer keeps: "class-balanced" or "reservoir".
        replay_batch: Samples replayed per step; 0 replays as many as arrive.
    """

    replaces_loss = True

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        memory_kib: float = 0.0,
        capacity: int = 0,
        policy: str = "class-balanced",
        replay_batch: int = 0,
    ) -> None:
        _expect_weight("alpha", alpha)
        self.alpha = alpha
        self.replay = Replay(
            memory_kib=memory_kib, capacity=capacity, policy=policy, replay_batch=replay_batch
        )

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare the buffer and the logits of what lies in it."""
        return _with_logits(self.replay.declare(model, facts), facts)

    def rehearsal(self) -> Rehearsal:
        """Declare that samples of the buffer join every batch."""
        return self.replay.rehearsal()

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return the loss on present samples plus that on stored answers."""
        return dark_loss(
            model(params, batch.x), batch, memory["logits"], alpha=self.alpha, beta=0.0
        )

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Take the experience that has ended into the buffer, with the network's answers."""
        kept = self.replay.finish(model, params, data, memory, generator)
        return _aligned(model, params, memory, kept)


@final
class DERpp(ClientStrategy):
    r"""Replay samples with the logits that they were answered with, and with their labels.

    As `DER`, with a third term: CE(h(x), y) + alpha mean |h(x') - z'|^2 + beta CE(h(x'), y'). It
    helps where the stored logits are poor, such as after a sudden shift.

    Reference: Buzzega et al. (see `DER`). We differ as `DER` does, and both terms are taken on the
    same stored samples, which halves the replay; there two batches are drawn.

    Args:
        alpha: Weight of the answers, at least 0; default as in the paper for Seq-CIFAR-10 with
            200 samples.
        beta: Weight of the labels, at least 0; default likewise.
        memory_kib: Size of the buffer on a device, in KiB of stored samples (logits come on top).
        capacity: The same in samples; give one of the two, or none for 200 samples.
        policy: What a full buffer keeps: "class-balanced" or "reservoir".
        replay_batch: Samples replayed per step; 0 replays as many as arrive.
    """

    replaces_loss = True

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 0.5,
        memory_kib: float = 0.0,
        capacity: int = 0,
        policy: str = "class-balanced",
        replay_batch: int = 0,
    ) -> None:
        _expect_weight("alpha", alpha)
        _expect_weight("beta", beta)
        self.alpha = alpha
        self.beta = beta
        self.replay = Replay(
            memory_kib=memory_kib, capacity=capacity, policy=policy, replay_batch=replay_batch
        )

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare the buffer and the logits of what lies in it."""
        return _with_logits(self.replay.declare(model, facts), facts)

    def rehearsal(self) -> Rehearsal:
        """Declare that samples of the buffer join every batch."""
        return self.replay.rehearsal()

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return the loss on present samples plus those on stored answers and labels."""
        return dark_loss(
            model(params, batch.x), batch, memory["logits"], alpha=self.alpha, beta=self.beta
        )

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Take the experience that has ended into the buffer, with the network's answers."""
        kept = self.replay.finish(model, params, data, memory, generator)
        return _aligned(model, params, memory, kept)


def dark_loss(logits: Tensor, batch: Batch, stored: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Return CE(present) + alpha mean (h - z)^2 + beta CE(past), scalar.

    Args:
        logits: h of the whole batch [B, C].
        batch: Present samples, and past ones with their places in the buffer.
        stored: z by place in the buffer [capacity, C].
        alpha: Weight of the answers.
        beta: Weight of the labels; 0 leaves them out.
    """
    if batch.places is None:
        return supervised_loss(logits, batch)
    first = len(batch) - batch.num_past
    loss = supervised_loss(logits[:first], batch.present)
    past = logits[first:]
    loss = loss + alpha * F.mse_loss(past, stored[batch.places])
    if beta:
        loss = loss + beta * supervised_loss(past, batch.past)
    return loss


def same_sample(ids: Tensor, table: Tensor) -> Tensor:
    """Return for each id its place in a table of ids, -1 where it has none [n], int64.

    Ids are compared for equality alone. Where a table holds an id twice, the first place counts.
    """
    if len(table) == 0:
        return torch.full_like(ids, -1, dtype=torch.int64)
    ordered, places = table.sort(stable=True)
    found = torch.searchsorted(ordered, ids).clamp(max=len(table) - 1)
    return torch.where(ordered[found] == ids, places[found], -1)


def _with_logits(buffer: Declaration, facts: Facts) -> Declaration:
    (capacity,) = buffer["buffer"].shape
    return {**buffer, "logits": TensorSpec((capacity, facts.num_classes))}


@torch.no_grad()
def _aligned(model: FlatModel, params: Tensor, before: Memory, after: Memory) -> Memory:
    """Return the memory with each stored sample's logits in its place.

    Who stayed keeps its logits, even at another place; who is new is asked of the network now.
    """
    ids = after["buffer"]
    origin = same_sample(ids, before["buffer"])
    logits = before["logits"][origin.clamp(min=0)]
    new = ((origin < 0) & (ids != EMPTY)).nonzero().flatten()
    for places in torch.split(new, _ROWS):
        if len(places):
            logits[places] = model(params, after.store.batch(ids[places]).x)
    return after.replace(logits=logits)


def _expect_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} is {value}; at least 0 is allowed")
