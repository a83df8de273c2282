"""ANIL: MAML whose inner steps adapt the head alone."""

from __future__ import annotations

from typing import final

from torch import Generator, Tensor

from edgelearn.continual.adapt import adapted, batch_loss, check_descent, halves, meta_gradient
from edgelearn.continual.features import last_linear
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples


@final
class ANIL(ClientStrategy):
    r"""Almost no inner loop: features for all devices, and a head that adapts to each.

    As `maml`, but the inner steps, in training and before answering, move the network's last linear
    layer only; the outer step moves everything. Raghu et al. found that MAML hardly changes the
    features of a task, so that little is lost, and an inner step costs no backward pass through
    the body. Its second order concerns the head alone and is cheap too; first order is the default
    here as in `maml`.

    Reference: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards
    Understanding the Effectiveness of MAML", ICLR 2020, arXiv:1909.09157, section 4; the number and
    size of inner steps are those of MAML on MiniImageNet.

    Args:
        inner_steps: Steps of the head on the support, at least 1.
        inner_lr: Their size, above 0.
        is_second_order: Whether the gradient passes through the inner steps.
        adapt_steps: Steps of the head before answering; 0 answers with the global parameters.
        adapt_lr: Their size; 0 is `inner_lr`.
    """

    def __init__(
        self,
        *,
        inner_steps: int = 5,
        inner_lr: float = 0.01,
        is_second_order: bool = False,
        adapt_steps: int = 5,
        adapt_lr: float = 0.0,
    ) -> None:
        check_descent("inner", inner_steps, inner_lr, fewest=1)
        check_descent("adapt", adapt_steps, adapt_lr or inner_lr, fewest=0)
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.is_second_order = is_second_order
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr or inner_lr

    def gradient(
        self,
        model: FlatModel,
        params: Tensor,
        batch: Batch,
        memory: Memory,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of one half of the batch after adapting the head to the other."""
        support, query = halves(batch)
        return meta_gradient(
            batch_loss(model, support),
            batch_loss(model, query),
            params,
            steps=self.inner_steps,
            lr=self.inner_lr,
            part=_head(model),
            is_second_order=self.is_second_order,
        )

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Adapt the head to the device's current samples."""
        part = _head(model)
        return adapted(model, params, data, steps=self.adapt_steps, lr=self.adapt_lr, part=part)


def _head(model: FlatModel) -> slice:
    """Return the place of the head; its bias lies behind its weight."""
    head = last_linear(model)
    return slice(head.weight.start, (head.bias or head.weight).stop)
