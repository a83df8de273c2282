"""Experience replay: each step also sees samples of the past."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.buffers import class_balanced, herding, quotas, reservoir
from edgelearn.continual.features import features
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.mode import evaluating
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Samples

POLICIES = ("class-balanced", "reservoir", "herding")
_ROWS = 256  # that pass through the network at once


@final
class Replay(ClientStrategy):
    """Keep a bounded buffer of past samples and mix them into every batch.

    The buffer takes in an experience when it has ended, so a step replays only what is past.
    A `replay_batch` of the batch size rather than 0 matters where epochs are short: the last,
    smaller batch then has as many stored samples as the others, so that a round does not end with
    a step on a handful of samples, half of them new.

    Reference: Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr, Ranzato, "On Tiny Episodic
    Memories in Continual Learning", 2019, arXiv:1902.10486. We differ: the buffer is filled at the
    end of an experience, not during it.

    With the policy "herding" a class has the samples whose mean feature comes nearest to that of
    the class (`herding`), on features of length 1 at the final global parameters (Rebuffi et al.,
    "iCaRL", 2017, arXiv:1611.07725, algorithms 4 and 5). Classes get equal parts of the buffer, as
    far as they have samples. What a class that comes again had kept is chosen from anew together
    with what arrives, and stands in the mean for all that it was chosen from.

    Args:
        memory_kib: Size of the buffer on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        policy: What a full buffer keeps: "class-balanced", "reservoir" or "herding" (of a network
            that ends in a linear layer).
        replay_batch: Samples replayed per step; 0 replays as many as arrive.
        share: Part of the loss that replayed samples get, in [0, 1]; negative weighs every
            sample alike.
    """

    def __init__(
        self,
        *,
        memory_kib: float = 0.0,
        capacity: int = 0,
        policy: str = "class-balanced",
        replay_batch: int = 0,
        share: float = -1.0,
    ) -> None:
        if memory_kib < 0 or capacity < 0 or (memory_kib > 0 and capacity > 0):
            raise ValueError("give memory_kib or capacity, not both, and not below 0")
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}; allowed: {', '.join(POLICIES)}")
        if share > 1:
            raise ValueError(f"share is {share}; at most 1 is allowed")
        if replay_batch < 0:
            raise ValueError(f"replay_batch is {replay_batch}; at least 0 is allowed")
        self.memory_kib = memory_kib
        self.capacity = capacity
        self.policy = policy
        self.replay_batch = replay_batch
        self.share = share

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the buffer, and the count of samples seen by class."""
        capacity = self.capacity or 200
        if self.memory_kib > 0:
            capacity = max(1, int(self.memory_kib * 1024) // facts.sample_bytes)
        return {
            "buffer": SampleSpec(capacity),
            "seen": TensorSpec((facts.num_classes,), torch.int64),
        }

    def rehearsal(self) -> Rehearsal:
        """Declare that samples of the buffer join every batch."""
        return Rehearsal("buffer", self.replay_batch, self.share if self.share >= 0 else None)

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Take the experience that has ended into the buffer."""
        if self.policy == "herding":
            return _herded(model, params, data, memory)
        order = torch.randperm(len(data), generator=generator)
        arriving, arriving_labels = data.ids[order], data.labels[order]
        ids, seen = memory["buffer"], memory["seen"]
        if self.policy == "reservoir":
            buffer = reservoir(ids, int(seen.sum()), arriving, generator)
            counts = torch.bincount(arriving_labels, minlength=len(seen))
            return memory.replace(buffer=buffer, seen=seen + counts)
        labels = memory.store.labels(ids.clamp(min=0)) if (ids != EMPTY).any() else ids.long()
        buffer, seen = class_balanced(ids, labels, seen, arriving, arriving_labels, generator)
        return memory.replace(buffer=buffer, seen=seen)


def _herded(model: FlatModel, params: Tensor, data: Samples, memory: Memory) -> Memory:
    """Return the memory with the buffer filled by herding, class by class, in order of choice."""
    held = Samples(memory.store, memory["buffer"][memory["buffer"] != EMPTY])
    held_labels = held.labels if len(held) else torch.zeros(0, dtype=torch.int64)
    seen, num_classes = memory["seen"], len(memory["seen"])
    arriving = torch.bincount(data.labels, minlength=num_classes)
    room = quotas(
        torch.bincount(held_labels, minlength=num_classes) + arriving, len(memory["buffer"])
    )
    kept: list[Tensor] = []
    for label, count in enumerate(room.tolist()):
        old, new = held.ids[held_labels == label], data.ids[data.labels == label]
        if len(new):
            ids = torch.cat([old, new])
            own = _unit_features(model, params, Samples(memory.store, ids))
            # Of those before, only some are left to speak for all.
            before = int(seen[label]) if len(old) else 0
            mean = own[len(old) :].sum(0)
            if before:
                mean = mean + before * own[: len(old)].mean(0)
            old = ids[herding(own, count, mean=mean / (before + len(new)))]
        kept.append(old[:count])
    buffer = torch.full_like(memory["buffer"], EMPTY)
    ids = torch.cat(kept)
    buffer[: len(ids)] = ids
    return memory.replace(buffer=buffer, seen=seen + arriving)


@torch.no_grad()
def _unit_features(model: FlatModel, params: Tensor, data: Samples) -> Tensor:
    """Return features of length 1 [n, d]."""
    with evaluating(model.module):
        parts = [
            features(model, params, data.batch(slice(start, start + _ROWS)).x)
            for start in range(0, len(data), _ROWS)
        ]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)
