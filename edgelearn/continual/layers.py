"""What the linear and convolutional layers of a network see, and what the loss tells them.

Orthogonal projection needs the inputs of each layer, data-free generation their statistics, and a
sample's gradient norm follows from a layer's input and the derivative by its output, without the
gradient itself. Layers are found by their type, and watched by hooks that are gone afterwards; what
a network does between them does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.continual.strategy import supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch


class UsedAgainError(ValueError):
    """A network uses a layer more than once in an evaluation, or not at all."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer, or a convolution without groups, whose weight is trained.

    With a bias, the input counts as one longer, by a constant 1 that the bias is the weight of.

    Attributes:
        name: Name of the module.
        module: The module.
        weight: Place of the weight in the trained parameters.
        bias: Place of the bias; -1 if there is none.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    weight: int
    bias: int

    @property
    def num_outputs(self) -> int:
        """Output units, or channels."""
        return int(self.module.weight.shape[0])

    @property
    def num_weights(self) -> int:
        """Weights of one output unit, without the bias."""
        return self.module.weight[0].numel()

    @property
    def width(self) -> int:
        """Length D of the input of one output unit, the constant 1 of a bias included."""
        return self.num_weights + int(self.bias >= 0)

    @property
    def num_channels(self) -> int:
        """Features or channels of the input."""
        if isinstance(self.module, nn.Conv2d):
            return self.module.in_channels
        return self.module.in_features

    @property
    def size(self) -> int:
        """Trained parameters of the layer."""
        return self.num_outputs * self.width

    def read(self, flat: Tensor) -> Tensor:
        """Return the layer's part of a vector [T] as a matrix [outputs, D], the bias last."""
        end = self.weight + self.num_outputs * self.num_weights
        weight = flat[self.weight : end].view(self.num_outputs, self.num_weights)
        if self.bias < 0:
            return weight
        return torch.cat([weight, flat[self.bias : self.bias + self.num_outputs, None]], 1)

    def write(self, flat: Tensor, matrix: Tensor) -> None:
        """Write a matrix [outputs, D] into the layer's part of a vector [T]."""
        end = self.weight + self.num_outputs * self.num_weights
        flat[self.weight : end] = matrix[:, : self.num_weights].reshape(-1)
        if self.bias >= 0:
            flat[self.bias : self.bias + self.num_outputs] = matrix[:, -1]

    def columns(self, inputs: Tensor) -> Tensor:
        """Return what each output is the product of: [B, places, D].

        Args:
            inputs: Of the layer [B, ...]; a convolution has one place for each output pixel.
        """
        if isinstance(self.module, nn.Conv2d):
            found = F.unfold(
                inputs,
                self.module.kernel_size,
                dilation=self.module.dilation,
                padding=_numbers(self.module.padding),
                stride=self.module.stride,
            ).transpose(1, 2)
        else:
            found = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return found if self.bias < 0 else F.pad(found, (0, 1), value=1.0)

    def by_place(self, outputs: Tensor) -> Tensor:
        """Return a tensor of the shape of the layer's outputs as [B, places, outputs]."""
        if isinstance(self.module, nn.Conv2d):
            return outputs.flatten(2).transpose(1, 2)
        return outputs.reshape(len(outputs), -1, outputs.shape[-1])

    def by_channel(self, inputs: Tensor) -> Tensor:
        """Return inputs as [values, channels]; statistics are taken over the first dimension."""
        if isinstance(self.module, nn.Conv2d):
            return inputs.transpose(0, 1).flatten(1).t()
        return inputs.reshape(-1, inputs.shape[-1])


def layers_of(model: FlatModel) -> tuple[Layer, ...]:
    """Return the layers of a network that can be watched, in the order of its modules."""
    layout = model.layout
    places, place = {}, 0
    names = layout.names[: layout.num_trained_tensors]
    for name, size in zip(names, layout.sizes, strict=False):
        places[name] = place
        place += size
    return tuple(
        Layer(name, module, places[f"{prefix}weight"], places.get(f"{prefix}bias", -1))
        for name, module in model.module.named_modules()
        for prefix in [f"{name}." if name else ""]
        if isinstance(module, nn.Linear | nn.Conv2d)
        and f"{prefix}weight" in places
        and _is_plain(module)
    )


