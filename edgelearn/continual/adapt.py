"""Adaptation: a few steps of gradient descent on a device's own samples, and learning through it.

What Reptile, MAML, ANIL and Per-FedAvg share. Losses are plain functions of a parameter vector, so
classification on devices and regression in a reproduced experiment take the same steps. A stack of
vectors [..., T] descends row by row if the loss is the sum of the rows' own losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgelearn.continual.strategy import supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples

Loss = Callable[[Tensor], Tensor]
WHOLE = slice(None)


def descend(
    loss: Loss,
    params: Tensor,
    *,
    steps: int,
    lr: float,
    part: slice = WHOLE,
    keeps_graph: bool = False,
) -> Tensor:
    """Return theta_k of theta_{j+1} = theta_j - lr dL(theta_j)/dtheta, from theta_0 = `params`.

    Args:
        loss: L, a scalar of parameters.
        params: [..., T]; not changed.
        steps: k; 0 returns `params`.
        lr: Step size.
        part: The places that move, such as the head's; nothing is passed back below them.
        keeps_graph: Whether the result can be differentiated by `params`, through all steps.
    """
    if not keeps_graph:
        params = params.detach()
    with torch.enable_grad():
        for _ in range(steps):
            own = params[..., part]
            if not keeps_graph:
                own = own.detach().requires_grad_()
            value = loss(_replaced(params, part, own))
            (gradient,) = torch.autograd.grad(value, own, create_graph=keeps_graph)
            own = own - lr * gradient
            params = _replaced(params, part, own if keeps_graph else own.detach())
    return params


def meta_gradient(
    support: Loss,
    query: Loss,
    params: Tensor,
    *,
    steps: int,
    lr: float,
    part: slice = WHOLE,
    is_second_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return L_query(theta_k) and its gradient, theta_k = `descend(support, params, ...)`.

    By the chain rule the gradient is J^T g, with g = dL_query/dtheta at theta_k and J the
    derivative of theta_k by theta_0, a product of factors I - lr H. First order takes J = I: no
    Hessian, and no graph of the inner steps has to be kept.

    Args:
        support: The loss that is adapted to.
        query: The loss that is to be low then.
        params: theta_0 [..., T]; not changed.
        steps: k.
        lr: Step size of the inner steps.
        part: The places that adapt; the gradient is by all.
        is_second_order: Whether J is taken into account.

    Returns:
        Scalar and [..., T], without a graph.
    """
    with torch.enable_grad():
        leaf = params.detach().requires_grad_()
        adapted = descend(support, leaf, steps=steps, lr=lr, part=part, keeps_graph=is_second_order)
        if not is_second_order:
            leaf = adapted = adapted.requires_grad_()
        value = query(adapted)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def batch_loss(model: FlatModel, batch: Batch) -> Loss:
    """Return a batch's cross-entropy as a function of parameters."""
    return lambda params: supervised_loss(model(params, batch.x), batch)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch into support and query: every other sample, so that both parts of it take part.

    Batches are in random order, and replayed samples stand behind the present ones. Weights are
    scaled to sum to 1 in each half, if they are not all zeros. A single sample is both.
    """
    if len(batch) < 2:
        return batch, batch
    return _rows(batch, slice(0, None, 2)), _rows(batch, slice(1, None, 2))


def adapted(
    model: FlatModel,
    params: Tensor,
    data: Samples,
    *,
    steps: int,
    lr: float,
    part: slice = WHOLE,
) -> Tensor:
    """Return parameters [P] after steps on all of a device's samples, for `ClientStrategy.serve`.

    Args:
        model: The network.
        params: Global parameters [P]; not changed.
        data: The device's samples; without any nothing is adapted.
        steps: Steps of gradient descent.
        lr: Step size.
        part: The places that adapt.
    """
    if steps == 0 or len(data) == 0:
        return params
    count = model.layout.num_trained
    loss = batch_loss(model, data.batch())
    own = descend(loss, params[:count], steps=steps, lr=lr, part=part)
    return torch.cat([own, params[count:]])


def check_descent(name: str, steps: int, lr: float, *, fewest: int) -> None:
    """Check arguments `{name}_steps` and `{name}_lr`.

    Raises:
        ValueError: If there are too few steps, or their size is not positive.
    """
    if steps < fewest:
        raise ValueError(f"{name}_steps is {steps}; at least {fewest} is allowed")
    if not lr > 0:
        raise ValueError(f"{name}_lr is {lr}; it must be above 0")


def _replaced(params: Tensor, part: slice, own: Tensor) -> Tensor:
    """Return `params` with `own` at the places of `part`."""
    start, stop, _ = part.indices(params.shape[-1])
    if (start, stop) == (0, params.shape[-1]):
        return own
    return torch.cat([params[..., :start], own, params[..., stop:]], dim=-1)


def _rows(batch: Batch, rows: slice) -> Batch:
    weight, mask = batch.weight, batch.mask
    if weight is not None:
        weight = weight[rows] / weight[rows].sum().clamp(min=torch.finfo(weight.dtype).tiny)
    return Batch(batch.x[rows], batch.y[rows], weight, None if mask is None else mask[rows])
