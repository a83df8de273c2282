"""Local training of many devices at once, as one stack of tensors [K, ...].

For linear stacks whose parameters are so few that those of many devices stay in the processor's
cache: there, the fixed cost of each operation is most of the time, and K devices share it. The
mathematics is that of `edgelearn.device.training`, device by device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.continual.strategy import ClientStrategy, Pull, Rehearsal
from edgelearn.scenario.samples import Batch, SampleStore
from edgelearn.scenario.spec import ClientSpec
from edgelearn.seeds import permutations, split_all
from edgelearn.stack import Linear, Stack


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices that train together.

    Attributes:
        ids: All their sample ids, int32.
        starts: Where each one's begin [K + 1].
        seeds: Of each one's training [K].
        held: Stored samples that may be replayed [K, capacity], -1 where there is none.
        curvature: Of a pull [K, T].
        anchor: Of a pull [K, T].
        charge: Of a path integral [K, T]; training does not change it.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    held: NDArray[np.int32] | None = None
    curvature: Tensor | None = None
    anchor: Tensor | None = None
    charge: Tensor | None = None

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each device [K]."""
        return np.diff(self.starts)

    def take(self, rows: NDArray[np.int64]) -> Devices:
        """Return some of the devices."""
        sizes = self.sizes[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], sizes)
        index = torch.from_numpy(rows)
        return Devices(
            self.ids[places],
            starts,
            self.seeds[rows],
            None if self.held is None else self.held[rows],
            None if self.curvature is None else self.curvature[index],
            None if self.anchor is None else self.anchor[index],
            None if self.charge is None else self.charge[index],
        )


@dataclass(frozen=True, slots=True)
class StackTrained:
    """The outcome, by device.

    Attributes:
        params: Local parameters [K, P].
        loss: Mean over steps [K].
        num_steps: [K].
        num_samples: Samples that passed through training, replayed ones included [K].
        charge: Of a path integral, with what the round added [K, T].
    """

    params: Tensor
    loss: NDArray[np.float64]
    num_steps: NDArray[np.int64]
    num_samples: NDArray[np.int64]
    charge: Tensor | None = None


@torch.no_grad()
def train_stack(
    stack: Stack,
    strategy: ClientStrategy,
    spec: ClientSpec,
    params: Tensor,
    store: SampleStore,
    devices: Devices,
    *,
    proximal_mu: float = 0.0,
) -> StackTrained:
    """Train devices together, each from the same parameters.

    Args:
        stack: The network; `is_linear`.
        strategy: `is_declared`.
        spec: Plain or momentum SGD.
        params: Global parameters [P].
        store: Where sample ids lead.
        devices: In descending order of their sizes, so that those still training are the first.
        proximal_mu: FedProx's mu.
    """
    pull = strategy.pull()
    local = params.repeat(len(devices.seeds), 1)
    optimizer = _Optimizer(spec, local, params, devices, pull, proximal_mu)
    total = torch.zeros(len(local))
    counts, passed = np.zeros(len(local), np.int64), np.zeros(len(local), np.int64)
    for step in _steps(devices, spec, strategy.rehearsal(), store):
        network = _Network(stack, local[: step.active])
        inputs, logits = network.forward(step.batch.x.flatten(2))
        losses, delta = _cross_entropy(logits, step.batch)
        optimizer.step(network, inputs, delta)
        total[: step.active] += losses
        counts[: step.active] += 1
        passed[: step.active] += step.sizes
    loss = total.double().numpy() / np.maximum(counts, 1)
    return StackTrained(local, loss, counts, passed, optimizer.charge)


# -- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of the devices that are still training, the first `active`.

    The batch has a dimension for the device in front of each tensor; where a device has fewer
    samples than others, weights are 0.
    """

    active: int
    batch: Batch
    sizes: NDArray[np.int64]


def _steps(
    devices: Devices, spec: ClientSpec, rehearsal: Rehearsal | None, store: SampleStore
) -> Iterator[_Step]:
    """Yield all steps: all epochs of all devices, in the order that each draws."""
    sizes, size = devices.sizes, spec.batch_size
    per_epoch = -(-sizes // size)
    draws = None
    if rehearsal is not None and devices.held is not None:
        draws = _Draws(devices, rehearsal, per_epoch * spec.epochs)
    # The steps of a device follow each other; a device with fewer per epoch is ahead of others.
    orders = np.stack([_order(devices, sizes, epoch) for epoch in range(spec.epochs)])
    for step in range(int((per_epoch * spec.epochs).max(initial=0))):
        active = int((per_epoch * spec.epochs > step).sum())
        rows = np.arange(active)
        epochs, within = step // per_epoch[:active], step % per_epoch[:active]
        columns = within[:, None] * size + np.arange(size)
        is_real = columns < sizes[:active, None]
        places = orders[epochs[:, None], rows[:, None], np.where(is_real, columns, 0)]
        ids = devices.ids[places]
        weights, counts = is_real.astype(np.float32), is_real.sum(1)
        if draws is None:
            weights /= counts[:, None]
        else:
            ids, weights, counts = draws.join(step, ids, is_real)
        batch = store.batch(torch.from_numpy(ids.reshape(-1)))
        shape = ids.shape
        mask = None if batch.mask is None else batch.mask.view(*shape, -1)
        x, y = batch.x.view(*shape, *batch.x.shape[1:]), batch.y.view(shape)
        weight = torch.from_numpy(weights.astype(np.float32))
        yield _Step(active, Batch(x, y, weight, mask), counts)


def _order(devices: Devices, sizes: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    """Return where in `ids` each device's samples lie, in the order of an epoch [K, longest]."""
    seeds = split_all(devices.seeds, np.full(len(sizes), epoch))
    return devices.starts[:-1, None] + permutations(seeds, sizes)


