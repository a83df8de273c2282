"""The strategy under check, the devices that it meets, and the verdicts of a check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.learner import Learner
from edgelearn.device.state import DeviceState, Fit
from edgelearn.testing.calls import Call, walk
from edgelearn.testing.toy import NUM_EXPERIENCES, ToyDevice, toy_devices, toy_learner

# Whatever somebody else's code may raise and a check has to report.
ANYTHING = (Exception, SystemExit, GeneratorExit)


class Broken(Exception):  # noqa: N818 - a verdict, not an error
    """The contract is broken; the message says how."""


class Skipped(Exception):  # noqa: N818 - a verdict, not an error
    """Neither kept nor broken; the message says why."""


@dataclass(frozen=True)
class Subject:
    """The strategy under check, and what the checks share.

    Attributes:
        make: Builds the strategy.
        arguments: What it is built with.
    """

    make: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def learner(self) -> Learner:
        """A learner of the toy with the strategy."""
        return self.new_learner()

    def new_learner(self) -> Learner:
        """Build the strategy anew, with a learner of its own."""
        return toy_learner(self.make(**self.arguments))

    @cached_property
    def strategy(self) -> ClientStrategy:
        """The strategy."""
        return self.learner.strategy

    def new_devices(self) -> list[ToyDevice]:
        """Return three devices with different samples, untouched by any strategy."""
        return toy_devices()

    def new_device(self) -> ToyDevice:
        """Return the first of them."""
        return self.new_devices()[0]

    @cached_property
    def calls(self) -> list[Call]:
        """Every call of a hook in the life of one device."""
        return walk(self.learner, self.new_device(), self.learner.model.initial())

    def state_after_one(self, device: ToyDevice) -> tuple[DeviceState, Tensor]:
        """Return a device's state after its first experience, and the parameters [P] then."""
        state, params = self.at_start(device)
        fit = self.fit(state, params, device, 0)
        params = params + self.learner.layout.flatten(fit.update.arrays)
        return self.learner.consolidate(fit.state, params, device, upto=1), params

    def fit(
        self, state: DeviceState, params: Tensor, device: ToyDevice, position: int, turn: int = 0
    ) -> Fit:
        """Train a device for a round; it may have been away before."""
        server_round = 2 * position + turn + 1
        return self.learner.fit(state, params, device, position=position, server_round=server_round)

    def at_start(self, device: ToyDevice) -> tuple[DeviceState, Tensor]:
        """Return the state of a device that has learned nothing yet, and the parameters [P]."""
        return self.learner.initial_state(device.store, device.public), self.learner.initial()

    def odd_devices(self) -> Mapping[str, ToyDevice]:
        """Return devices that have next to nothing, by what they have."""
        device = self.new_device()
        return {
            "no samples": replace(device, ids=tuple(ids[:0] for ids in device.ids)),
            "a single sample": replace(device, ids=tuple(ids[:1] for ids in device.ids)),
        }

    def run(
        self, inspect: Callable[[Fit, DeviceState], None] = lambda _fit, _state: None
    ) -> tuple[Tensor, list[DeviceState]]:
        """Let the devices learn all experiences together; the last one misses the first.

        Args:
            inspect: Called with what each device made of a round.

        Returns:
            The global parameters [P] and the devices' states at the end.
        """
        learner, layout, devices = self.learner, self.learner.layout, self.new_devices()
        params = learner.initial()
        states = [learner.initial_state(device.store, device.public) for device in devices]
        for position in range(NUM_EXPERIENCES):
            present = devices[:-1] if position == 0 else devices
            for turn in range(2):
                deltas = []
                for device in present:
                    fit = self.fit(states[device.device], params, device, position, turn)
                    inspect(fit, fit.state)
                    states[device.device] = fit.state
                    deltas.append(layout.flatten(fit.update.arrays))
                params = params + torch.stack(deltas).mean(0)
            for device in present:
                state = states[device.device]
                states[device.device] = learner.consolidate(
                    state, params, device, upto=position + 1
                )
        return params, states
