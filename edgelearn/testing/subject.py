"""The strategy under check, the devices that it meets, and the verdicts of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.learner import DeviceState, Fit, Learner
from edgelearn.testing.calls import Call, walk
from edgelearn.testing.toy import ToyDevice, toy_devices, toy_learner


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

    @cached_property
    def devices(self) -> list[ToyDevice]:
        """Three devices with different samples."""
        return toy_devices()

    @cached_property
    def calls(self) -> list[Call]:
        """Every call of a hook in the life of the first device."""
        return walk(self.learner, self.devices[0], self.learner.model.initial())

    def state_after_one(self, device: ToyDevice) -> tuple[DeviceState, Tensor]:
        """Return a device's state after its first experience, and the parameters [P] then."""
        params = self.learner.model.initial()
        fit = self.fit(self.learner.initial_state(device.store), params, device, 0)
        params = params + self.learner.model.layout.flatten(fit.update.arrays)
        return self.learner.consolidate(fit.state, params, device, upto=1), params

    def fit(
        self, state: DeviceState, params: Tensor, device: ToyDevice, position: int, turn: int = 0
    ) -> Fit:
        """Train a device for a round; it may have been away before."""
        server_round = 2 * position + turn + 1
        return self.learner.fit(state, params, device, position=position, server_round=server_round)
