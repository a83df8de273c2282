"""Nearest class mean: the prototype classifier, over a network that is frozen early."""

from __future__ import annotations

from typing import final

from torch import Generator, Tensor

from edgelearn.continual import prototypes
from edgelearn.continual.memory import Declaration, Memory
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stream import Experience


@final
class NCM(ClientStrategy):
    r"""Answer with the class whose mean feature is nearest; learn by updating means.

    |z - mu_c|^2 is least where mu_c^T z - |mu_c|^2 / 2 is largest, so the classifier is linear:
    `serve` writes W = mu, b = -|mu|^2 / 2 into the network's last layer. The body is trained as
    usual, by cross-entropy and without any measure against forgetting, in the first `frozen_after`
    experiences, and frozen then: devices take no steps and send zeros. Their class means are their
    own; a class that a device has never seen is never its answer.

    Samples of the experience under way count in the answer from the first; they are taken in for
    good when it ends. See `prototypes` for what the freeze means for statistics.

    References: Mensink, Verbeek, Perronnin, Csurka, "Distance-Based Image Classification:
    Generalizing to New Classes at Near-Zero Cost", PAMI 2013 (without its learned metric); Rebuffi,
    Kolesnikov, Sperl, Lampert, "iCaRL", CVPR 2017, arXiv:1611.07725, uses the same rule on features
    of unit length, which is not done here.

    Args:
        frozen_after: Experiences in which the body is trained; 0 for one that is trained already.
    """

    def __init__(self, *, frozen_after: int = 1) -> None:
        if frozen_after < 0:
            raise ValueError(f"frozen_after is {frozen_after}; at least 0 is allowed")
        self.frozen_after = frozen_after

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare class means and counts."""
        return prototypes.declare(model)

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
        """Take the experience into the means, if the body stays as it is."""
        memory = prototypes.finished(memory)
        if not prototypes.is_settled(memory, self.frozen_after):
            return memory
        seen = prototypes.observe(model, params, data)
        means, counts = prototypes.merged_means(memory, seen)
        return memory.replace(means=means.float(), counts=counts, latest=seen.mark)

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Write the means into the last layer, those of the current samples with them."""
        if not prototypes.is_settled(memory, self.frozen_after):
            return params
        means, counts = memory["means"].double(), memory["counts"]
        seen = prototypes.observe(model, params, data)
        if not prototypes.is_known(seen, memory):
            means, counts = prototypes.merged_means(memory, seen)
        if not (counts > 0).any():
            return params
        bias = -0.5 * means.square().sum(1)
        return prototypes.with_classifier(model, params, means, bias, means, counts)
