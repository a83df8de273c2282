"""How a device learns: local training with a client strategy, and consolidation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from edgelearn.continual.memory import Declaration, Memory, SampleSpec, check
from edgelearn.continual.strategy import ClientStrategy, Facts, Update, make_strategy
from edgelearn.errors import DivergenceError, StateError, StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Samples, SampleStore
from edgelearn.scenario.spec import ClientSpec
from edgelearn.scenario.stream import Experience
from edgelearn.scenario.world import World
from edgelearn.seeds import derive, torch_generator


@dataclass(frozen=True, slots=True)
class DeviceState:
    """All that a device keeps between rounds.

    Attributes:
        memory: What the client strategy remembers.
        begun: Experiences that the device has begun; the current one has position begun - 1.
        consolidated: Experiences that it has consolidated, at most `begun` (a device that was away
            consolidates what it missed without having begun it: then both move on together).
    """

    memory: Memory
    begun: int = 0
    consolidated: int = 0


class DeviceData(Protocol):
    """What a device has of its stream."""

    @property
    def device(self) -> int:
        """Index of the device in the fleet."""

    @property
    def store(self) -> SampleStore:
        """The store that its sample ids lead to."""

    def experience(self, position: int) -> Experience:
        """Return the experience at a position of its stream."""

    def samples(self, position: int) -> Samples:
        """Return its training samples of that experience."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The outcome of local training.

    Attributes:
        state: The device's new state.
        update: What is to be sent: local - global by tensor name, and scalar metrics.
        num_samples: Samples that passed through training, for the accounts.
    """

    state: DeviceState
    update: Update
    num_samples: int


@dataclass(frozen=True, slots=True)
class Learner:
    """Trains one device after another; holds nothing of any of them.

    Attributes:
        model: The network.
        strategy: The client strategy.
        spec: Epochs, batch size, optimizer.
        facts: What the strategy may know before data arrives.
        seed: The run's seed.
    """

    model: FlatModel
    strategy: ClientStrategy
    spec: ClientSpec
    facts: Facts
    seed: int
    declaration: Declaration = field(init=False)

    def __post_init__(self) -> None:
        declaration = dict(self.strategy.declare(self.model, self.facts))
        object.__setattr__(self, "declaration", declaration)

    def initial_state(self, store: SampleStore | None = None) -> DeviceState:
        """Return the state of a device that has learned nothing yet."""
        return DeviceState(Memory.initial(self.declaration, store))

    @property
    def memory_bytes(self) -> int:
        """Bytes that a real device needs for what the strategy remembers."""
        return sum(s.device_bytes(self.facts.sample_bytes) for s in self.declaration.values())

    def fit(
        self,
        state: DeviceState,
        params: Tensor,
        data: DeviceData,
        *,
        position: int,
        server_round: int,
        proximal_mu: float = 0.0,
    ) -> Fit:
        """Train on the current experience, starting from the global parameters.

        Args:
            state: The device's state; experiences that it has missed are consolidated first.
            params: Global parameters [P]; not changed.
            data: What the device has.
            position: Where the device is in its stream.
            server_round: Round, from 1; part of the seeds.
            proximal_mu: FedProx: adds mu (theta - global) to the gradient (Li et al. 2020,
                arXiv:1812.06127, equation 2).

        Raises:
            DivergenceError: If the loss or a parameter is not finite.
            StrategyError: If the strategy's memory is not what it declared.
        """
        if position + 1 < state.begun:
            raise StateError(
                f"device {data.device} has begun {state.begun} experiences but was asked for "
                f"position {position}: its state belongs to another run"
            )
        state = self.consolidate(state, params, data, upto=position)
        memory = state.memory
        if state.begun <= position:
            trained = self._bind(params)
            memory = self.strategy.start(self.model, trained, memory, data.experience(position))
            self._check(memory)
        samples = data.samples(position)
        generator = torch_generator(self.seed, "steps", server_round, data.device)
        local, memory, loss, steps, passed = self._train(
            params, memory, samples, generator, proximal_mu=proximal_mu
        )
        where = f"device {data.device} in round {server_round}"
        if not math.isfinite(loss) or not bool(torch.isfinite(local).all()):
            raise DivergenceError(f"training diverged on {where}: loss {loss}")
        self._check(memory)
        new = DeviceState(memory, position + 1, state.consolidated)
        metrics = {"num-examples": len(samples), "loss": loss, "num-steps": steps}
        delta = local - params
        update = Update(self.model.layout.views(delta), metrics)
        if self.strategy.overrides("upload"):
            update = self._plain(self.strategy.upload(update, samples, memory))
        return Fit(new, update, passed)

    def consolidate(
        self, state: DeviceState, params: Tensor, data: DeviceData, *, upto: int
    ) -> DeviceState:
        """Consolidate every experience before position `upto` that has not been yet.

        Args:
            state: The device's state.
            params: Global parameters [P] at the end of the experience; where the device was away
                then, those that it gets now.
            data: What the device has.
            upto: First position that is not to be consolidated.
        """
        if state.consolidated >= upto:
            return state
        memory, trained = state.memory, self._bind(params)
        for position in range(state.consolidated, upto):
            if state.begun <= position:
                experience = data.experience(position)
                memory = self.strategy.start(self.model, trained, memory, experience)
                self._check(memory)
            generator = torch_generator(self.seed, "finish", position, data.device)
            memory = self.strategy.finish(
                self.model, trained, data.samples(position), memory, generator
            )
            self._check(memory)
        return replace(state, memory=memory, begun=max(state.begun, upto), consolidated=upto)

    def held_ids(self, state: DeviceState, samples: Samples) -> Tensor:
        """Return the ids of all samples that the device has at hand: the current and the kept."""
        kept = [
            state.memory[name]
            for name, spec in self.declaration.items()
            if isinstance(spec, SampleSpec)
        ]
        ids = torch.cat([samples.ids, *kept])
        return ids[ids != EMPTY]

    def _bind(self, params: Tensor) -> Tensor:
        """Make the model ready for a hook, whatever it did last; return the trained part [T].

        What a forward pass reads beside the trained part (batch-norm statistics) must be this
        device's own, not that of whichever device this process trained before.
        """
        layout = self.model.layout
        if layout.size != layout.num_trained:
            self.model.carry(params.clone())
        self.model.module.eval()
        return params[: layout.num_trained]

    def _check(self, memory: object) -> None:
        if not isinstance(memory, Memory):
            raise StrategyError(
                f"{type(self.strategy).__name__} returned {type(memory).__name__} where its "
                "memory was expected; end the hook with `return memory.replace(...)`"
            )
        check(memory, self.declaration)

    def _plain(self, update: object) -> Update:
        """Read an update once, so that what the guard sees is what is sent."""
        if not isinstance(update, Update):
            raise StrategyError(
                f"{type(self.strategy).__name__}.upload returned {type(update).__name__}, "
                "not an Update"
            )
        return Update(dict(update.arrays), dict(update.metrics))

    def _train(
        self,
        params: Tensor,
        memory: Memory,
        samples: Samples,
        generator: torch.Generator,
        *,
        proximal_mu: float,
    ) -> tuple[Tensor, Memory, float, int, int]:
        strategy, model, spec = self.strategy, self.model, self.spec
        extends, adjusts = strategy.overrides("extend"), strategy.overrides("adjust")
        proximal, after_step = strategy.overrides("proximal"), strategy.overrides("after_step")
        local, carried = params.clone(), params.clone()
        model.carry(carried)  # apart from `local`, since a forward pass writes into it
        model.module.train()
        current = local[: model.layout.num_trained].requires_grad_()
        reference = params[: model.layout.num_trained]
        optimizer = _optimizer(spec, current)
        total, steps, passed = 0.0, 0, 0
        # Dropout and the like draw from torch's global generator.
        layers = derive(generator.initial_seed(), "layers")
        with _layers_seeded(layers), _counters_restored(model.module):
            for _ in range(spec.epochs):
                order = torch.randperm(len(samples), generator=generator)
                for positions in torch.split(order, spec.batch_size):
                    if len(positions) == 0:
                        continue
                    batch = samples.batch(positions)
                    if extends:
                        batch = strategy.extend(batch, memory, generator)
                    loss = strategy.loss(model, current, batch, memory)
                    (gradients,) = torch.autograd.grad(loss, current)
                    with torch.no_grad():
                        if adjusts:
                            gradients = strategy.adjust(gradients, current, memory)
                        if proximal_mu:
                            gradients = gradients + proximal_mu * (current - reference)
                        before = current.detach().clone() if after_step else current
                        if optimizer is None:
                            current.add_(gradients, alpha=-spec.lr)
                        else:
                            current.grad = gradients
                            optimizer.step()
                        if proximal:
                            current.copy_(strategy.proximal(current, memory, lr=spec.lr))
                        if after_step:
                            after = current.detach().clone()  # memory may keep it
                            memory = strategy.after_step(before, after, gradients, memory)
                    total += float(loss.detach())
                    steps, passed = steps + 1, passed + len(batch)
        local[model.layout.num_trained :] = carried[model.layout.num_trained :]
        return local.detach(), memory, total / steps if steps else 0.0, steps, passed


def make_learner(world: World) -> Learner:
    """Build the learner of a scenario: network, client strategy and what they may know."""
    spec = world.scenario.client
    return Learner(
        model=world.model(),
        strategy=make_strategy(spec.strategy, spec.args),
        spec=spec,
        facts=Facts(world.stream.num_experiences, world.num_classes, world.train.sample_bytes),
        seed=world.scenario.seed,
    )


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


def _optimizer(spec: ClientSpec, params: Tensor) -> torch.optim.Optimizer | None:
    """Return torch's optimizer, or None for plain SGD, which is one fused operation."""
    if spec.optimizer == "sgd":
        if spec.momentum == 0 and spec.weight_decay == 0:
            return None
        return torch.optim.SGD(
            [params], lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
    return kind([params], lr=spec.lr, weight_decay=spec.weight_decay)
