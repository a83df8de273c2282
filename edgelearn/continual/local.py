"""What passes between a device and its client strategy around local training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edgelearn.continual.memory import Memory
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import ClientSpec


@dataclass(frozen=True, slots=True)
class LocalTask:
    """One device's local training in one round: what a strategy gets that replaces it whole.

    Attributes:
        model: The network.
        params: Parameters to begin with [P]; not to be changed.
        memory: What the device remembers.
        samples: Its samples of the current experience, at least one.
        spec: Epochs, batch size, optimizer, learning rate.
        seed: Of all that is drawn.
        proximal_mu: FedProx's mu.
    """

    model: FlatModel
    params: Tensor
    memory: Memory
    samples: Samples
    spec: ClientSpec
    seed: int
    proximal_mu: float = 0.0


@dataclass(frozen=True, slots=True)
class Trained:
    """The outcome of local training.

    Attributes:
        params: Local parameters [P].
        memory: The strategy's memory.
        loss: Mean over steps; 0 without any.
        num_steps: Steps taken.
        num_samples: Samples that passed through them, replayed ones included.
    """

    params: Tensor
    memory: Memory
    loss: float
    num_steps: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A device's way through one round, seen at its end.

    Attributes:
        model: The network.
        given: Global parameters that the device got [P].
        local: Parameters after local training [P].
        samples: Its samples of the current experience; may be empty.
        num_steps: Steps taken.
        lr: Learning rate of these steps.
        cohort: Devices that take part in a round.
        num_devices: Devices in the fleet.
    """

    model: FlatModel
    given: Tensor
    local: Tensor
    samples: Samples
    num_steps: int
    lr: float
    cohort: int = 1
    num_devices: int = 1
