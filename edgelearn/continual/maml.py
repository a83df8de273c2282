"""MAML: learn parameters that are good after a few steps, not before them."""

from __future__ import annotations

from typing import final

from torch import Generator, Tensor

from edgelearn.continual.adapt import adapted, batch_loss, check_descent, halves, meta_gradient
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples


@final
class MAML(ClientStrategy):
    r"""Minimize the loss that is left after a few steps of adaptation.

    Each step splits its batch in two. From theta, `inner_steps` of gradient descent on the support
    lead to theta'; the optimizer then follows the gradient of L_query(theta') by theta. For one
    inner step that is (I - alpha H) g, g = dL_query/dtheta at theta' and H the Hessian of L_support
    (Finn et al., equation 1). First order leaves the Hessian out and takes g (section 5.2), and
    saves the way back through the inner steps. Either way a device answers with what `adapt_steps`
    of the same descent on all of its current samples make of the global parameters.

    Each device is a task, or one for each experience that it meets. Local steps of all devices are
    averaged, as in Per-FedAvg, which is this with one inner step; with a single step per round
    (`batch_size` as large as the device's data) it is MAML with a batch of tasks.

    Reference: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", ICML 2017, arXiv:1703.03400, algorithm 2; defaults of its regression, section 5.1.
    We differ: first order is the default, and the optimizer is the scenario's, by default SGD.

    Args:
        inner_steps: Steps on the support, at least 1.
        inner_lr: alpha, above 0.
        is_second_order: Whether the gradient passes through the inner steps.
        adapt_steps: Steps before answering; 0 answers with the global parameters.
        adapt_lr: Their size; 0 is `inner_lr`.
    """

    def __init__(
        self,
        *,
        inner_steps: int = 1,
        inner_lr: float = 0.01,
        is_second_order: bool = False,
        adapt_steps: int = 1,
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
        """Return the loss of one half of the batch after adapting to the other."""
        support, query = halves(batch)
        return meta_gradient(
            batch_loss(model, support),
            batch_loss(model, query),
            params,
            steps=self.inner_steps,
            lr=self.inner_lr,
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
        """Adapt to the device's current samples."""
        return adapted(model, params, data, steps=self.adapt_steps, lr=self.adapt_lr)
