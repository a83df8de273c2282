"""Sums over examples of functions of their own gradients: Fisher information and the like.

A batch's gradient is the sum of its examples'; their squares, or absolute values, are not to be had
from it. Where a network is made of `Linear` and `Conv2d`, one forward and one backward pass give
each layer's input and the gradient by its output, and these give every example's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from edgelearn.continual.mode import evaluating
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch

Losses = Callable[[Tensor, Batch], Tensor]
Function = Callable[[Tensor], Tensor]

_CLOSE = 1e-3  # of the largest element: a network that is no plain composition is far off


def sum_over_examples(
    model: FlatModel,
    params: Tensor,
    batches: Iterable[Batch],
    losses: Losses,
    *,
    of: Function,
    chunk: int = 32,
) -> Tensor:
    """Return sum_n of(dL_n / dparams), the examples taken one by one.

    With z = x W^T the gradient of example n by W is delta_n x_n^T, delta_n its gradient by z_n, so
    that of a linear layer's is one product, sum_n of(delta_n) of(x_n)^T: squared ones as Goodfellow
    has them. A convolution is a linear layer on unfolded patches, over which each example's
    gradient is summed before `of` is taken.

    Networks with other layers that have trained parameters, or with a layer that is called twice,
    go through `vmap(grad(...))`, which is slower by far. So do those whose first example has
    another gradient by autograd, alone, than by this way in its batch: then parameters were used
    beside their layers, or examples changed each other.

    Reference: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv:1510.01799.

    Args:
        model: The network; it is evaluated in eval mode.
        params: Trained parameters [T].
        batches: The examples.
        losses: (logits [B, C], batch) -> each example's own loss [B].
        of: Function by element with of(a b) = of(a) of(b), such as `torch.square`, `torch.abs`.
        chunk: Examples whose gradients by a convolution (by all, with vmap) are held at once.

    Returns:
        [T], float32.
    """
    total = torch.zeros_like(params)
    with evaluating(model.module):
        layers = _layers(model)
        is_checked = False
        for batch in batches:
            passes = None if not layers else _passes(model, params, batch, losses, layers)
            if passes is not None and not is_checked:
                is_checked = True
                if not _agrees(model, params, batch, losses, passes):
                    layers, passes = None, None
            if passes is None:
                layers = None
                total += _by_vmap(model, params, batch, losses, of, chunk)
                continue
            for layer, x, delta in passes:
                layer.add(x, delta, total, of=of, chunk=chunk)
    return total


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer with trained parameters, and where they lie; None where not trained."""

    module: nn.Linear | nn.Conv2d
    weight: slice | None
    bias: slice | None

    def add(self, x: Tensor, delta: Tensor, out: Tensor, *, of: Function, chunk: int) -> None:
        """Add the function of each example's gradient to `out` [T].

        Args:
            x: What went into the layer [B, ...].
            delta: Gradient by what came out of it [B, ...].
            out: [T].
            of: The function.
            chunk: Examples whose gradients are held at once.
        """
        module = self.module
        if self.bias is not None:
            rest = tuple(range(1, delta.ndim - 1)) if isinstance(module, nn.Linear) else (2, 3)
            out[self.bias] += of(delta.sum(rest) if rest else delta).sum(0)
        if self.weight is None:
            return
        weight = out[self.weight].view(module.weight.shape)
        if isinstance(module, nn.Linear) and x.ndim == 2:
            weight.addmm_(of(delta).t(), of(x))
            return
        for some_x, some_delta in zip(
            torch.split(x, chunk), torch.split(delta, chunk), strict=True
        ):
            if isinstance(module, nn.Linear):
                own = _of_linear(some_x, some_delta)
            else:
                own = _of_convolution(module, some_x, some_delta)
            weight += of(own).sum(0).view_as(weight)


_Passes = list[tuple[_Layer, Tensor, Tensor]]


def _of_linear(x: Tensor, delta: Tensor) -> Tensor:
    """Return the gradients by W of a layer that sees several rows of each example [B, out, in]."""
    rows, deltas = x.flatten(1, -2), delta.flatten(1, -2)
    return deltas.transpose(1, 2) @ rows


