"""Re-Fed: a device keeps the samples that matter most to a model between its own and the global."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.layers import sample_gradients
from edgelearn.continual.memory import Declaration, Memory, SampleSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Samples

_ROWS = 64  # samples whose gradients are held at once


@final
class ReFed(ClientStrategy):
    r"""Replay, with a cache filled by importance instead of chance.

    When an experience has ended, the device updates a *personalized informative model* v on all
    that it has, cached samples and the experience's, S steps from the global parameters w:

        v_{p+1} = v_p - lr (mean_i grad l(v_p; x_i, y_i) + q (v_p - w)),  q = (1 - l) / (2 l)

    where l (`locality`) near 0 keeps v at the global model and near 1 lets it go local. A sample's
    importance is its squared gradient norm along that way, early steps counting more,

        I(x_i) = sum_{p=1}^{S} (1 / p) |grad l(v_p; x_i, y_i)|^2,

    and the cache takes the samples of highest importance, old ones competing with new ones. They
    then join every batch, as in `replay`. Nothing but the cache is remembered: it costs as many
    bytes as the buffer of `replay`, and what is sent is the update alone. Each step takes a
    gradient of every sample at hand, so S = 10 costs about as much as ten epochs of training, once
    in an experience.

    Reference: Li, Li, Wang, Li, Zhong, Zhang, "Towards Efficient Replay in Federated Incremental
    Learning", CVPR 2024, arXiv:2403.05890. We differ: v begins at the global model, so that it need
    not be stored; the mean of the gradients is taken, not their sum; the pull towards w is taken
    implicitly, v <- (v' + lr q w) / (1 + lr q), which can't diverge. The most important samples
    overall tend to be hard ones of few classes; `is_balanced` shares the cache among classes, which
    the paper does not.

    Args:
        memory_kib: Size of the cache on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        locality: l, above 0 and at most 1.
        steps: S, at least 1.
        lr: Step size of v, above 0.
        is_balanced: Whether classes share the cache alike, each keeping its most important samples.
        replay_batch: Samples replayed per step; 0 replays as many as arrive.
    """

    def __init__(
        self,
        *,
        memory_kib: float = 0.0,
        capacity: int = 0,
        locality: float = 0.5,
        steps: int = 10,
        lr: float = 0.1,
        is_balanced: bool = False,
        replay_batch: int = 0,
    ) -> None:
        if memory_kib < 0 or capacity < 0 or (memory_kib > 0 and capacity > 0):
            raise ValueError(
                f"memory_kib is {memory_kib} and capacity {capacity}; give one of the two, not "
                "below 0"
            )
        if not 0 < locality <= 1:
            raise ValueError(f"locality is {locality}; allowed: above 0, at most 1")
        if steps < 1:
            raise ValueError(f"steps is {steps}; at least 1 is allowed")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; allowed: above 0")
        if replay_batch < 0:
            raise ValueError(f"replay_batch is {replay_batch}; at least 0 is allowed")
        self.memory_kib = memory_kib
        self.capacity = capacity
        self.locality = locality
        self.steps = steps
        self.lr = lr
        self.is_balanced = is_balanced
        self.replay_batch = replay_batch

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the cache."""
        capacity = self.capacity or 200
        if self.memory_kib > 0:
            capacity = max(1, int(self.memory_kib * 1024) // facts.sample_bytes)
        return {"cache": SampleSpec(capacity)}

    def rehearsal(self) -> Rehearsal:
        """Declare that cached samples join every batch."""
        return Rehearsal("cache", self.replay_batch)

    def importance(self, model: FlatModel, params: Tensor, data: Samples) -> Tensor:
        """Return I of each sample [n].

        Args:
            model: The network, in eval mode.
            params: Global parameters [T].
            data: All that the device has, at least one sample.
        """
        pull = self.lr * (1 - self.locality) / (2 * self.locality)
        informative, found = params.clone(), torch.zeros(len(data))
        for step in range(1, self.steps + 1):
            total = torch.zeros_like(params)
            for start in range(0, len(data), _ROWS):
                rows = slice(start, min(start + _ROWS, len(data)))
                norms, gradients = sample_gradients(model, informative, data.batch(rows))
                found[rows] += norms / step
                total += gradients
            stepped = informative - (self.lr / len(data)) * total
            informative = (stepped + pull * params) / (1 + pull)
        return found

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,  # noqa: ARG002
    ) -> Memory:
        """Fill the cache anew from what is in it and the experience that has ended."""
        cache = memory["cache"]
        ids = torch.cat([cache[cache != EMPTY], data.ids])
        if len(ids) == 0:
            return memory
        samples = Samples(memory.store, ids)
        found = self.importance(model, params, samples)
        labels = samples.labels if self.is_balanced else torch.zeros(len(ids), dtype=torch.int64)
        kept = ids[most_important(found, labels, len(cache))]
        filled = torch.full_like(cache, EMPTY)
        filled[: len(kept)] = kept
        return memory.replace(cache=filled)


def most_important(importance: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the places of the samples to keep, the most important first.

    Groups take turns, each with its best sample that is left, until `count` are taken.

    Args:
        importance: Of each sample [n].
        groups: Group of each sample [n], int64.
        count: Samples to keep at most.
    """
    order = torch.argsort(importance, descending=True, stable=True)
    turn = torch.zeros(len(order), dtype=torch.int64)
    for group in set(groups.tolist()):
        mine = groups[order] == group
        turn[mine] = torch.arange(int(mine.sum()))
    return order[torch.argsort(turn, stable=True)[:count]]
