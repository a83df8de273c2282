"""Synaptic intelligence: a quadratic pull, by what each parameter did to lower the loss."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.path import PathIntegral
from edgelearn.continual.storage import Storage, check_kind
from edgelearn.continual.strategy import ClientStrategy, Facts, Pull
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples

STEPS = ("proximal", "explicit")


@final
class SI(ClientStrategy):
    r"""Penalize change of parameters in proportion to what they contributed to the loss's fall.

    While a device trains, each parameter's part in the fall of the loss is added up along the path
    of its steps, omega_i = -sum_t g_i(t) (theta_i(t + 1) - theta_i(t)). When the experience has
    ended, it makes the importance of the parameter grow,
    Omega_i <- max(0, Omega_i + omega_i / (Delta_i^2 + xi)), and the penalty
    c sum_i Omega_i (theta_i - anchor_i)^2 holds it to the final **global** parameters.

    In a federation the path is made of the device's own steps, in all rounds of the experience.
    The jump that the server's aggregation makes between two rounds is no part of it: no gradient
    is known along it. So Delta is the displacement along that same path, the sum of the device's
    own steps, not the difference of the global parameters. With a single device that takes part in
    every round, plain averaging makes no jump, and both are what the paper has. A device that took
    part in no round of an experience keeps its Omega, and moves its anchor; one without samples of
    it keeps both.

    The gradient g is that of the task's loss (and, where the server strategy asks for it, of
    FedProx's term); an explicit penalty is taken out of it. The step of a path includes the pull of
    a proximal one. Omega is cut off at zero as in the authors' code, since a path integral with
    noisy gradients may be negative; a penalty must not be.

    References: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence", ICML
    2017, arXiv:1703.04200, equations 3 to 5. We differ: the penalty is taken as a proximal step
    after the optimizer's (as `EWC` does), which can't diverge; "explicit" takes it as a gradient.
    The defaults are those for permuted MNIST.

    Args:
        c: Strength of the penalty, at least 0.
        xi: Damping, above 0.
        step: "proximal" or "explicit".
        storage: How importance and anchor are kept: "float32", "float16" or "int8" (`Storage`).
            The path and the displacement of an experience under way are float32.
    """

    def __init__(
        self,
        *,
        c: float = 0.1,
        xi: float = 0.1,
        step: str = "proximal",
        storage: str = "float32",
    ) -> None:
        if not c >= 0:
            raise ValueError(f"c is {c}; at least 0 is allowed")
        if not xi > 0:
            raise ValueError(f"xi is {xi}; above 0 is allowed")
        if step not in STEPS:
            raise ValueError(f"step is {step!r}; allowed: {', '.join(STEPS)}")
        self.c = c
        self.xi = xi
        self.step = step
        self.storage = check_kind(storage)

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare importance and anchor, and the path of the experience under way."""
        vector = TensorSpec((model.layout.num_trained,))
        return {**self._stored(model).declaration(), "path": vector, "moved": vector}

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; a round begins plainly if nothing is decoded."""
        return super().overrides(hook) and (hook != "enter" or self.storage != "float32")

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode what is stored cheaply."""
        return params, self._stored(model).unpacked(memory)

    def pull(self) -> Pull:
        """Declare the penalty, for every step of training."""
        return Pull("importance", "anchor", 2 * self.c, is_explicit=self.step == "explicit")

    def path(self) -> PathIntegral:
        """Declare the path, so that the training loop keeps it."""
        return PathIntegral("path", "moved")

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,  # noqa: ARG002
    ) -> Memory:
        """Make the importance of parameters grow by the path, and begin another."""
        if len(data) == 0:
            return memory
        stored, zeros = self._stored(model), torch.zeros_like(params)
        gain = memory["path"] / (memory["moved"].square() + self.xi)
        importance = (stored.get(memory, "importance") + gain).clamp(min=0)
        memory = memory.replace(path=zeros, moved=zeros.clone())
        return stored.put(memory, {"importance": importance, "anchor": params.clone()})

    def _stored(self, model: FlatModel) -> Storage:
        size = model.layout.num_trained
        return Storage(self.storage, size, {"importance": True, "anchor": False})
