"""FedCurv: elastic weight consolidation between devices instead of between experiences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from edgelearn.continual.fisher import empirical_fisher
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, Pull
from edgelearn.params import FlatModel


@final
class FedCurv(ClientStrategy):
    r"""Penalize change of parameters that other devices need, by their Fisher information.

    A device k of the cohort S trains on

        L_k(theta) + lambda sum_{j in S, j != k} sum_i F_ji (theta_i - theta_ji)^2

    with the diagonal Fisher F_j and parameters theta_j that device j came to in the round before.
    A sum of quadratics is a quadratic: with F = sum_j F_j and A = sum_j F_j theta_j it is, up to a
    constant, lambda F (theta - A / F)^2. So F and A are all that is sent, and the own part of both
    is subtracted on the device. It is taken as the implicit step of `Pull`, which can't diverge.

    The server's average weighs a device by its samples n_k, the sum above weighs all alike. A
    device therefore sends |S| F_k / n_k and 1 / n_k ("mass"), and the quotient of their averages is
    sum_j F_j, whatever the n_k are. Where devices fail to reply, the others stand in for them. A
    count of rounds tells a device whether its own part is in what it gets; it can't know of a reply
    of its own that was late or refused.

    **What is sent**: beside the network, 2 T + 2 numbers in both directions, about three times the
    bytes of FedAvg. A device keeps its own part, 8 T + 4 bytes. The Fisher of few samples tells
    more of them than an update of parameters does.

    Reference: Shoham, Avidor, Keren, Israel, Benditkis, Mor-Yosef, Zeitak, "Overcoming Forgetting
    in Federated Learning on Non-IID Data", 2019, arXiv:1910.07796. We differ: F is the empirical
    Fisher from per-example gradients (`empirical_fisher`), about a batch size larger than the
    square of a batch's mean gradient, so a lambda of other code has to be divided accordingly; and
    the step is implicit.

    Args:
        strength: lambda, at least 0.
        max_fisher_samples: Samples for the Fisher; 0 uses all that the device has.
    """

    def __init__(self, *, strength: float = 1.0, max_fisher_samples: int = 0) -> None:
        if not (strength >= 0 and math.isfinite(strength)):
            raise ValueError(f"strength is {strength}; at least 0 is allowed, and finite")
        if max_fisher_samples < 0:
            raise ValueError(f"max_fisher_samples is {max_fisher_samples}; at least 0 is allowed")
        self.strength = strength
        self.max_fisher_samples = max_fisher_samples

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the own part and its round, and the penalty of a round."""
        vector = (model.layout.num_trained,)
        return {
            "fisher": TensorSpec(vector),
            "weighted": TensorSpec(vector),
            "round": TensorSpec((1,)),
            "curvature": TensorSpec(vector, is_kept=False),
            "anchor": TensorSpec(vector, is_kept=False),
        }

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:  # noqa: ARG002
        """Declare the averages of F and F theta, of 1 / n, and the count of rounds."""
        vector = (model.layout.num_trained,)
        return {
            "fisher": TensorSpec(vector),
            "weighted": TensorSpec(vector),
            "mass": TensorSpec((1,)),
            "round": TensorSpec((1,)),
        }

    def pull(self) -> Pull:
        """Declare the penalty; lambda F has the curvature 2 lambda F."""
        return Pull("curvature", "anchor", 2 * self.strength)

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Make the others' quadratic out of everyone's."""
        shared = model.layout.shared(params)
        if float(shared["mass"]) <= 0:  # nobody has sent anything yet
            return params, memory
        is_own_in = torch.isclose(shared["round"], memory["round"], rtol=0, atol=0.5).float()
        everyone, weighted = (shared[name] / shared["mass"] for name in ("fisher", "weighted"))
        others = everyone - is_own_in * memory["fisher"]
        # A thousandth of a sum from which the rest was taken away is mostly rounding.
        is_real = others > 1e-3 * everyone
        curvature = torch.where(is_real, others, 0.0)
        center = (weighted - is_own_in * memory["weighted"]) / torch.where(is_real, others, 1.0)
        anchor = torch.where(is_real, center, 0.0)
        return params, memory.replace(curvature=curvature, anchor=anchor)

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Measure the own Fisher where training has come to, and send it."""
        if passage.num_steps == 0:
            return passage.local, memory
        model, count = passage.model, len(passage.samples)
        params = passage.local[: model.layout.num_trained]
        fisher = empirical_fisher(
            model, params, passage.samples, max_samples=self.max_fisher_samples
        )
        weighted = fisher * params
        local = passage.local.clone()
        shared = model.layout.shared(local)
        now = model.layout.shared(passage.given)["round"] + 1
        shared["fisher"].copy_(fisher * (passage.cohort / count))
        shared["weighted"].copy_(weighted * (passage.cohort / count))
        shared["mass"].fill_(1 / count)
        shared["round"].copy_(now)
        return local, memory.replace(fisher=fisher, weighted=weighted, round=now)
