"""Local training: epochs of steps from the global parameters, by a client strategy.

There are two ways, and the same result. Autograd trains any network with any strategy. A plain
stack of linear layers with a strategy that leaves loss and gradient as they are is trained by the
written-out backward pass, which applies SGD inside the weight product where nobody has to see the
gradient. A strategy that overrides `fit` has a way of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgelearn.continual.local import LocalTask, Trained
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.optimizer import Mover
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples, SampleStore
from edgelearn.scenario.spec import ClientSpec
from edgelearn.seeds import derive, permutation, split
from edgelearn.stack import LinearStack, Stack, cross_entropy, stack_of

_GATHERED = 2**19  # numbers of input that are decoded at once: 2 MiB


@dataclass(frozen=True, slots=True)
class Training:
    """How all devices train.

    Attributes:
        model: The network.
        strategy: The client strategy.
        spec: Epochs, batch size, optimizer.
    """

    model: FlatModel
    strategy: ClientStrategy
    spec: ClientSpec

    def run(
        self,
        params: Tensor,
        memory: Memory,
        samples: Samples,
        *,
        seed: int,
        proximal_mu: float = 0.0,
    ) -> Trained:
        """Train one device.

        Args:
            params: Global parameters [P]; not changed.
            memory: What the device remembers.
            samples: Its samples.
            seed: Of all that is drawn: the order of samples, replay, dropout.
            proximal_mu: FedProx's mu.
        """
        if len(samples) == 0 or self.strategy.is_frozen(memory):
            return Trained(params.clone(), memory, 0.0, 0, 0)
        if self.strategy.overrides("fit"):
            return self._as_the_strategy_does(
                LocalTask(self.model, params, memory, samples, self.spec, seed, proximal_mu)
            )
        steps = self.steps(samples, memory, seed)
        if self.spec.saves_memory:
            return self._in_less_memory(params, memory, steps, seed, proximal_mu)
        stack = self._written_out(samples)
        if stack is None:
            return self._by_autograd(params, memory, steps, seed, proximal_mu)
        return self._by_hand(stack, params, memory, steps, proximal_mu)

    def _as_the_strategy_does(self, task: LocalTask) -> Trained:
        self.model.carry(task.params.clone())
        self.model.module.train()
        with _layers_seeded(derive(task.seed, "layers")), _counters_restored(self.model.module):
            trained = self.strategy.fit(task)
        if not isinstance(trained, Trained) or trained.params.shape != task.params.shape:
            raise StrategyError(
                f"{type(self.strategy).__name__}.fit must return a Trained with parameters "
                f"{tuple(task.params.shape)}"
            )
        return trained

    def _in_less_memory(
        self, params: Tensor, memory: Memory, steps: Iterator[Step], seed: int, mu: float
    ) -> Trained:
        from edgelearn.device import frugal  # it builds upon this module

        with _layers_seeded(derive(seed, "layers")), _counters_restored(self.model.module):
            return frugal.train(self, params, memory, steps, mu)

    def _written_out(self, samples: Samples) -> Stack | None:
        is_own = any(map(self.strategy.overrides, ("view", "gradient", "loss")))
        if is_own or self.spec.optimizer != "sgd":
            return None
        stack = stack_of(self.model, samples.store.sample_shape)
        return stack if stack is not None and stack.is_linear else None

    def steps(self, samples: Samples, memory: Memory, seed: int) -> Iterator[Step]:
        """Yield the batch of each step, joined by what the strategy adds from memory.

        `after_step` may replace the memory, so the caller sends the current one back in `Step`.
        """
        strategy = self.strategy
        extends = strategy.overrides("extend") or strategy.rehearsal() is not None
        generator = torch.Generator().manual_seed(seed) if extends else None
        step = Step(memory)
        for batch in self._present(samples, seed):
            if generator is not None:
                step.batch = strategy.extend(batch, step.memory, generator)
            else:
                step.batch = batch
            yield step

    def _present(self, samples: Samples, seed: int) -> Iterator[Batch]:
        """Yield the device's own batches: of whole epochs, or as many as there are to be steps."""
        spec = self.spec
        epochs = itertools.count() if spec.steps else range(spec.epochs)
        orders = (permutation(split(seed, epoch), len(samples)) for epoch in epochs)
        size = spec.batch_size
        ahead = size if spec.saves_memory else decoded_at_once(samples.store, size)
        batches = (_batches(samples, torch.from_numpy(o), size, ahead) for o in orders)
        return itertools.islice(itertools.chain.from_iterable(batches), spec.steps or None)

    def _by_autograd(
        self, params: Tensor, memory: Memory, steps: Iterator[Step], seed: int, mu: float
    ) -> Trained:
        strategy, model = self.strategy, self.model
        has_own_gradient = strategy.overrides("gradient")
        local = params.clone()
        beside = model.carry_copy(params)  # apart from `local`, since a forward pass writes into it
        model.module.train()
        seen = strategy.view(model)
        current = local[: model.layout.num_trained].requires_grad_()
        with torch.no_grad():
            mover = Mover(strategy, self.spec, current, memory, mu)
        total, count, passed = 0.0, 0, 0
        # Dropout and the like draw from torch's global generator.
        with _layers_seeded(derive(seed, "layers")), _counters_restored(model.module):
            for step in steps:
                batch, memory = step.batch, step.memory
                if has_own_gradient:
                    loss, gradients = strategy.gradient(seen, current.detach(), batch, memory)
                else:
                    loss = strategy.loss(seen, current, batch, memory)
                    (gradients,) = torch.autograd.grad(loss, current)
                with torch.no_grad():
                    memory = mover.move(gradients, memory)
                step.memory = memory
                total += float(loss.detach())
                count, passed = count + 1, passed + len(batch)
                del gradients  # not to be there in the next step's forward pass
        memory = mover.kept(memory)
        local = local.detach()
        model.layout.write(local, beside)
        return Trained(local, memory, total / count, count, passed)

    @torch.no_grad()
    def _by_hand(
        self, stack: Stack, params: Tensor, memory: Memory, steps: Iterator[Step], mu: float
    ) -> Trained:
        spec = self.spec
        local = params.clone()
        current, reference = local[: stack.num_params], params[: stack.num_params]
        network = LinearStack(stack, current)
        mover = Mover(self.strategy, spec, current, memory, mu)
        is_fused = spec.momentum == 0 and not mover.sees_gradient
        gradients = torch.empty(0) if is_fused else torch.empty_like(current)
        total, count, passed = 0.0, 0, 0
        for step in steps:
            batch = step.batch
            inputs, logits = network.forward(batch.x)
            loss, delta = cross_entropy(logits, batch.y, batch.weight, batch.mask)
            if is_fused:
                # theta - lr (g + mu (theta - global) + decay theta), in two sweeps
                network.step(inputs, delta, lr=spec.lr, decay=mu + spec.weight_decay)
                if mu:
                    current.add_(reference, alpha=spec.lr * mu)
                mover.pull_back(memory)
            else:
                network.gradient(inputs, delta, gradients)
                memory = mover.move(gradients, memory)
                step.memory = memory
            total += float(loss)
            count, passed = count + 1, passed + len(batch)
            del inputs, logits, delta  # not to be there in the next step's forward pass
        memory = mover.kept(memory)
        return Trained(local, memory, total / count, count, passed)


