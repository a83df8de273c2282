"""Fisher information of a model's parameters on a device's samples: its diagonal, two estimators.

Both are means of squared gradients of single examples, at the given parameters. They differ by the
labels: the given ones (**empirical** Fisher) or the model's own (**true** Fisher).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgelearn.continual.mode import evaluating
from edgelearn.continual.per_example import sum_over_examples
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.stack import LinearStack, Stack, cross_entropy, stack_of

_ROWS_OF_LINEAR, _ROWS = 1024, 128  # that pass through the network at once


def empirical_fisher(
    model: FlatModel, params: Tensor, data: Samples, *, max_samples: int = 0, chunk: int = 32
) -> Tensor:
    """Diagonal of the **empirical** Fisher: mean of squared per-example gradients.

    F_i = 1/N sum_n (d log p(y_n | x_n, params) / d params_i)^2, with the given labels y_n. The
    square is taken of each example's gradient; squaring the gradient of a batch mean, as some
    codebases do, is another quantity (smaller by about the batch size).

    Reference: Kunstner, Balles, Hennig, "Limitations of the Empirical Fisher Approximation for
    Natural Gradient Descent", NeurIPS 2019, arXiv:1905.12558 (there a sum, not a mean).

    Args:
        model: The network; evaluated in eval mode.
        params: Trained parameters [T].
        data: Samples; none gives zeros.
        max_samples: Use only the first so many; 0 uses all.
        chunk: Samples whose gradients are held at once, where they have to be: of convolutions
            (each as large as the largest one's weight), and of networks with other layers than
            `Linear` and `Conv2d` (each T floats).

    Returns:
        [T], float32.
    """
    batches = _batches(model, data, max_samples)
    return _mean_of_squares(model, params, data, batches, max_samples=max_samples, chunk=chunk)


def true_fisher(
    model: FlatModel,
    params: Tensor,
    data: Samples,
    generator: Generator | None,
    *,
    max_samples: int = 0,
    chunk: int = 32,
) -> Tensor:
    """Diagonal of the **true** Fisher: the labels are the model's, not those given.

    F_i = 1/N sum_n E_y (d log p(y | x_n, params) / d params_i)^2, y from p(. | x_n, params). With a
    generator the expectation is one draw for each example, as van de Ven's code has it; without
    one it is taken over all classes, exactly, which costs as many passes as there are classes.

    Reference: Kunstner, Balles, Hennig, "Limitations of the Empirical Fisher Approximation for
    Natural Gradient Descent", NeurIPS 2019, arXiv:1905.12558 (there a sum, not a mean).

    Args:
        model: The network; evaluated in eval mode.
        params: Trained parameters [T].
        data: Samples, whose labels matter only for the classes that their tasks allow; none gives
            zeros.
        generator: Source of the draws; None takes the expectation.
        max_samples: Use only the first so many; 0 uses all.
        chunk: See `empirical_fisher`.

    Returns:
        [T], float32.
    """
    batches = _batches(model, data, max_samples)
    own = _labelled(model, params, batches, generator)
    return _mean_of_squares(model, params, data, own, max_samples=max_samples, chunk=chunk)


def _mean_of_squares(
    model: FlatModel,
    params: Tensor,
    data: Samples,
    batches: Iterable[Batch],
    *,
    max_samples: int,
    chunk: int,
) -> Tensor:
    count = _count(data, max_samples)
    if count == 0:
        return torch.zeros_like(params)
    stack = stack_of(model, data.store.sample_shape)
    if stack is not None and stack.is_linear:
        return _of_linear_stack(stack, params, batches) / count
    total = sum_over_examples(model, params, batches, _losses, of=torch.square, chunk=chunk)
    return total / count


@torch.no_grad()
def _of_linear_stack(stack: Stack, params: Tensor, batches: Iterable[Batch]) -> Tensor:
    """Sum of squared per-example gradients [T], by squared products, without autograd."""
    total = torch.zeros_like(params)
    network = LinearStack(stack, params)
    for batch in batches:
        inputs, logits = network.forward(batch.x)
        # Each example's own loss, not the mean.
        each = torch.ones(len(batch)) if batch.weight is None else batch.weight
        _, deltas = cross_entropy(logits, batch.y, each, batch.mask)
        network.squared_gradients(inputs, deltas, total)
    return total


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return each example's -log p(y | x) [B], times its weight."""
    each = F.cross_entropy(_masked(logits, batch), batch.y, reduction="none")
    return each if batch.weight is None else each * batch.weight


def _masked(logits: Tensor, batch: Batch) -> Tensor:
    return logits if batch.mask is None else logits.masked_fill(~batch.mask, float("-inf"))


def _count(data: Samples, max_samples: int) -> int:
    return min(len(data), max_samples) if max_samples else len(data)


def _batches(model: FlatModel, data: Samples, max_samples: int) -> Iterator[Batch]:
    count = _count(data, max_samples)
    stack = stack_of(model, data.store.sample_shape)
    rows = _ROWS_OF_LINEAR if stack is not None and stack.is_linear else _ROWS
    for start in range(0, count, rows):
        yield data.batch(slice(start, min(start + rows, count)))


def _labelled(
    model: FlatModel, params: Tensor, batches: Iterable[Batch], generator: Generator | None
) -> Iterator[Batch]:
    """Yield batches with the model's own labels: drawn, or each class with its probability."""
    for batch in batches:
        with evaluating(model.module), torch.no_grad():
            chances = torch.softmax(_masked(model(params, batch.x), batch), 1)
        if generator is not None:
            drawn = torch.multinomial(chances, 1, generator=generator).flatten()
            yield replace(batch, y=drawn)
            continue
        for label in range(chances.shape[1]):
            weight = chances[:, label].sqrt()  # it is squared with the gradient
            yield replace(batch, y=torch.full_like(batch.y, label), weight=weight)