class _Draws:
    """What each device replays in each of its steps; as `Memory.draw` has it."""

    def __init__(
        self, devices: Devices, rehearsal: Rehearsal, num_steps: NDArray[np.int64]
    ) -> None:
        assert devices.held is not None
        self._rehearsal = rehearsal
        self._counts = (devices.held >= 0).sum(1)
        front = np.argsort(devices.held < 0, axis=1, kind="stable")  # in their order in memory
        self._held = np.take_along_axis(devices.held, front, 1)
        self._words = np.zeros((len(num_steps), int(num_steps.max(initial=0))), np.uint64)
        for row in np.flatnonzero(self._counts).tolist():
            generator = torch.Generator().manual_seed(int(devices.seeds[row]))
            words = torch.randint(2**62, (int(num_steps[row]),), generator=generator)
            self._words[row, : len(words)] = words.numpy().astype(np.uint64)

    def join(
        self, step: int, ids: NDArray[np.int32], is_real: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]:
        """Return ids, weights and numbers of samples with the replayed ones."""
        active, arriving = len(ids), is_real.sum(1)
        held, share = self._counts[:active], self._rehearsal.share
        wanted = np.minimum(self._rehearsal.count or arriving, held)
        picks = permutations(self._words[:active, step], held)[:, : int(wanted.max(initial=0))]
        is_past = np.arange(picks.shape[1]) < wanted[:, None]
        past = np.take_along_axis(self._held[:active], np.where(is_past, picks, 0), 1)
        past = np.where(is_past, past, ids[:, :1])
        new_weight = 1.0 / (arriving + wanted)
        past_weight = new_weight
        if share is not None:
            new_weight = np.where(wanted > 0, 1.0 - share, 1.0) / arriving
            past_weight = share / np.maximum(wanted, 1)
        weights = np.concatenate(
            [is_real * new_weight[:, None], is_past * past_weight[:, None]], axis=1
        )
        return np.concatenate([ids, past], axis=1), weights.astype(np.float32), arriving + wanted


# -- the network -----------------------------------------------------------------------------------


