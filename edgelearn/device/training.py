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
from typing import Protocol

import torch
from torch import Tensor, nn

from edgelearn.continual.local import LocalTask, Trained
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
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
        strategy, model, spec = self.strategy, self.model, self.spec
        reference = params[: model.layout.num_trained]
        after = _AfterGradient.of(strategy, spec, memory, mu, reference)
        has_own_gradient = strategy.overrides("gradient")
        local = params.clone()
        beside = model.carry_copy(params)  # apart from `local`, since a forward pass writes into it
        model.module.train()
        seen = strategy.view(model)
        current = local[: model.layout.num_trained].requires_grad_()
        optimizer = make_optimizer(spec, current)
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
                    memory = after.move(optimizer, current, gradients, memory)
                step.memory = memory
                total += float(loss.detach())
                count, passed = count + 1, passed + len(batch)
                del gradients  # not to be there in the next step's forward pass
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
        after = _AfterGradient.of(self.strategy, spec, memory, mu, reference)
        is_fused = spec.momentum == 0 and not after.sees_gradient
        gradients = torch.empty(0) if is_fused else torch.empty_like(current)
        optimizer = _Sgd(spec, current)
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
                after.pull_back(current, memory)
            else:
                network.gradient(inputs, delta, gradients)
                memory = after.move(optimizer, current, gradients, memory)
                step.memory = memory
            total += float(loss)
            count, passed = count + 1, passed + len(batch)
            del inputs, logits, delta  # not to be there in the next step's forward pass
        return Trained(local, memory, total / count, count, passed)


@dataclass(frozen=True, slots=True)
class _AfterGradient:
    """What a strategy does in a step once there is a gradient.

    Attributes:
        strategy: The client strategy.
        lr: Learning rate.
        adjusts: Whether it changes the gradient.
        has_proximal: Whether it has an implicit step of its own.
        keeps_account: Whether it has to be told of each step.
        implicit: Anchor and weight [T] of a declared implicit pull.
        mu: FedProx's mu.
        reference: Global parameters [T].
    """

    strategy: ClientStrategy
    lr: float
    adjusts: bool
    has_proximal: bool
    keeps_account: bool
    implicit: tuple[Tensor, Tensor] | None
    mu: float
    reference: Tensor

    @classmethod
    def of(
        cls,
        strategy: ClientStrategy,
        spec: ClientSpec,
        memory: Memory,
        mu: float,
        reference: Tensor,
    ) -> _AfterGradient:
        pull = strategy.pull()
        adjusts = strategy.overrides("adjust") or (pull is not None and pull.is_explicit)
        has_proximal = strategy.overrides("proximal")
        implicit = None
        if pull is not None and not pull.is_explicit and not has_proximal:
            implicit = memory[pull.anchor], pull.weight(memory, lr=spec.lr)
        keeps_account = strategy.overrides("after_step")
        hooks = adjusts, has_proximal, keeps_account
        return cls(strategy, spec.lr, *hooks, implicit, mu, reference)

    @property
    def sees_gradient(self) -> bool:
        """Whether the gradient has to be there, not only its effect."""
        return self.adjusts or self.keeps_account

    def move(
        self, optimizer: Optimizer, current: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        """Take the step in place; return the memory after it."""
        if self.adjusts:
            gradients = self.strategy.adjust(gradients, current, memory)
        if self.mu:
            gradients = gradients + self.mu * (current - self.reference)
        before = current.detach().clone() if self.keeps_account else current
        optimizer.step(gradients)
        self.pull_back(current, memory)
        if not self.keeps_account:
            return memory
        after = current.detach().clone()  # memory may keep it
        return self.strategy.after_step(before, after, gradients, memory)

    def pull_back(self, current: Tensor, memory: Memory) -> None:
        """Take the implicit step in place."""
        if self.implicit is not None:
            current.lerp_(*self.implicit)
        elif self.has_proximal:
            current.copy_(self.strategy.proximal(current, memory, lr=self.lr))


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


class Optimizer(Protocol):
    """Changes parameters in place."""

    def step(self, gradients: Tensor) -> None:
        """Take a step."""


class _Sgd:
    """SGD on one flat vector, with the arithmetic of `torch.optim.SGD`."""

    def __init__(self, spec: ClientSpec, params: Tensor) -> None:
        self._spec, self._params = spec, params
        self._momentum: Tensor | None = None

    def step(self, gradients: Tensor) -> None:
        spec = self._spec
        if spec.weight_decay:
            gradients = gradients.add(self._params, alpha=spec.weight_decay)
        if spec.momentum:
            if self._momentum is None:
                self._momentum = gradients.clone()
            else:
                self._momentum.mul_(spec.momentum).add_(gradients)
            gradients = self._momentum
        self._params.add_(gradients, alpha=-spec.lr)


class _Torch:
    """An optimizer of torch's."""

    def __init__(self, spec: ClientSpec, params: Tensor) -> None:
        kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
        self._optimizer = kind([params], lr=spec.lr, weight_decay=spec.weight_decay)
        self._params = params

    def step(self, gradients: Tensor) -> None:
        self._params.grad = gradients
        self._optimizer.step()
        self._params.grad = None


def make_optimizer(spec: ClientSpec, params: Tensor) -> Optimizer:
    """Return an optimizer that works element by element, on a vector or a stack of vectors."""
    return _Sgd(spec, params) if spec.optimizer == "sgd" else _Torch(spec, params)


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
