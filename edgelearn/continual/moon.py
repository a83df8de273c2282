"""MOON: features close to those of the global network, away from those of the device's last one."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelearn.continual.features import features, features_and_logits
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch


@final
class Moon(ClientStrategy):
    r"""Contrast a device's features of a sample with those of two other networks.

    With z the features of the network in training, z_glob those of the global one of this round and
    z_prev those of the device's own at the end of its last round, cross-entropy gets mu times

        -log( exp(cos(z, z_glob) / tau) / (exp(cos(z, z_glob) / tau) + exp(cos(z, z_prev) / tau)) ).

    A device that takes part for the first time has no z_prev; the term is then constant. It stores
    its last parameters (4 T bytes), holds the global ones beside them in training, and passes each
    batch through three networks. Nothing more is sent than by FedAvg. With batch norm, all three
    passes count in the statistics.

    Reference: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, arXiv:2103.16257,
    equation 3. We differ: features are what goes into the last linear layer; the paper puts a
    projection of two layers before it.

    Args:
        mu: Weight of the term, at least 0. The paper tries 0.1, 1, 5 and 10, and
            takes 5 for CIFAR-10, 1 for CIFAR-100 and Tiny-ImageNet.
        temperature: tau, above 0; default as in the paper.
    """

    def __init__(self, *, mu: float = 1.0, temperature: float = 0.5) -> None:
        if not (mu >= 0 and math.isfinite(mu)):
            raise ValueError(f"mu is {mu}; at least 0 is allowed, and finite")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; allowed: above 0, and finite")
        self.mu = mu
        self.temperature = temperature

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the device's last parameters, whether there are any, and the global ones."""
        size = model.layout.num_trained
        return {
            "previous": TensorSpec((size,)),
            "has_previous": TensorSpec((1,), torch.bool),
            "everyones": TensorSpec((size,), is_kept=False),
        }

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Note the global parameters of this round."""
        everyones = params[: model.layout.num_trained].clone()
        previous = torch.where(memory["has_previous"], memory["previous"], everyones)
        return params, memory.replace(everyones=everyones, previous=previous)

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return cross-entropy and the contrast, samples weighted alike in both."""
        own, logits = features_and_logits(model, params, batch.x)
        near, far = (
            F.cosine_similarity(own, features(model, memory[name], batch.x), dim=1)
            for name in ("everyones", "previous")
        )
        contrast = F.softplus((far - near) / self.temperature)
        term = contrast.mean() if batch.weight is None else (contrast * batch.weight).sum()
        return supervised_loss(logits, batch) + self.mu * term

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Remember where training has come to."""
        if passage.num_steps == 0:
            return passage.local, memory
        previous = passage.local[: passage.model.layout.num_trained].clone()
        return passage.local, memory.replace(
            previous=previous, has_previous=torch.ones(1, dtype=torch.bool)
        )
