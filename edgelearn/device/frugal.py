"""Training steps in less memory: a part of the parameters, batches in parts, activations twice.

The parameters that take steps are leaves of the graph, tensor by tensor, and share their memory
with the device's vector. The others enter the graph without a history: no gradient is computed for
them, and below the first chosen layer nothing is kept.

- `train`: which ones (`device.chosen`);
- `accumulate`: a batch passes in N parts, whose gradients are added up;
- `checkpoint`: of each block only its input is kept, and the rest is computed again when it is
  needed (Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
  arXiv:1604.06174). Gradients have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from edgelearn.continual.local import Trained
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.blocks import blocks_of, checkpointed
from edgelearn.device.chosen import chosen, mixes_samples, settle
from edgelearn.device.optimizer import Optimizer, make_optimizer
from edgelearn.device.training import Step, Training
from edgelearn.errors import Fault
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch
from edgelearn.scenario.spec import ALL, ClientSpec


def faults(model: FlatModel, strategy: ClientStrategy, spec: ClientSpec) -> Iterator[Fault]:
    """Say what keeps a scenario from the options that save memory."""
    wanted = {
        "train": spec.train != ALL,
        "accumulate": spec.accumulate > 1,
        "checkpoint": spec.checkpoint,
    }
    keys = [key for key, is_wanted in wanted.items() if is_wanted]
    own = {"fit": "trains by itself", "gradient": "takes the gradient by itself"}
    for hook, does in own.items():
        if strategy.overrides(hook):
            message = f"{spec.strategy!r} {does}, so no step can be taken in less memory"
            yield from (Fault("client", key, message) for key in keys)
            return
    try:
        names = chosen(model, spec.train)
    except ValueError as error:
        yield Fault("client", "train", str(error))
        return
    if spec.accumulate > 1:
        if strategy.overrides("loss"):
            message = f"{spec.strategy!r} has a loss of its own, which may need a batch whole"
            yield Fault("client", "accumulate", message)
        if mixes_samples(model, names, is_all=spec.train == ALL):
            message = "batch norm takes its statistics from a batch, and those of its parts differ"
            yield Fault("client", "accumulate", message)
    if spec.checkpoint and not blocks_of(model.module):
        message = "the network has no nn.Sequential of at least two blocks to compute again"
        yield Fault("client", "checkpoint", message)


class Frugal(FlatModel):
    """A network of whose parameters some have a gradient; shares everything with the network.

    Args:
        model: The network.
        names: The parameters that have.
        checkpoints: Whether blocks are computed again in the backward pass.
    """

    def __init__(self, model: FlatModel, names: Sequence[str], *, checkpoints: bool) -> None:
        self.__dict__.update(model.__dict__)
        self._names = frozenset(names)
        self._blocks = blocks_of(model.module) if checkpoints else []
        self._current: Tensor | None = None
        self._whole: Tensor | None = None
        self._leaves: Mapping[str, Tensor] = {}

    def whole(self, current: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return parameters [T] that are a function of the leaves, for a loss to look at.

        A forward pass with them goes to the leaves directly.

        Args:
            current: All values [T], without a history.
            leaves: Parameters that have a gradient, by name; they share the memory of `current`.
        """
        places = [self.layout.places[name] for name in leaves]
        whole: Tensor = _Whole.apply(current, places, *leaves.values())
        self._current, self._leaves, self._whole = current, leaves, whole
        return whole

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Evaluate the module; what is not chosen enters the graph without a history."""
        if params is self._whole and self._current is not None:
            tensors = {**self.layout.views(self._current), **self._leaves}
        else:  # former parameters, or some that were made from the current ones
            tensors = {
                name: view if name in self._names else view.detach()
                for name, view in self.layout.views(params).items()
            }
        with self.bound(tensors), checkpointed(self._blocks, lambda: self.bound(tensors)):
            out: Tensor = self.module(x)
        return out


class _Whole(torch.autograd.Function):
    """current [T] as a function of the tensors that lie in it."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, places: Sequence[slice], *leaves: Tensor) -> Tensor:
        ctx.places, ctx.shapes = places, [leaf.shape for leaf in leaves]
        return current.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(ctx.places, ctx.shapes, strict=True)
        return None, None, *(gradient[place].view(shape) for place, shape in parts)