class Step:
    """One step's batch, and the memory as it is now."""

    __slots__ = ("batch", "memory")
    batch: Batch
    memory: Memory

    def __init__(self, memory: Memory) -> None:
        self.memory = memory


def decoded_at_once(store: SampleStore, size: int) -> int:
    """Return how many samples are decoded at once where batches have `size` samples."""
    return max(1, _GATHERED // (max(1, math.prod(store.sample_shape)) * size)) * size


def _batches(samples: Samples, order: Tensor, size: int, ahead: int) -> Iterator[Batch]:
    """Yield batches in order; many are decoded at once, since each decoding has fixed costs."""
    for positions in torch.split(order, ahead):
        yield from samples.batch(positions).split(size)


@contextlib.contextmanager
def _counters_restored(module: nn.Module) -> Iterator[None]:
    """Keep whole numbers of a module, such as batch norm's count of batches, from the next device.

    They are not parameters: they are neither sent nor stored.
    """
    counters = [buffer for buffer in module.buffers() if not buffer.is_floating_point()]
    values = [counter.clone() for counter in counters]
    try:
        yield
    finally:
        for counter, value in zip(counters, values, strict=True):
            counter.copy_(value)


@contextlib.contextmanager
def _layers_seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, and restore it; `torch.manual_seed` itself costs 2 ms."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
