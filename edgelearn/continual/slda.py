"""Streaming linear discriminant analysis over a network that is frozen early."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual import prototypes
from edgelearn.continual.features import last_linear
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.prototypes import Observed
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stream import Experience

COVARIANCES = ("streaming", "pooled")


@final
class SLDA(ClientStrategy):
    r"""Deep streaming LDA: class means and one shared covariance, updated sample by sample.

    With t samples seen, n of them of class y, a sample z of class y changes, in this order,

        Sigma <- (t Sigma + t / (t + 1) (z - mu_y)(z - mu_y)^T) / (t + 1),
        mu_y  <- mu_y + (z - mu_y) / (n + 1).

    The answer is that of Gaussian classes with equal priors: with the precision matrix
    Lambda = ((1 - eps) Sigma + eps I)^-1 it is linear, W = Lambda mu and b = -mu^T W / 2, and
    `serve` writes it into the network's last layer. There is nothing to forget: with "pooled",
    which has the factor n / (n + 1) in place of t / (t + 1), Sigma is the within-class covariance
    of all samples seen, exactly and in any order. The paper's factor also counts the first sample
    of each class, whose mean is still zero.

    The body is trained as usual, by cross-entropy, in the first `frozen_after` experiences, and
    frozen then: devices take no steps and send zeros. Statistics are a device's own; a class that
    it has never seen is never its answer. Samples of the experience under way count in the answer
    from the first; they are taken in for good when it ends. See `prototypes` for what the freeze
    means for statistics.

    Reference: Hayes, Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant
    Analysis", CVPR Workshops 2020, arXiv:1909.01520. We differ: the covariance begins with zeros,
    not with that of a base set (equal for a body that is trained on the device).

    Args:
        frozen_after: Experiences in which the body is trained; 0 for one that is trained already.
        shrinkage: eps, above 0, to 1 (then it is `ncm`).
        covariance: "streaming" as in the paper, or "pooled".
    """

    def __init__(
        self,
        *,
        frozen_after: int = 1,
        shrinkage: float = 1e-4,
        covariance: str = "streaming",
    ) -> None:
        if frozen_after < 0:
            raise ValueError(f"frozen_after is {frozen_after}; at least 0 is allowed")
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage is {shrinkage}; allowed: above 0, to 1")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance is {covariance!r}; allowed: {', '.join(COVARIANCES)}")
        self.frozen_after = frozen_after
        self.shrinkage = shrinkage
        self.covariance = covariance

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare class means and counts, and the covariance."""
        size = last_linear(model).num_features
        return {**prototypes.declare(model), "covariance": TensorSpec((size, size))}

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,  # noqa: ARG002
    ) -> Memory:
        """Count the experience."""
        return prototypes.begun(memory)

    def is_frozen(self, memory: Memory) -> bool:
        """Whether the body was trained for long enough."""
        return not prototypes.is_trained(memory, self.frozen_after)

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,  # noqa: ARG002
    ) -> Memory:
        """Take the experience in, sample by sample, if the body stays as it is."""
        memory = prototypes.finished(memory)
        if not prototypes.is_settled(memory, self.frozen_after):
            return memory
        seen = prototypes.observe(model, params, data)
        means, counts, covariance = self._merged(memory, seen)
        return memory.replace(
            means=means.float(), counts=counts, covariance=covariance.float(), latest=seen.mark
        )

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Write the classifier into the last layer, the current samples taken in."""
        if not prototypes.is_settled(memory, self.frozen_after):
            return params
        seen = prototypes.observe(model, params, data)
        if prototypes.is_known(seen, memory):
            seen = Observed(seen.features[:0], seen.labels[:0])
        means, counts, covariance = self._merged(memory, seen)
        if not (counts > 0).any():
            return params
        weight = means @ _precision(covariance, self.shrinkage)
        bias = -0.5 * (means * weight).sum(1)
        return prototypes.with_classifier(model, params, weight, bias, means, counts)

    def _merged(self, memory: Memory, seen: Observed) -> tuple[Tensor, Tensor, Tensor]:
        """Return means [C, d], counts [C] and covariance [d, d] with more samples, in float64."""
        means, covariance = memory["means"].double(), memory["covariance"].double()
        counts = memory["counts"].clone()
        total = int(counts.sum())
        for z, y in zip(seen.features, seen.labels.tolist(), strict=True):
            own = int(counts[y])
            before = own if self.covariance == "pooled" else total
            apart = z - means[y]
            covariance.mul_(total).addr_(apart, apart, alpha=before / (before + 1))
            covariance.div_(total + 1)
            means[y] += apart / (own + 1)
            counts[y], total = own + 1, total + 1
        return means, counts, covariance


def _precision(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return ((1 - eps) Sigma + eps I)^-1.

    By eigenvalues, so that rounding of a stored covariance can't make one of them negative.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage
    inverse: Tensor = (vectors / values) @ vectors.T
    return inverse