def _of_convolution(module: nn.Conv2d, x: Tensor, delta: Tensor) -> Tensor:
    """Return the gradients by W [B, out, in / groups * kernel]."""
    groups, count = module.groups, len(x)
    assert not isinstance(module.padding, str)  # `_layers` refuses it
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    patches = patches.view(count * groups, -1, patches.shape[-1])
    deltas = delta.reshape(count * groups, -1, patches.shape[-1])
    return torch.bmm(deltas, patches.transpose(1, 2)).view(count, module.out_channels, -1)


def _layers(model: FlatModel) -> list[_Layer] | None:
    """Return all layers with trained parameters; None if some are of another kind, or share."""
    layout = model.layout
    trained = set(layout.names[: layout.num_trained_tensors])
    found: list[_Layer] = []
    seen: set[int] = set()
    for name, module in model.module.named_modules():
        own = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        if any(id(parameter) in seen for parameter in own.values()):
            return None
        seen |= {id(parameter) for parameter in own.values()}
        prefix = f"{name}." if name else ""
        places = {leaf: layout.places[f"{prefix}{leaf}"] for leaf in own}
        if not places.keys() <= {"weight", "bias"} or not _is_known(module):
            return None
        assert isinstance(module, nn.Linear | nn.Conv2d)
        found.append(_Layer(module, places.pop("weight", None), places.pop("bias", None)))
        trained -= {f"{prefix}{leaf}" for leaf in own}
    return None if trained else found


def _is_known(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    if type(module) is not nn.Conv2d:
        return False
    assert isinstance(module, nn.Conv2d)
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _passes(
    model: FlatModel, params: Tensor, batch: Batch, losses: Losses, layers: list[_Layer]
) -> _Passes | None:
    """Return each layer's input and the gradient by its output; None if one is called twice."""
    calls: dict[int, list[tuple[Tensor, GradientEdge]]] = {}

    def note(index: int, _module: nn.Module, inputs: Any, output: Tensor) -> None:
        # The edge, not the output: what follows may write into that.
        calls.setdefault(index, []).append((inputs[0].detach(), get_gradient_edge(output)))

    with ExitStack() as hooks, torch.enable_grad():
        for index, layer in enumerate(layers):
            hooks.callback(layer.module.register_forward_hook(partial(note, index)).remove)
        leaf = params.detach().requires_grad_()
        total = losses(model(leaf, batch.x), batch).sum()
    if any(len(found) != 1 for found in calls.values()):
        return None
    edges = [found[0][1] for found in calls.values()]
    if not edges:
        return []
    deltas = torch.autograd.grad(total, edges, allow_unused=True)
    return [
        (layers[index], found[0][0], delta)
        for (index, found), delta in zip(calls.items(), deltas, strict=True)
        if delta is not None
    ]


def _agrees(
    model: FlatModel, params: Tensor, batch: Batch, losses: Losses, passes: _Passes
) -> bool:
    """Whether the first example's gradient is what autograd gives for it alone."""
    if any(len(x) != len(batch) or len(delta) != len(batch) for _, x, delta in passes):
        return False
    found = torch.zeros_like(params)
    for layer, x, delta in passes:
        layer.add(x[:1], delta[:1], found, of=_same, chunk=1)
    one = Batch(**{name: rows[:1] for name, rows in _rows(batch).items()})
    with torch.enable_grad():
        leaf = params.detach().requires_grad_()
        (expected,) = torch.autograd.grad(losses(model(leaf, one.x), one).sum(), leaf)
    largest = expected.abs().max()
    return bool((found - expected).abs().max() <= _CLOSE * largest)


def _same(gradients: Tensor) -> Tensor:
    return gradients


def _by_vmap(
    model: FlatModel, params: Tensor, batch: Batch, losses: Losses, of: Function, chunk: int
) -> Tensor:
    """Return the sum over a batch, for any network that can be stacked."""
    from torch.func import grad, vmap  # here: it takes 2 s, and most networks do without

    def loss(own: Tensor, row: dict[str, Tensor]) -> Tensor:
        one = Batch(**{name: value[None] for name, value in row.items()})
        return losses(model(own, one.x), one).sum()

    total = torch.zeros_like(params)
    for start in range(0, len(batch), chunk):
        some = {name: rows[start : start + chunk] for name, rows in _rows(batch).items()}
        total += of(vmap(grad(loss), in_dims=(None, 0))(params, some)).sum(0)
    return total


def _rows(batch: Batch) -> dict[str, Tensor]:
    """Return what a batch has for each of its examples; `places` are of the replayed ones only."""
    parts = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name != "places"}
    return {name: rows for name, rows in parts.items() if rows is not None}
