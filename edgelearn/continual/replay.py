"""Experience replay: each step also sees samples of the past."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.buffers import class_balanced, reservoir
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Samples

POLICIES = ("class-balanced", "reservoir")


@final
class Replay(ClientStrategy):
    """Keep a bounded buffer of past samples and mix them into every batch.

    The buffer takes in an experience when it has ended, so a step replays only what is past.
    A `replay_batch` of the batch size rather than 0 matters where epochs are short: the last,
    smaller batch then has as many stored samples as the others, so that a round does not end with
    a step on a handful of samples, half of them new.

    Reference: Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr, Ranzato, "On Tiny Episodic
    Memories in Continual Learning", 2019, arXiv:1902.10486, algorithm 1. We differ: the buffer is
    filled at the end of an experience, not during it.

    Args:
        memory_kib: Size of the buffer on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        policy: What a full buffer keeps: "class-balanced" or "reservoir".
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
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Take the experience that has ended into the buffer."""
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
