"""Per-FedAvg: FedAvg of the parameters from which one step personalizes best."""

from __future__ import annotations

from typing import final

from torch import Generator, Tensor

from edgelearn.continual.adapt import adapted, batch_loss, check_descent, halves, meta_gradient
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples


@final
class PerFedAvg(ClientStrategy):
    r"""Minimize mean_i f_i(w - alpha grad f_i(w)), the devices' losses after one step of each.

    A local step is w <- w - beta grad f_i(w - alpha grad f_i(w; D); D'), with two halves of a batch
    as D and D'. That is the first-order variant (Per-FedAvg (FO)): the exact gradient has a factor
    I - alpha H in front, which `maml` with `is_second_order` keeps. beta is the scenario's learning
    rate, and FedAvg the server strategy. A device answers after `adapt_steps` of descent on all of
    its current samples, one by default as in the paper.

    Reference: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical
    Guarantees: A Model-Agnostic Meta-Learning Approach", NeurIPS 2020, arXiv:2002.07948. We differ:
    D and D' are halves of one batch, not drawn anew.

    Args:
        alpha: Size of the inner step, above 0.
        adapt_steps: Steps before answering; 0 answers with the global parameters.
        adapt_lr: Their size; 0 is `alpha`.
    """

    def __init__(self, *, alpha: float = 0.01, adapt_steps: int = 1, adapt_lr: float = 0.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be above 0")
        check_descent("adapt", adapt_steps, adapt_lr or alpha, fewest=0)
        self.alpha = alpha
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr or alpha

    def gradient(
        self,
        model: FlatModel,
        params: Tensor,
        batch: Batch,
        memory: Memory,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return f_i(w - alpha grad f_i(w; D); D') and its gradient where it is taken."""
        first, second = halves(batch)
        losses = batch_loss(model, first), batch_loss(model, second)
        return meta_gradient(*losses, params, steps=1, lr=self.alpha)

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Personalize the parameters on the device's current samples."""
        return adapted(model, params, data, steps=self.adapt_steps, lr=self.adapt_lr)