def observe(
    model: FlatModel,
    params: Tensor,
    x: Tensor,
    layers: Sequence[Layer],
    *,
    probes: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Evaluate a network, and return what its layers saw.

    Args:
        model: The network.
        params: Parameters [T] or [P].
        x: Inputs [B, ...].
        layers: Layers of the network, each used once.
        probes: Receives for each layer a zero that is added to its output: the derivative by it is
            that by the output.

    Returns:
        Logits [B, C], and the input of each layer, part of the graph of the logits.

    Raises:
        UsedAgainError: If the network uses a layer more than once, or not at all.
    """
    inputs: list[list[Tensor]] = [[] for _ in layers]
    added: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.module.register_forward_hook(_watcher(seen, zeros if probes is not None else None))
        for layer, seen, zeros in zip(layers, inputs, added, strict=True)
    ]
    try:
        logits = model(params, x)
    finally:
        for handle in handles:
            handle.remove()
    for layer, seen in zip(layers, inputs, strict=True):
        if len(seen) != 1:
            raise UsedAgainError(f"layer {layer.name!r} is used {len(seen)} times, not once")
    if probes is not None:
        probes += [zeros[0] for zeros in added]
    return logits, [seen[0] for seen in inputs]


def sample_gradients(model: FlatModel, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the squared norm of each sample's gradient [B], and the sum of the gradients [T].

    The gradient of sample b by a layer's matrix is sum_p delta_bp a_bp^T over the places p of a
    convolution; a linear layer has one, so that its squared norm is |delta_b|^2 |a_b|^2
    (Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv:1510.01799). Where a
    network trains anything else, or uses a layer twice, each gradient is taken by itself: the
    same, and slower.

    Args:
        model: The network, in eval mode.
        params: Trained parameters [T].
        batch: Samples; of their weights none counts.
    """
    layers, module = layers_of(model), model.module
    is_tied = len(list(module.parameters())) != len(
        list(module.named_parameters(remove_duplicate=False))
    )
    if is_tied or sum(layer.size for layer in layers) != model.layout.num_trained:
        return _one_by_one(model, params, batch)
    with torch.enable_grad():
        probes: list[Tensor] = []
        try:
            logits, inputs = observe(model, params.detach(), batch.x, layers, probes=probes)
        except UsedAgainError:
            return _one_by_one(model, params, batch)
        whole = Batch(batch.x, batch.y, torch.ones(len(batch)), batch.mask)
        deltas = torch.autograd.grad(supervised_loss(logits, whole), probes)
    norms, total = torch.zeros(len(batch)), torch.zeros_like(params)
    with torch.no_grad():
        for layer, seen, delta in zip(layers, inputs, deltas, strict=True):
            columns, by_place = layer.columns(seen), layer.by_place(delta)
            if columns.shape[1] == 1:
                norms += by_place.square().sum((1, 2)) * columns.square().sum((1, 2))
                layer.write(total, by_place[:, 0].t() @ columns[:, 0])
            else:
                each = by_place.transpose(1, 2) @ columns
                norms += each.square().sum((1, 2))
                layer.write(total, each.sum(0))
    return norms, total


def _one_by_one(model: FlatModel, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    def loss(p: Tensor, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        one = Batch(x[None], y[None], None, None if mask is None else mask[None])
        return supervised_loss(model(p, one.x), one)

    from torch.func import grad, vmap  # here: it takes 2 s, and plain layers do without

    axes = (None, 0, 0, None if batch.mask is None else 0)
    each = vmap(grad(loss), in_dims=axes)(params, batch.x, batch.y, batch.mask)
    return each.square().sum(1), each.sum(0)


def _watcher(seen: list[Tensor], zeros: list[Tensor] | None) -> Any:
    def watch(_module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        seen.append(given[0])
        if zeros is None:
            return None
        zeros.append(torch.zeros_like(out, requires_grad=True))
        return out + zeros[-1]

    return watch


def _is_plain(module: nn.Linear | nn.Conv2d) -> bool:
    if isinstance(module, nn.Linear):
        return True
    plain = (module.groups, module.padding_mode) == (1, "zeros")
    return plain and not isinstance(module.padding, str)


def _numbers(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)  # such a layer is not plain
    return padding