def train(
    training: Training, params: Tensor, memory: Memory, steps: Iterator[Step], mu: float
) -> Trained:
    """Train one device; see `Training.run`."""
    model, strategy, spec = training.model, training.strategy, training.spec
    layout = model.layout
    names = chosen(model, spec.train)
    local = params.clone()
    beside = model.carry_copy(params)
    model.module.train()
    if spec.train != ALL:
        settle(model, names)
    frugal = Frugal(model, names, checkpoints=spec.checkpoint)
    seen = strategy.view(frugal)
    current = local[: layout.num_trained]
    views = layout.views(current)
    # `data`, since a tensor may move while derivatives are still taken by the next one below.
    leaves = {name: views[name].data.requires_grad_() for name in names}
    stepper = _Stepper(strategy, model, spec, memory, mu, params, current, leaves)
    total, count, passed = 0.0, 0, 0
    with closing(stepper):
        for step in steps:
            batch, memory = step.batch, step.memory
            for piece, share, is_last in _pieces(batch, spec.accumulate):
                loss = strategy.loss(seen, frugal.whole(current, leaves), piece, memory)
                loss = loss if share == 1 else loss * share
                with stepper.moving(is_last=is_last):
                    loss.backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
                total += float(loss.detach())
                del loss
            with torch.no_grad():
                step.memory = memory = stepper.finish(memory)
            count, passed = count + 1, passed + len(batch)
    layout.write(local, beside)
    return Trained(local, memory, total / count, count, passed)


def _pieces(batch: Batch, count: int) -> Iterator[tuple[Batch, float, bool]]:
    """Yield a batch in parts, with the share of each in the mean, and whether it is the last.

    Weights are made larger by as much as the share makes them smaller, so that what a part's loss
    has beside its samples counts once for the batch.
    """
    if count == 1 or len(batch) < 2:
        yield batch, 1.0, True
        return
    size = math.ceil(len(batch) / count)
    for first in range(0, len(batch), size):
        rows = slice(first, first + size)
        num = len(batch.y[rows])
        weight = None if batch.weight is None else batch.weight[rows] * (len(batch) / num)
        mask = None if batch.mask is None else batch.mask[rows]
        piece = Batch(batch.x[rows], batch.y[rows], weight, mask)
        yield piece, num / len(batch), first + size >= len(batch)


