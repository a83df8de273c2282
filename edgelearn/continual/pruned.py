"""Pruned: the whole fleet trains a network whose smallest weights are zero, and stay so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.compress.prune import SCOPES, cubic_sparsity, largest, prunable, two_of_four
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel, Layout
from edgelearn.scenario.samples import Samples

PATTERNS = ("unstructured", "2:4")
# What is this small beside the largest weight counts as zero. A mean that a server takes of updates
# to exactly 0 may miss it by rounding.
_ZERO = 1e-6


@final
class Pruned(ClientStrategy):
    r"""Magnitude pruning on a schedule, with the same mask on all devices.

    The mask is a pure function of what the server sends: of the global parameters, and of the count
    of rounds, one number that travels beside the network and that each device of a cohort raises by
    1. So devices agree on it and nobody sends it. In round t it prunes the share

        s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta t))^3,   t = t_0, ..., t_0 + n Delta t,

    of smallest magnitude (Zhu and Gupta). What is zero is the smallest there is, so the
    mask only ever shrinks: from t_0 on, weights that are zero are never trained again, those that
    were initialized so included. Biases and norms are left alone.

    Pruned weights are 0 when a round begins, after each step (whatever momentum, weight decay or
    another strategy's penalty makes of them), in what is sent, and in what is served, whose int8
    model has the code 0 there. The update is -global where a weight is first pruned, and 0 from
    then on. In a faithful federation the global weights are then exactly 0. In a fused one the mean
    of equal updates may leave dust of rounding in the server's own copy, far below a millionth of
    the largest weight, which no device trains from or serves. All this is with updates that
    arrive as they were sent: where something between loses part of them, the server keeps small
    weights instead of zeros. Devices then still agree, but which weights are the smallest may
    change.

    It joins other strategies that go step by step (`pruned+ewc`, `pruned+replay`). The count needs
    a server that averages or chooses; those with steps of their own are refused. It is no way to be
    quicker: processors gain nothing from zeros in a dense matrix. It is one to be smaller
    (`compress.sparse_weights`).

    References: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017, arXiv:1710.01878; Han, Pool, Tran, Dally, "Learning both Weights and
    Connections for Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626. We differ: a step of
    the schedule is a round of the federation, and all weights compete by default, where Zhu and
    Gupta give each layer the same sparsity ("layer").

    Args:
        sparsity: s_f, part of the weights that is zero in the end, in [0, 1).
        initial: s_i, that of the first pruning, from 0 to `sparsity`.
        begin: t_0, round of the first pruning, at least 1.
        num_prunings: n, prunings after the first, at least 0; with 0 the first is the last.
        every: Delta t, rounds from one pruning to the next, at least 1.
        scope: "global" or "layer": what weights compete with.
        pattern: "unstructured", or "2:4": of every 4 neighbours that an output unit sees, the 2 of
            smallest magnitude are zero, in one shot; `sparsity` has to be 0.5, `num_prunings` 0.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        initial: float = 0.0,
        begin: int = 1,
        num_prunings: int = 4,
        every: int = 1,
        scope: str = "global",
        pattern: str = "unstructured",
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is {sparsity}; allowed: 0 to less than 1")
        if not 0 <= initial <= sparsity:
            raise ValueError(f"initial is {initial}; allowed: 0 to the sparsity, {sparsity}")
        if begin < 1:
            raise ValueError(f"begin is {begin}; at least 1 is allowed")
        if num_prunings < 0:
            raise ValueError(f"num_prunings is {num_prunings}; at least 0 is allowed")
        if every < 1:
            raise ValueError(f"every is {every}; at least 1 is allowed")
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}; allowed: {', '.join(SCOPES)}")
        if pattern not in PATTERNS:
            raise ValueError(f"pattern is {pattern!r}; allowed: {', '.join(PATTERNS)}")
        if pattern == "2:4" and (sparsity != 0.5 or num_prunings):
            raise ValueError(
                f"the pattern 2:4 has a sparsity of 0.5 in one shot; got sparsity {sparsity} and "
                f"num_prunings {num_prunings}, allowed: 0.5 and 0"
            )
        self.sparsity = sparsity
        self.initial = initial
        self.begin = begin
        self.num_prunings = num_prunings
        self.every = every
        self.scope = scope
        self.pattern = pattern

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the mask of a round, a byte for each trained parameter."""
        return {"stays": TensorSpec((model.layout.num_trained,), torch.bool, is_kept=False)}

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:  # noqa: ARG002
        """Declare the count of rounds."""
        return {"rounds": TensorSpec((1,))}

    def mask(self, layout: Layout, params: Tensor, *, server_round: int) -> Tensor:
        """Return which trained parameters stay [T], bool.

        Args:
            layout: Of the parameters.
            params: Global parameters [P], or their trained part [T].
            server_round: Round, from 1.
        """
        trained = params[: layout.num_trained]
        if server_round < self.begin:
            return torch.ones(layout.num_trained, dtype=torch.bool)
        if self.pattern == "2:4":
            stays = two_of_four(trained, layout)
        else:
            share = cubic_sparsity(
                server_round,
                begin=self.begin,
                num_steps=self.num_prunings,
                every=self.every,
                initial=self.initial,
                final=self.sparsity,
            )
            stays = largest(trained, layout, share, scope=self.scope)
        weights = torch.where(prunable(layout), trained.abs(), torch.zeros(()))
        is_zero = prunable(layout) & (weights <= _ZERO * weights.amax())
        return stays & ~is_zero

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Begin a round on what its mask leaves."""
        stays = self.mask(model.layout, params, server_round=_rounds(model, params) + 1)
        return _masked(params, stays), memory.replace(stays=stays)

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:  # noqa: ARG002
        """Put pruned weights back to 0."""
        return torch.where(memory["stays"], params, torch.zeros(()))

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Send what the mask leaves, and count the round."""
        local = _masked(passage.local, memory["stays"])
        layout = passage.model.layout
        layout.shared(local)["rounds"].copy_(layout.shared(passage.given)["rounds"] + 1)
        return local, memory

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,  # noqa: ARG002
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Return the global parameters as the mask of the round that they come from leaves them."""
        return _masked(params, self.mask(model.layout, params, server_round=_rounds(model, params)))


def _rounds(model: FlatModel, params: Tensor) -> int:
    """Return how many rounds lie behind global parameters [P]."""
    return round(float(model.layout.shared(params)["rounds"]))


def _masked(params: Tensor, stays: Tensor) -> Tensor:
    """Return parameters [P] with zeros where the trained ones do not stay [T]."""
    masked = params.clone()
    masked[: len(stays)][~stays] = 0
    return masked
