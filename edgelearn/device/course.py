"""A device's way through its stream: what begins, what has ended, and how it notices by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from edgelearn.continual.memory import Declaration, Memory, check
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.drift import Detector
from edgelearn.device.state import DETECTOR, FORMER, DeviceData, DeviceState
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stream import Experience
from edgelearn.seeds import torch_generator


@final
@dataclass(frozen=True, slots=True)
class Course:
    """Takes devices from one experience to the next; holds nothing of any of them.

    Attributes:
        model: The network.
        strategy: The client strategy.
        seed: The run's seed.
        declaration: What a device remembers.
        detector: Finds the boundaries of experiences; None if devices are told of them.
    """

    model: FlatModel
    strategy: ClientStrategy
    seed: int
    declaration: Declaration
    detector: Detector | None

    def consolidate(
        self, state: DeviceState, params: Tensor, data: DeviceData, upto: int
    ) -> DeviceState:
        """Consolidate every experience before position `upto` that has not been yet.

        Args:
            state: The device's state.
            params: Parameters [P] of its network, with what is shared beside it.
            data: What the device has.
            upto: First position that is not to be consolidated.
        """
        if state.consolidated >= upto:
            return state
        memory, trained = state.memory, self.bind(params)
        for position in range(state.consolidated, upto):
            if state.begun <= position:
                experience = data.experience(position)
                memory = self.strategy.start(self.model, trained, memory, experience)
                self.check(memory)
            generator = torch_generator(self.seed, "finish", position, data.device)
            memory = self.strategy.finish(
                self.model, trained, data.samples(position), memory, generator
            )
            self.check(memory)
        return replace(state, memory=memory, begun=max(state.begun, upto), consolidated=upto)

    def reach(
        self,
        state: DeviceState,
        params: Tensor,
        data: DeviceData,
        samples: Samples,
        position: int,
    ) -> tuple[DeviceState, int]:
        """Consolidate what has ended before a position, and begin what begins there.

        Returns:
            The state, and how many alarms there were where boundaries are not told.
        """
        former, num_alarms = state.consolidated, 0
        if self.detector is None:
            state = self.consolidate(state, params, data, position)
            begins = state.begun <= position
        else:
            found = self._look_out(self.detector, state, params, data, samples, position)
            state, num_alarms = found
            begins = state.begun == 0 or state.consolidated > former
        if not begins:
            return state, num_alarms
        if self.detector is None:
            experience = data.experience(position)
        else:  # what it is, a device sees by its samples
            at_hand = tuple(sorted(set(samples.labels.tolist())))
            experience = Experience(position, position, at_hand)
        start = self.bind(params)
        memory = self.strategy.start(self.model, start, state.memory, experience)
        self.check(memory)
        return replace(state, memory=memory), num_alarms

    def _look_out(
        self,
        detector: Detector,
        state: DeviceState,
        params: Tensor,
        data: DeviceData,
        samples: Samples,
        position: int,
    ) -> tuple[DeviceState, int]:
        """Look for a change in the device's errors; consolidate what has ended with it.

        The errors are those of the model that the device itself trained when it last took part, on
        the samples at hand (the global model of now may have learned these from others), after the
        errors of the same model on the samples that it was trained on. What has come since the last
        boundary, up to this position, is then one experience that has ended; it is consolidated on
        the global parameters that the device gets now.

        Returns:
            The state, and how many alarms there were.
        """
        answering = state.memory[FORMER] if state.begun else params
        memory, num_alarms = self.watch(detector, state.memory, answering, samples)
        since = state.consolidated
        if not num_alarms or since >= position:
            return replace(state, memory=memory), num_alarms
        ids = torch.cat([data.samples(p).ids for p in range(since, position)])
        generator = torch_generator(self.seed, "finish", position - 1, data.device)
        trained, ended = self.bind(params), Samples(samples.store, ids)
        memory = self.strategy.finish(self.model, trained, ended, memory, generator)
        self.check(memory)
        return replace(state, memory=memory, consolidated=position), num_alarms

    def watch(
        self, detector: Detector, memory: Memory, params: Tensor, samples: Samples
    ) -> tuple[Memory, int]:
        """Show a detector the errors of parameters [P] on samples; return its alarms, too."""
        if len(samples) == 0:
            return memory, 0
        batch, trained = samples.batch(), self.bind(params)
        with torch.no_grad():
            logits = self.model(trained, batch.x)
        if batch.mask is not None:
            logits = logits.masked_fill(~batch.mask, float("-inf"))
        errors = (logits.argmax(1) != batch.y).numpy().astype(np.float64)
        noticed, alarms = detector.update(memory[DETECTOR].numpy(), errors)
        return memory.replace(**{DETECTOR: torch.from_numpy(noticed)}), len(alarms)

    def bind(self, params: Tensor) -> Tensor:
        """Make the model ready for a hook, whatever it did last; return the trained part [T].

        What a forward pass reads beside the trained part (batch-norm statistics) must be this
        device's own, not that of whichever device this process trained before.
        """
        layout = self.model.layout
        self.model.carry_copy(params)
        self.model.module.eval()
        return params[: layout.num_trained]

    def check(self, memory: object) -> None:
        """Check that a hook returned the memory that the strategy declares.

        Raises:
            StrategyError: If it is anything else.
        """
        if not isinstance(memory, Memory):
            raise StrategyError(
                f"{type(self.strategy).__name__} returned {type(memory).__name__} where its "
                "memory was expected; end the hook with `return memory.replace(...)`"
            )
        check(memory, self.declaration)
