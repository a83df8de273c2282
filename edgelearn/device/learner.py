"""How a device learns: local training with a client strategy, and consolidation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from edgelearn.compress.codec import Codec, decoded, encoded
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec, passing
from edgelearn.continual.strategy import ClientStrategy, Facts, Update
from edgelearn.device import frugal, runtimes
from edgelearn.device.course import Course
from edgelearn.device.drift import Detector
from edgelearn.device.state import DETECTOR, FORMER, OWN, RESIDUAL, DeviceData, DeviceState, Fit
from edgelearn.device.training import Training
from edgelearn.errors import DivergenceError, Fault, ScenarioError, StateError, StrategyError
from edgelearn.params import FlatModel, Layout
from edgelearn.scenario.samples import EMPTY, Samples, SampleStore
from edgelearn.scenario.spec import ClientSpec
from edgelearn.seeds import derive, split, torch_generator


@dataclass(frozen=True, slots=True)
class Learner:
    """Trains one device after another; holds nothing of any of them.

    Global parameters [P] are what travels, laid out by `layout`: the network with what the strategy
    shares, or that alone where a device keeps its network. Hooks see the network in any case.

    Attributes:
        model: The network.
        strategy: The client strategy.
        spec: Epochs, batch size, optimizer.
        facts: What the strategy may know before data arrives.
        seed: The run's seed.
        detector: Finds the boundaries of experiences; None if devices are told of them.
        codec: Makes updates smaller; None if they are sent as they are.
        num_ranges: Activation ranges that a device keeps for the model that it serves.
        layout: Layout of what travels.
    """

    model: FlatModel
    strategy: ClientStrategy
    spec: ClientSpec
    facts: Facts
    seed: int
    detector: Detector | None = None
    codec: Codec | None = None
    num_ranges: int = 0
    declaration: Declaration = field(init=False)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        if self.strategy.needs_plain_sgd and not self.spec.is_plain_sgd:
            message = (
                f"{type(self.strategy).__name__} reads a device's mean gradient off its way, or "
                "has no room for an optimizer's state, so it needs sgd with momentum 0; got "
                f"{self.spec.optimizer} with momentum {self.spec.momentum:g}"
            )
            raise ScenarioError("client", [Fault("client", "optimizer", message)])
        if self.spec.steps and self.strategy.overrides("fit"):
            what = f"{self.spec.strategy!r} trains by itself"
            fault = Fault("client", "steps", f"{what} and counts its own steps; leave it at 0")
            raise ScenarioError("client", [fault])
        if self.spec.saves_memory and (
            found := list(frugal.faults(self.model, self.strategy, self.spec))
        ):
            raise ScenarioError("client", found)
        shared = self.strategy.shares(self.model, self.facts)
        if shared:
            shapes = {name: spec.shape for name, spec in shared.items()}
            object.__setattr__(self, "model", FlatModel(self.model.module, shapes))
        layout = self.model.layout
        if self.strategy.keeps_network:
            if not shared:
                what = f"{self.spec.strategy!r} keeps the network and shares nothing beside it"
                fault = Fault("client", "strategy", f"{what}: there is nothing to send")
                raise ScenarioError("client", [fault])
            layout = layout.beside
        object.__setattr__(self, "layout", layout)
        declaration = dict(self.strategy.declare(self.model, self.facts))
        if self.detector is not None:
            declaration[DETECTOR] = TensorSpec((self.detector.size,), torch.float64)
            declaration[FORMER] = TensorSpec((self.model.layout.size,))
        if self.codec is not None and self.codec.keeps_residual:
            declaration[RESIDUAL] = TensorSpec((self.layout.size,))
        if self.strategy.keeps_network:
            declaration[OWN] = TensorSpec((self.model.layout.num_network,))
        declaration |= runtimes.declaration(self.num_ranges)
        object.__setattr__(self, "declaration", declaration)

    @property
    def _course(self) -> Course:
        """How devices get from one experience to the next."""
        return Course(self.model, self.strategy, self.seed, self.declaration, self.detector)

    @property
    def needs_public(self) -> bool:
        """Whether the strategy has the public samples on the device."""
        return any(isinstance(s, SampleSpec) and s.is_public for s in self.declaration.values())

    @property
    def serves_own(self) -> bool:
        """Whether a device answers with parameters of its own, not the global ones."""
        return self.strategy.keeps_network or self.strategy.overrides("serve")

    def initial(self) -> Tensor:
        """Return the global parameters [P] before the first round."""
        if self.strategy.keeps_network:
            return torch.zeros(self.layout.size)
        return self.model.initial()

    def initial_state(
        self, store: SampleStore | None = None, public: Tensor | None = None
    ) -> DeviceState:
        """Return the state of a device that has learned nothing yet.

        Args:
            store: Where its sample ids lead.
            public: Ids of the public samples there [n], int32.
        """
        memory = Memory.initial(self.declaration, store)
        if public is not None:
            kept = {
                name: public.clone()
                for name, spec in self.declaration.items()
                if isinstance(spec, SampleSpec) and spec.is_public
            }
            memory = memory.replace(**kept)
        if self.strategy.keeps_network:
            own = self.model.initial()[: self.model.layout.num_network]
            memory = memory.replace(**{OWN: own})
        self._course.check(memory)
        return DeviceState(memory)

    @property
    def memory_bytes(self) -> int:
        """Bytes that a real device needs for what the strategy remembers."""
        return sum(s.device_bytes(self.facts.sample_bytes) for s in self.declaration.values())

    @property
    def holds_parameters(self) -> bool:
        """Whether anybody may still have the local parameters once an update is made of them."""
        return self.detector is not None or any(map(self.strategy.overrides, ("fit", "leave")))

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
        samples = data.samples(position, server_round=server_round)
        entered = params = self.whole(state, params)
        state, num_alarms = self._course.reach(state, params, data, samples, position)
        memory = state.memory
        if self.strategy.overrides("enter"):
            entered, memory = self.strategy.enter(self.model, params, memory)
            self._course.check(memory)
        trained = Training(self.model, self.strategy, self.spec).run(
            entered,
            memory,
            samples,
            seed=steps_seed(self.seed, server_round, data.device),
            proximal_mu=proximal_mu + self.strategy.proximity(),
        )
        local, memory, loss = trained.params, trained.memory, trained.loss
        if math.isfinite(loss) and self.strategy.overrides("leave"):
            self._course.bind(local)
            passage = Passage(
                model=self.model,
                given=params,
                local=local,
                samples=samples,
                num_steps=trained.num_steps,
                lr=self.spec.lr,
                cohort=self.facts.cohort,
                num_devices=self.facts.num_devices,
            )
            local, memory = self.strategy.leave(passage, memory)
        delta = self._delta(local, params)
        if not math.isfinite(loss) or not _is_finite(delta):
            refuse_divergence(data.device, server_round, loss)
        if self.detector is not None:
            memory = memory.replace(**{FORMER: local.clone()})
            memory, more = self._course.watch(self.detector, memory, local, samples)
            num_alarms += more
        self._course.check(memory)
        num_samples = trained.num_samples + self.strategy.num_beside(memory)
        if forgotten := passing(self.declaration):
            memory = memory.replace(**forgotten)
        if self.strategy.keeps_network:  # what lies behind it travels
            num_network = self.model.layout.num_network
            memory = memory.replace(**{OWN: local[:num_network].clone()})
            delta = delta[num_network:]
        new = DeviceState(memory, position + 1, state.consolidated)
        metrics = {"num-examples": len(samples), "loss": loss, "num-steps": trained.num_steps}
        if self.detector is not None:
            metrics["num-alarms"] = num_alarms
        update = Update(self.layout.views(delta), metrics)
        if self.strategy.overrides("upload"):
            update = self._plain(self.strategy.upload(update, samples, memory))
        return Fit(new, update, num_samples)

    def _delta(self, local: Tensor, params: Tensor) -> Tensor:
        """Return local - global [P], in place of `local` where nobody else has a hold of it."""
        return local - params if self.holds_parameters else local.sub_(params)

    def encode(self, fit: Fit, *, server_round: int, device: int) -> Fit:
        """Return what is sent in place of an update that the guard has admitted.

        With error feedback the device's residual joins the update, and what the message leaves out
        is the new residual. An update that counts nothing is not aggregated: the residual stays.

        Args:
            fit: The outcome of training, as `fit` returned it.
            server_round: Round, from 1; part of the seed.
            device: Index of the device; part of the seed.

        Returns:
            The same with a message for an update; as it was if there is no codec.
        """
        if self.codec is None:
            return fit
        layout, memory = self.layout, fit.state.memory
        update = layout.flatten(fit.update.arrays)
        is_fed_back = self.codec.keeps_residual and fit.update.metrics["num-examples"] != 0
        if is_fed_back:
            update = update + memory[RESIDUAL]
        message = encoded(
            self.codec, layout, update, seed=self.seed, server_round=server_round, device=device
        )
        if is_fed_back:
            left_out = update - decoded(self.codec, layout, message)
            memory = memory.replace(**{RESIDUAL: left_out})
        state = replace(fit.state, memory=memory)
        return replace(fit, state=state, update=Update(message, fit.update.metrics))

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
        return self._course.consolidate(state, self.whole(state, params), data, upto)

    def whole(self, state: DeviceState, params: Tensor) -> Tensor:
        """Return the parameters of a device's network with what is shared beside it.

        Args:
            state: The device's state.
            params: Global parameters [P]; they are returned as they are where the network travels.
        """
        if not self.strategy.keeps_network:
            return params
        return torch.cat([state.memory[OWN], params])

    def served(
        self, state: DeviceState, params: Tensor, data: Samples, *, position: int, device: int
    ) -> Tensor:
        """Return the parameters that a device answers with, laid out as those of its network.

        Args:
            state: The device's state.
            params: Global parameters [P].
            data: Its training samples of the current experience.
            position: Where the device is in its stream.
            device: Index of the device.
        """
        params = self.whole(state, params)
        if not self.strategy.overrides("serve"):
            return params
        self._course.bind(params)
        generator = torch_generator(self.seed, "serve", position, device)
        own = self.strategy.serve(self.model, params, state.memory, data, generator)
        if own.shape != params.shape or own.dtype != params.dtype:
            raise StrategyError(
                f"{type(self.strategy).__name__}.serve returned {tuple(own.shape)} {own.dtype}, "
                f"expected {tuple(params.shape)} {params.dtype}"
            )
        return own.detach()

    def held_ids(self, state: DeviceState, samples: Samples) -> Tensor:
        """Return the ids of all samples that the device has at hand: the current and the kept."""
        kept = [
            state.memory[name]
            for name, spec in self.declaration.items()
            if isinstance(spec, SampleSpec)
        ]
        ids = torch.cat([samples.ids, *kept])
        return ids[ids != EMPTY]

    def calibration_ids(self, state: DeviceState, samples: Samples, *, most: int) -> Tensor:
        """Return the ids of the samples that a served model is calibrated on, at most so many.

        They are spread over all that the device has at hand, so that the ranges hold for what it
        remembers and not only for what it sees now.
        """
        held = self.held_ids(state, samples)
        if len(held) <= most:
            return held
        return held[torch.arange(most) * len(held) // most]

    def _plain(self, update: object) -> Update:
        """Read an update once, so that what the guard sees is what is sent."""
        if not isinstance(update, Update):
            raise StrategyError(
                f"{type(self.strategy).__name__}.upload returned {type(update).__name__}, "
                "not an Update"
            )
        return Update(dict(update.arrays), dict(update.metrics))


def _is_finite(values: Tensor) -> bool:
    # A finite sum has finite terms, and costs a quarter; a sum may overflow where no term is inf.
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def refuse_divergence(device: int, server_round: int, loss: float) -> NoReturn:
    """Say that a device's training came to numbers that are not finite.

    Raises:
        DivergenceError: Always.
    """
    raise DivergenceError(
        f"training diverged on device {device} in round {server_round}: loss {loss}"
    )


def steps_seed(seed: int, server_round: int, device: int) -> int:
    """Return the seed of a device's local training in a round; `seeds.split_all` gives many."""
    return split(derive(seed, "steps", server_round), device)
