"""What a device keeps between rounds, what it has of its stream, and what comes of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import Update
from edgelearn.scenario.samples import Samples, SampleStore
from edgelearn.scenario.stream import Experience

# Names in the memory of a device that finds boundaries by itself: the detector's state, and the
# parameters that it had when it last took part, after training.
DETECTOR, FORMER = "boundary-detector", "boundary-former"

# What a codec with error feedback has not sent so far [P].
RESIDUAL = "wire-residual"

# The network of a device that keeps one of its own.
OWN = "own-network"


@dataclass(frozen=True, slots=True)
class DeviceState:
    """All that a device keeps between rounds.

    Attributes:
        memory: What the client strategy remembers.
        begun: Experiences that the device has begun; the current one has position begun - 1.
        consolidated: Experiences that it has consolidated, at most `begun` (a device that was away
            consolidates what it missed without having begun it: then both move on together). Where
            it finds boundaries by itself, the position at which it found the last one.
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

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:
        """Return its training samples at that position, or those that a round of it brings."""


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