class _Network:
    """Forward and backward passes of a linear stack for K devices at once, in place."""

    def __init__(self, stack: Stack, params: Tensor) -> None:
        self._linears = stack.linears
        self._weights = [_weight_of(params, layer) for layer, _ in self._linears]
        self._biases = [_bias_of(params, layer) for layer, _ in self._linears]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the input of each layer and the logits [K, B, C]."""
        inputs, z = [], x
        for (_, relu), weight, bias in zip(self._linears, self._weights, self._biases, strict=True):
            inputs.append(z)
            if bias is None:
                z = torch.bmm(z, weight.transpose(1, 2))
            else:
                z = torch.baddbmm(bias[:, None], z, weight.transpose(1, 2))
            if relu:
                z.relu_()
        return inputs, z

    def step(self, inputs: list[Tensor], delta: Tensor, *, lr: float, decay: float) -> None:
        """Take a step of SGD; no gradient is written."""
        keep = 1.0 - lr * decay
        for index in range(len(inputs) - 1, -1, -1):
            weight, bias, x = self._weights[index], self._biases[index], inputs[index]
            below = delta.bmm(weight) if index else None
            weight.baddbmm_(delta.transpose(1, 2), x, beta=keep, alpha=-lr)
            if bias is not None:
                if decay:
                    bias.mul_(keep)
                bias.sub_(delta.sum(1), alpha=lr)
            if below is not None:
                delta = self._through_relu(index, below, x)

    def gradient(self, inputs: list[Tensor], delta: Tensor, out: Tensor) -> None:
        """Write dL/dtheta of each device into `out` [K, P]."""
        for index in range(len(inputs) - 1, -1, -1):
            layer, x = self._linears[index][0], inputs[index]
            _weight_of(out, layer).copy_(delta.transpose(1, 2).bmm(x))
            bias = _bias_of(out, layer)
            if bias is not None:
                bias.copy_(delta.sum(1))
            if index:
                delta = self._through_relu(index, delta.bmm(self._weights[index]), x)

    def _through_relu(self, index: int, delta: Tensor, activated: Tensor) -> Tensor:
        if not self._linears[index - 1][1]:
            return delta
        below: Tensor = torch.ops.aten.threshold_backward(delta, activated, 0.0)
        return below


class _Optimizer:
    """SGD with what is pulled, in one sweep or two; and what it is charged with.

    Attributes:
        charge: Of a path integral [K, T], which grows with each step.
    """

    def __init__(
        self,
        spec: ClientSpec,
        local: Tensor,
        params: Tensor,
        devices: Devices,
        pull: Pull | None,
        mu: float,
    ) -> None:
        self._spec, self._local, self._params, self._mu = spec, local, params, mu
        self._anchor, self._weight, self._strength = devices.anchor, None, None
        if pull is not None and devices.curvature is not None and devices.curvature.any():
            if pull.is_explicit:
                self._strength = pull.strength * devices.curvature
            else:
                stiffness = devices.curvature * (spec.lr * pull.strength)
                self._weight = stiffness / (1 + stiffness)
        self.charge = None if devices.charge is None else devices.charge.clone()
        is_bent = not (self._weight is self._strength is None)
        self._is_straight = spec.is_plain_sgd and not spec.weight_decay and not is_bent
        self._is_fused = spec.momentum == 0 and self._strength is None and self.charge is None
        self._gradients = torch.empty(0) if self._is_fused else torch.empty_like(local)
        self._momentum: Tensor | None = None

    def step(self, network: _Network, inputs: list[Tensor], delta: Tensor) -> None:
        spec, active = self._spec, len(delta)
        local = self._local[:active]
        if self._is_fused:
            network.step(inputs, delta, lr=spec.lr, decay=self._mu + spec.weight_decay)
            if self._mu:
                local.add_(self._params, alpha=spec.lr * self._mu)
            self._pull_back(local)
            return
        gradients = self._gradients[:active]
        network.gradient(inputs, delta, gradients)
        if self._mu:
            gradients.add_(local - self._params, alpha=self._mu)
        if self.charge is None:
            self._move(local, gradients)
        elif self._is_straight:
            self.charge[:active].addcmul_(gradients, gradients, value=spec.lr)
            self._move(local, gradients)
        else:
            before = local.clone()
            self._move(local, gradients.clone())
            self.charge[:active].addcmul_(gradients, before.sub_(local))

    def _move(self, local: Tensor, gradients: Tensor) -> None:
        """Take the step; the gradients [K, T] of the loss become those of all that is added."""
        spec, active = self._spec, len(local)
        if self._strength is not None and self._anchor is not None:
            gradients.addcmul_(self._strength[:active], local - self._anchor[:active])
        if spec.weight_decay:
            gradients.add_(local, alpha=spec.weight_decay)
        if spec.momentum:
            if self._momentum is None:
                self._momentum = gradients.clone()  # all devices that train take a first step
            else:
                self._momentum[:active].mul_(spec.momentum).add_(gradients)
            gradients = self._momentum[:active]
        local.add_(gradients, alpha=-spec.lr)
        self._pull_back(local)

    def _pull_back(self, local: Tensor) -> None:
        if self._weight is not None and self._anchor is not None:
            local.lerp_(self._anchor[: len(local)], self._weight[: len(local)])


def _weight_of(params: Tensor, layer: Linear) -> Tensor:
    size = layer.fan_in * layer.fan_out
    flat = params[:, layer.weight : layer.weight + size]
    return flat.view(len(params), layer.fan_out, layer.fan_in)


def _bias_of(params: Tensor, layer: Linear) -> Tensor | None:
    return None if layer.bias < 0 else params[:, layer.bias : layer.bias + layer.fan_out]


def _cross_entropy(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each device's weighted loss [K] and the derivative by the logits [K, B, C]."""
    assert batch.weight is not None
    if batch.mask is not None:
        logits = logits.masked_fill(~batch.mask, float("-inf"))
    # Written out, since torch's log_softmax takes twice as long on rows as short as these.
    y = batch.y.unsqueeze(2)
    logits = logits - logits.amax(2, keepdim=True)
    picked = logits.gather(2, y)
    delta = logits.exp_()
    total = delta.sum(2, keepdim=True)
    picked -= total.log()
    delta.div_(total).scatter_add_(2, y, torch.full_like(picked, -1.0))
    delta.mul_(batch.weight.unsqueeze(2))
    return -(picked.squeeze(2) * batch.weight).sum(1), delta
