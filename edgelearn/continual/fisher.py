"""Fisher information of a model's parameters on a device's samples."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelearn.continual.strategy import supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.stack import LinearStack, Stack, cross_entropy, stack_of

_ROWS = 1024


def empirical_fisher(
    model: FlatModel, params: Tensor, data: Samples, *, max_samples: int = 0, chunk: int = 32
) -> Tensor:
    """Diagonal of the **empirical** Fisher: mean of squared per-example gradients.

    F_i = 1/N sum_n (d log p(y_n | x_n, params) / d params_i)^2, with the given labels y_n. The
    square is taken of each example's gradient; squaring the gradient of a batch mean, as some
    codebases do, is another quantity (smaller by about the batch size).

    Reference: Kunstner, Balles, Hennig, "Limitations of the Empirical Fisher Approximation",
    NeurIPS 2019, arXiv:1905.12558, equation 3 (times 1/N).

    Args:
        model: The network; evaluated as it is (put it into eval mode for batch norm).
        params: Trained parameters [T].
        data: Samples; none gives zeros.
        max_samples: Use only the first so many; 0 uses all.
        chunk: Samples whose gradients are held at once (chunk * T floats).

    Returns:
        [T], float32.
    """
    total = torch.zeros_like(params)
    count = min(len(data), max_samples) if max_samples else len(data)
    if count == 0:
        return total

    stack = stack_of(model, data.store.sample_shape)
    if stack is not None and stack.is_linear:
        return _of_linear_stack(stack, params, data, count) / count

    def loss(p: Tensor, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        one = Batch(x[None], y[None], None, None if mask is None else mask[None])
        return supervised_loss(model(p, one.x), one)

    from torch.func import grad, vmap  # here: it takes 2 s, and stacks do without

    for start in range(0, count, chunk):
        batch = data.batch(slice(start, min(start + chunk, count)))
        axes = (None, 0, 0, None if batch.mask is None else 0)
        gradients = vmap(grad(loss), in_dims=axes)(params, batch.x, batch.y, batch.mask)
        total += gradients.square().sum(0)
    return total / count


@torch.no_grad()
def _of_linear_stack(stack: Stack, params: Tensor, data: Samples, count: int) -> Tensor:
    """Sum of squared per-example gradients [T], by squared products instead of one by one."""
    total = torch.zeros_like(params)
    network = LinearStack(stack, params)
    for start in range(0, count, _ROWS):
        batch = data.batch(slice(start, min(start + _ROWS, count)))
        inputs, logits = network.forward(batch.x)
        each = torch.ones(len(batch))  # each example's own loss, not the mean
        _, deltas = cross_entropy(logits, batch.y, each, batch.mask)
        network.squared_gradients(inputs, deltas, total)
    return total