class _Stepper:
    """Takes the steps, tensor by tensor.

    Where a strategy leaves loss and gradient as they are, a tensor takes its step as soon as its
    gradient is there, which is then freed: never are two of them there at once. (Lv et al., "Full
    Parameter Fine-tuning for Large Language Models with Limited Resources", 2023,
    arXiv:2306.09782, there for SGD.) All optimizers here work element by element, so a step has
    the same bits as one of the whole vector.
    """

    def __init__(
        self,
        strategy: ClientStrategy,
        model: FlatModel,
        spec: ClientSpec,
        memory: Memory,
        mu: float,
        params: Tensor,
        current: Tensor,
        leaves: Mapping[str, Tensor],
    ) -> None:
        self._strategy, self._lr, self._mu = strategy, spec.lr, mu
        self._layout, self._current, self._leaves = model.layout, current, leaves
        self._optimizers: list[Optimizer] = [make_optimizer(spec, x) for x in leaves.values()]
        self._reference = self._parts(params)
        pull = strategy.pull()
        self._adjusts = strategy.overrides("adjust") or (pull is not None and pull.is_explicit)
        self._has_proximal = strategy.overrides("proximal")
        self._keeps_account = strategy.overrides("after_step") or strategy.path() is not None
        self._implicit: list[tuple[Tensor, Tensor]] = []
        if pull is not None and not pull.is_explicit and not self._has_proximal:
            anchor, weight = memory[pull.anchor], pull.weight(memory, lr=spec.lr)
            self._implicit = list(zip(self._parts(anchor), self._parts(weight), strict=True))
        needs_all = self._adjusts or self._has_proximal or self._keeps_account
        # A loss of its own may look at parameters in ways that a tensor's early step would disturb.
        self._at_once = not needs_all and not any(map(strategy.overrides, ("loss", "view")))
        self._is_moving = False
        self._moved: set[int] = set()
        self._hooks: list[RemovableHandle] = []
        if self._at_once:
            for index, leaf in enumerate(leaves.values()):
                hook = leaf.register_post_accumulate_grad_hook(self._mover(index))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    @contextmanager
    def moving(self, *, is_last: bool) -> Iterator[None]:
        """Let a backward pass take the steps, if it is that of the last part of a batch."""
        self._is_moving = self._at_once and is_last
        yield
        self._is_moving = False

    def close(self) -> None:
        """Let go of the tensors, so that they are freed at once and not some time."""
        for hook in self._hooks:
            hook.remove()

    def _mover(self, index: int) -> Callable[[Tensor], None]:
        def move(leaf: Tensor) -> None:
            if not self._is_moving:
                return
            gradient, leaf.grad = leaf.grad, None
            with torch.no_grad():
                self._move(index, leaf, self._pulled(index, leaf, gradient))
            self._moved.add(index)

        return move

    def _pulled(self, index: int, leaf: Tensor, gradient: Tensor | None) -> Tensor:
        """Return a gradient with FedProx's term; of what the loss does not see, that alone."""
        if gradient is None:
            gradient = torch.zeros_like(leaf)
        if not self._mu:
            return gradient
        return gradient + self._mu * (leaf - self._reference[index])

    def _move(self, index: int, leaf: Tensor, gradient: Tensor) -> None:
        self._optimizers[index].step(gradient)
        if self._implicit:
            leaf.lerp_(*self._implicit[index])

    def finish(self, memory: Memory) -> Memory:
        """Take the steps that are left; return the memory after them. The rest never moves."""
        strategy, leaves = self._strategy, list(self._leaves.values())
        if self._adjusts:
            changed = self._parts(strategy.adjust(self._gradient(), self._current, memory))
            for leaf, gradient in zip(leaves, changed, strict=True):
                leaf.grad = gradient
        left = [index for index in range(len(leaves)) if index not in self._moved]
        self._moved.clear()
        for index in left:
            leaves[index].grad = self._pulled(index, leaves[index], leaves[index].grad)
        before = gradients = None
        if self._keeps_account:
            before, gradients = self._current.clone(), self._gradient()
        for index in left:
            ready, leaves[index].grad = leaves[index].grad, None
            assert ready is not None
            self._move(index, leaves[index], ready)
        if self._has_proximal:
            moved = self._parts(strategy.proximal(self._current, memory, lr=self._lr))
            for leaf, value in zip(leaves, moved, strict=True):
                leaf.copy_(value)
        if before is None or gradients is None:
            return memory
        return strategy.after_step(before, self._current.clone(), gradients, memory)

    def _parts(self, whole: Tensor) -> list[Tensor]:
        """Return views of what takes steps, of a vector [T] or [P]."""
        views = self._layout.views(whole)
        return [views[name] for name in self._leaves]

    def _gradient(self) -> Tensor:
        """Return the gradient as a vector [T], 0 where nothing takes a step."""
        whole = torch.zeros_like(self._current)
        for part, leaf in zip(self._parts(whole), self._leaves.values(), strict=True):
            if leaf.grad is not None:
                part.copy_(leaf.grad)
        return whole
