"""`PathIntegral`: what a strategy may have added up along the way of a device's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edgelearn.continual.memory import Memory


@dataclass(frozen=True, slots=True)
class PathIntegral:
    r"""What each parameter contributed to the fall of the loss, added up along the steps.

    With theta(t) the parameters before step t, and g(t) the gradient that the step was taken by,
    each step adds -g_i(t) (theta_i(t + 1) - theta_i(t)) to the charge of parameter i, and
    theta_i(t + 1) - theta_i(t) to how far it has moved. The gradient is that of the loss, with
    FedProx's term and whatever `ClientStrategy.adjust` makes of it; an explicit `Pull` of the same
    strategy and the optimizer's weight decay are no part of it, though of the step.

    Engines keep the sums beside the memory while a round lasts, in place, and put them into it when
    the round's steps are done: until then the two tensors are as the round found them.

    Attributes:
        charge: Name of the sum of charges in memory [T], float32.
        moved: Name of the sum of steps in memory [T], float32; None if it is not wanted.
    """

    charge: str
    moved: str | None = None

    def along(self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory) -> Memory:
        """Return the memory with one step added; all vectors are [T]."""
        step = after - before
        found = {self.charge: memory[self.charge] - gradients * step}
        if self.moved is not None:
            found[self.moved] = memory[self.moved] + step
        return memory.replace(**found)
