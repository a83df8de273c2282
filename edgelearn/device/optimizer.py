"""What becomes of a gradient: the optimizer's step, declared penalties and path integrals.

All of it is in place, on vectors that are set up once a round. A step of a small network is bound
by how often such vectors pass through the processor, so each operation is worth a thought.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from edgelearn.continual.memory import Memory
from edgelearn.continual.path import PathIntegral
from edgelearn.continual.strategy import ClientStrategy, Pull
from edgelearn.scenario.spec import ClientSpec


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


class PathKeeper:
    """The sums of a path integral while a round lasts.

    Args:
        path: What is declared.
        charge: The sum of charges so far [..., T]; it is changed.
        current: The parameters [..., T], which others change.
        lr: Learning rate.
        is_straight: Whether each step is -lr times the gradient that is charged, and nothing else.
    """

    def __init__(
        self, path: PathIntegral, charge: Tensor, current: Tensor, *, lr: float, is_straight: bool
    ) -> None:
        self._path, self._charge, self._lr, self._is_straight = path, charge, lr, is_straight
        self._begun = None if path.moved is None else current.clone()
        self._before = None if is_straight else torch.empty_like(current)
        self._current = current

    def before(self) -> None:
        """Note where a step begins."""
        if self._before is not None:
            self._before.copy_(self._current)

    def after(self, gradients: Tensor) -> None:
        """Add the step that was taken; `gradients` [..., T] are those that are charged for it."""
        if self._before is None:
            self._charge.addcmul_(gradients, gradients, value=self._lr)
        else:
            self._charge.addcmul_(gradients, self._before.sub_(self._current))

    def tensors(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a memory that the path changes, by name."""
        found = {self._path.charge: self._charge}
        if self._path.moved is not None and self._begun is not None:
            # The steps of a round add up to where it ended less where it began.
            found[self._path.moved] = memory[self._path.moved] + (self._current - self._begun)
        return found


class Mover:
    """Moves a device's parameters by what its strategy makes of a gradient, in place.

    Args:
        strategy: The client strategy.
        spec: The optimizer.
        current: The parameters [T], as a round begins; `move` changes them.
        memory: What the device remembers.
        mu: FedProx's mu.
    """

    def __init__(
        self, strategy: ClientStrategy, spec: ClientSpec, current: Tensor, memory: Memory, mu: float
    ) -> None:
        self._strategy, self._current, self._lr, self._mu = strategy, current, spec.lr, mu
        self._reference = current.detach().clone() if mu else current
        self._adjusts = strategy.overrides("adjust")
        self._has_proximal = strategy.overrides("proximal")
        self._keeps_account = strategy.overrides("after_step")
        pull, path = strategy.pull(), strategy.path()
        pull = None if pull is None or not memory[pull.curvature].any() else pull
        self._implicit: tuple[Tensor, Tensor] | None = None
        self._explicit: tuple[Tensor, Tensor] | None = None
        self._left_out: Pull | None = None
        if pull is not None and pull.is_explicit:
            if self._adjusts:
                self._left_out = pull
            else:
                self._explicit = memory[pull.anchor], pull.strength * memory[pull.curvature]
        elif pull is not None and not self._has_proximal:
            self._implicit = memory[pull.anchor], pull.weight(memory, lr=spec.lr)
        self._path: PathKeeper | None = None
        if path is not None and not self._keeps_account:
            is_bent = self._has_proximal or self._implicit is not None or self._explicit is not None
            is_straight = spec.is_plain_sgd and not spec.weight_decay and not is_bent
            self._path = PathKeeper(
                path,
                memory[path.charge].clone(),
                current.detach(),
                lr=spec.lr,
                is_straight=is_straight and self._left_out is None,
            )
        self._wanted = None if self._explicit is None else torch.empty_like(current)
        self._optimizer = make_optimizer(spec, current)

    @property
    def sees_gradient(self) -> bool:
        """Whether the gradient has to be there, not only its effect."""
        is_used = self._adjusts or self._keeps_account
        return is_used or self._explicit is not None or self._path is not None

    def move(self, gradients: Tensor, memory: Memory) -> Memory:
        """Take the step; return the memory after it."""
        if self._adjusts:
            gradients = self._strategy.adjust(gradients, self._current, memory)
        if self._mu:
            gradients = gradients + self._mu * (self._current - self._reference)
        if self._path is not None:
            return self._along(self._path, gradients, memory)
        gradients = self._with_pull(gradients)
        before = self._current.detach().clone() if self._keeps_account else self._current
        self._optimizer.step(gradients)
        self.pull_back(memory)
        if not self._keeps_account:
            return memory
        after = self._current.detach().clone()  # memory may keep it
        return self._strategy.after_step(before, after, gradients, memory)

    def pull_back(self, memory: Memory) -> None:
        """Take the implicit step."""
        if self._implicit is not None:
            self._current.lerp_(*self._implicit)
        elif self._has_proximal:
            self._current.copy_(self._strategy.proximal(self._current, memory, lr=self._lr))

    def kept(self, memory: Memory) -> Memory:
        """Return the memory with the path of the round in it."""
        return memory if self._path is None else memory.replace(**self._path.tensors(memory))

    def _along(self, path: PathKeeper, gradients: Tensor, memory: Memory) -> Memory:
        """Take the step and add it to the path."""
        charged = gradients
        if self._left_out is not None:
            charged = gradients - self._left_out.gradient(self._current, memory)
        path.before()
        self._optimizer.step(self._with_pull(gradients))
        self.pull_back(memory)
        path.after(charged)
        return memory

    def _with_pull(self, gradients: Tensor) -> Tensor:
        """Return the gradient with that of an explicit penalty [T]."""
        if self._explicit is None or self._wanted is None:
            return gradients
        anchor, stiffness = self._explicit
        torch.sub(self._current, anchor, out=self._wanted)
        return self._wanted.mul_(stiffness).add_(gradients)
