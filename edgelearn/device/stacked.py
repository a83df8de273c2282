"""Local training of many devices as one stack: each operation is done once, for all of them.

Row k of every tensor belongs to device k, and nothing mixes rows, so a device learns what it would
learn alone, up to the rounding of another order of sums. What this saves is the fixed cost of an
operation, not arithmetic: it pays for small networks, while the whole stack stays in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Pull
from edgelearn.device.stacked_batches import Devices, Integers, StackedBatch, batches
from edgelearn.device.training import Training
from edgelearn.scenario.spec import ClientSpec
from edgelearn.stack import Linear, Stack


@dataclass(frozen=True, slots=True)
class TrainedStack:
    """The outcome of local training, row by row.

    Attributes:
        loss: Mean over steps [K].
        num_steps: Steps taken [K].
        num_samples: Samples that passed through them, replayed ones included [K].
    """

    loss: NDArray[np.float64]
    num_steps: Integers
    num_samples: Integers


@torch.no_grad()
def train_linear(
    training: Training,
    stack: Stack,
    params: Tensor,
    devices: Devices,
    *,
    proximal_mu: float,
    updates: Tensor,
) -> TrainedStack:
    """Train a stack of devices by the written-out backward pass.

    Args:
        training: How; its `linear_stack` is not None.
        stack: That linear stack.
        params: Global parameters [P].
        devices: K devices.
        proximal_mu: FedProx's mu.
        updates: Takes local - global [K, P].
    """
    network = _Network(stack, params, len(devices))
    step = _Update(training, network, devices.memory, proximal_mu)
    num_samples = np.zeros(len(devices), np.int64)
    losses: list[Tensor] = []
    for batch in batches(training, devices):
        inputs, logits = network.forward(batch.x)
        loss, delta = _cross_entropy(logits, batch)
        step(inputs, delta)
        losses.append(loss)
        num_samples[: len(loss)] += batch.num_samples
    network.write_updates(updates)
    num_steps = -(-devices.sizes // training.spec.batch_size) * training.spec.epochs
    total = np.zeros(len(devices))
    for loss in losses:
        total[: len(loss)] += loss.numpy()
    return TrainedStack(total / num_steps, num_steps, num_samples)


# -- the network -----------------------------------------------------------------------------------


class _Parts:
    """A vector for each device [K, P], stored layer by layer: [K, size] for each tensor.

    So the tensor of a layer is contiguous over devices, as batched products want it, and what
    works element by element sweeps over all of it at once.
    """

    def __init__(self, stack: Stack, count: int) -> None:
        self._places = [
            (place, size)
            for layer, _ in stack.linears
            for place, size in _places(layer)
            if place >= 0
        ]
        self._flat = torch.empty(count * stack.num_params)
        pieces = torch.split(self._flat, [count * size for _, size in self._places])
        self._parts = [piece.view(count, -1) for piece in pieces]
        self._count = count

    def fill(self, rows: Tensor) -> None:
        """Copy vectors in: [K, P], or [P] for all."""
        for (place, size), part in zip(self._places, self._parts, strict=True):
            part.copy_(rows[..., place : place + size])

    def subtract_into(self, params: Tensor, out: Tensor) -> None:
        """Write these vectors minus `params` [P] into `out` [K, P]."""
        for (place, size), part in zip(self._places, self._parts, strict=True):
            ends = slice(place, place + size)
            torch.sub(part, params[ends], out=out[:, ends])

    def at(self, place: int) -> Tensor:
        """Return the tensor at a place of the vector [K, size]."""
        return self._parts[[p for p, _ in self._places].index(place)]

    def first(self, k: int) -> list[Tensor]:
        """Return the numbers of the first k devices, in as few tensors as possible."""
        return [self._flat] if k == self._count else [part[:k] for part in self._parts]

    def first_of(self, params: Tensor, k: int) -> list[Tensor]:
        """Return a vector [P] in pieces that broadcast against `each` of `by_tensor`."""
        return [params[place : place + size].expand(k, size) for place, size in self._places]

    def by_tensor(self, k: int) -> list[Tensor]:
        """Return the numbers of the first k devices, tensor by tensor [k, size]."""
        return [part[:k] for part in self._parts]


def _places(layer: Linear) -> tuple[tuple[int, int], tuple[int, int]]:
    return (layer.weight, layer.fan_in * layer.fan_out), (layer.bias, layer.fan_out)


class _Network:
    """Forward and backward passes of K copies of a linear stack; see `edgelearn.stack`."""

    def __init__(self, stack: Stack, params: Tensor, count: int) -> None:
        self.stack, self.global_params, self.count = stack, params, count
        self.params = _Parts(stack, count)
        self.params.fill(params)
        self._relus = [relu for _, relu in stack.linears]
        self._weights, self._biases = self.views(self.params)

    def views(self, parts: _Parts) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return weights [K, O, I] and biases [K, 1, O] by layer."""
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for layer, _ in self.stack.linears:
            shape = self.count, layer.fan_out, layer.fan_in
            weights.append(parts.at(layer.weight).view(shape))
            biases.append(None if layer.bias < 0 else parts.at(layer.bias).unsqueeze(1))
        return weights, biases

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the input of each layer [k, B, I] and the logits [k, B, C]."""
        k, inputs, z = len(x), [], x
        for relu, weight, bias in zip(self._relus, self._weights, self._biases, strict=True):
            inputs.append(z)
            transposed = weight[:k].transpose(1, 2)
            z = z.bmm(transposed) if bias is None else torch.baddbmm(bias[:k], z, transposed)
            if relu:
                z.relu_()
        return inputs, z

    def step(self, inputs: list[Tensor], delta: Tensor, *, lr: float, decay: float) -> None:
        """Take a step of SGD; no gradient is written. As `LinearStack.step`."""
        k, keep = len(delta), 1.0 - lr * decay
        for index in range(len(inputs) - 1, -1, -1):
            weight, bias, x = self._weights[index][:k], self._biases[index], inputs[index]
            below = delta.bmm(weight) if index else None
            weight.baddbmm_(delta.transpose(1, 2), x, beta=keep, alpha=-lr)
            if bias is not None:
                if decay:
                    bias[:k].mul_(keep)
                bias[:k].sub_(delta.sum(1, keepdim=True), alpha=lr)
            if below is not None:
                delta = self._through_relu(index, below, x)

    def gradient(
        self,
        inputs: list[Tensor],
        delta: Tensor,
        out: tuple[list[Tensor], list[Tensor | None]],
    ) -> None:
        """Write gradients into `out`, views as those of `views`."""
        k = len(delta)
        for index in range(len(inputs) - 1, -1, -1):
            x, bias = inputs[index], out[1][index]
            torch.bmm(delta.transpose(1, 2), x, out=out[0][index][:k])
            if bias is not None:
                torch.sum(delta, 1, keepdim=True, out=bias[:k])
            if index:
                delta = self._through_relu(index, delta.bmm(self._weights[index][:k]), x)

    def write_updates(self, out: Tensor) -> None:
        """Write local - global into `out` [K, P]."""
        self.params.subtract_into(self.global_params, out)

    def _through_relu(self, index: int, delta: Tensor, activated: Tensor) -> Tensor:
        """Return dL/dz of the layer below from dL/d(its output)."""
        if not self._relus[index - 1]:
            return delta
        below: Tensor = torch.ops.aten.threshold_backward(delta, activated, 0.0)
        return below


class _Update:
    """A step on all parameters: SGD, FedProx and the declared pull; as `Training` does it."""

    def __init__(
        self, training: Training, network: _Network, memory: Mapping[str, Tensor], mu: float
    ) -> None:
        self._spec: ClientSpec = training.spec
        self._network, self._mu = network, mu
        pull = training.strategy.pull()
        self._explicit = pull if pull is not None and pull.is_explicit else None
        self._is_fused = self._spec.momentum == 0 and self._explicit is None
        if pull is not None:
            self._anchor = self._stored(memory[pull.anchor])
            self._stiffness = self._stored(_stiffness(pull, memory, self._spec.lr))
        self._is_implicit = pull is not None and not pull.is_explicit
        if not self._is_fused:
            self._gradients = _Parts(network.stack, network.count)
            self._views = network.views(self._gradients)
        self._momentum: _Parts | None = None

    def __call__(self, inputs: list[Tensor], delta: Tensor) -> None:
        """Take a step of the first k devices, with dL/dlogits [k, B, C]."""
        spec, network, k = self._spec, self._network, len(delta)
        if self._is_fused:
            network.step(inputs, delta, lr=spec.lr, decay=self._mu + spec.weight_decay)
            if self._mu:
                self._towards_global(network.params, k, spec.lr * self._mu)
        else:
            network.gradient(inputs, delta, self._views)
            self._by_gradient(k)
        if self._is_implicit:
            pulled = self._anchor.first(k), self._stiffness.first(k)
            for local, anchor, weight in zip(network.params.first(k), *pulled, strict=True):
                local.lerp_(anchor, weight)

    def _by_gradient(self, k: int) -> None:
        spec, local = self._spec, self._network.params.first(k)
        gradients = self._gradients.first(k)
        if self._explicit is not None:
            pulled = self._anchor.first(k), self._stiffness.first(k)
            for g, own, anchor, stiffness in zip(gradients, local, *pulled, strict=True):
                g.addcmul_(own - anchor, stiffness)
        decay = self._mu + spec.weight_decay
        if decay:
            for g, own in zip(gradients, local, strict=True):
                g.add_(own, alpha=decay)
        if self._mu:
            self._towards_global(self._gradients, k, -self._mu)
        if spec.momentum:
            gradients = self._accumulated(k)
        for g, own in zip(gradients, local, strict=True):
            own.add_(g, alpha=-spec.lr)

    def _accumulated(self, k: int) -> list[Tensor]:
        """Return the momentum of the first k devices; all of them take the first step."""
        gradients = self._gradients.first(k)
        if self._momentum is None:
            self._momentum = _Parts(self._network.stack, self._network.count)
            for velocity, g in zip(self._momentum.first(k), gradients, strict=True):
                velocity.copy_(g)
        else:
            for velocity, g in zip(self._momentum.first(k), gradients, strict=True):
                velocity.mul_(self._spec.momentum).add_(g)
        return self._momentum.first(k)

    def _towards_global(self, parts: _Parts, k: int, alpha: float) -> None:
        pieces = parts.first_of(self._network.global_params, k)
        for part, piece in zip(parts.by_tensor(k), pieces, strict=True):
            part.add_(piece, alpha=alpha)

    def _stored(self, rows: Tensor) -> _Parts:
        parts = _Parts(self._network.stack, self._network.count)
        parts.fill(rows)
        return parts


def _stiffness(pull: Pull, memory: Mapping[str, Tensor], lr: float) -> Tensor:
    """Return what multiplies the distance to the anchor [K, P]."""
    if pull.is_explicit:
        return pull.strength * memory[pull.curvature]
    return pull.weight(Memory(memory), lr=lr)


def _cross_entropy(logits: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
    """Return each device's loss [k] and its derivative by the logits [k, B, C], in their place."""
    if batch.mask is not None:
        logits.masked_fill_(~batch.mask, float("-inf"))
    # As log_softmax, which is slow on rows as short as these.
    logits -= logits.amax(2, keepdim=True)
    y = batch.y.unsqueeze(2)
    picked = logits.gather(2, y)
    delta = logits.exp_()
    total = delta.sum(2, keepdim=True)
    picked -= total.log()
    delta /= total
    delta.scatter_add_(2, y, torch.full_like(picked, -1.0))
    losses = picked.squeeze(2)
    if batch.weight is None:
        return -losses.mean(1), delta.mul_(1.0 / batch.y.shape[1])
    return -(losses * batch.weight).sum(1), delta.mul_(batch.weight.unsqueeze(2))
