"""SCAFFOLD: control variates take the drift of a device's own data out of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel


@final
class Scaffold(ClientStrategy):
    r"""Correct each step by where a device's own data pull it, and where everyone's do.

    A device i remembers c_i, an estimate of its own gradient; the server keeps their mean c, which
    travels beside the parameters. With x the global and y_i the local parameters (equation 3)

        y_i <- y_i - lr (g_i(y_i) - c_i + c),

    and after K steps, by option II of equation 4,

        c_i+ = c_i - c + (x - y_i) / (K lr),       c <- c + (|S| / N) mean_{i in S} (c_i+ - c_i),

    S being the cohort and N the fleet. A device sends (|S| / N) (c_i+ - c_i) as its change of c,
    and the server's average does the rest. The server's step size is 1.

    **What is sent**: beside the network, c: T more numbers in both directions, about twice the
    bytes of FedAvg. c_i (4 T bytes) never leaves. A device whose reply is late or refused has
    renewed its c_i all the same, since it can't know.

    Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled
    Averaging for Federated Learning", ICML 2020, arXiv:1910.06378, algorithm 1. We differ: FedAvg
    weighs devices by their samples, so the objective is that of all samples alike. c is the mean of
    c_i with the same weights if the whole fleet takes part; with a smaller cohort it is so exactly
    where devices have equally many samples, else on average.

    With momentum or Adam (x - y_i) / (K lr) is no mean gradient, so these are refused.
    """

    needs_plain_sgd = True

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare c_i, and of the round x and c - c_i."""
        size = model.layout.num_trained
        return {
            "own": TensorSpec((size,)),
            "begin": TensorSpec((size,), is_kept=False),
            "correction": TensorSpec((size,), is_kept=False),
        }

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:  # noqa: ARG002
        """Declare c."""
        return {"control": TensorSpec((model.layout.num_trained,))}

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Note where this round begins, and its correction."""
        control = model.layout.shared(params)["control"]
        begin = params[: model.layout.num_trained].clone()
        return params, memory.replace(begin=begin, correction=control - memory["own"])

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        """Correct a step's gradient."""
        return gradients + memory["correction"]

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Renew c_i, and send what it means for c."""
        if passage.num_steps == 0:
            return passage.local, memory
        layout = passage.model.layout
        way = memory["begin"] - passage.local[: layout.num_trained]
        own = way / (passage.num_steps * passage.lr) - memory["correction"]
        local = passage.local.clone()
        change = (own - memory["own"]) * (passage.cohort / passage.num_devices)
        layout.shared(local)["control"].add_(change)
        return local, memory.replace(own=own)
