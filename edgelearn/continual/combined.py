"""Several client strategies as one: EWC with replay, LwF with FedProx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.local import LocalTask, Passage, Trained
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.path import PathIntegral
from edgelearn.continual.strategy import (
    STEP_HOOKS,
    ClientStrategy,
    Facts,
    Pull,
    Rehearsal,
    Update,
    supervised_loss,
)
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.scenario.stream import Experience


@final
class Combined(ClientStrategy):
    """Calls the hooks of its parts in their order; each sees its own memory and nothing else.

    The loss is that of the part that replaces it (`ClientStrategy.replaces_loss`), or cross-
    entropy, and what each other part adds to cross-entropy. A network is asked once for it.

    Args:
        parts: At least two strategies, by name.

    Raises:
        ValueError: If two parts want the same place: two that replay, keep a path integral, replace
            the loss, take the gradient or train by themselves; or one that trains by itself beside
            one with steps.
    """

    def __init__(self, parts: Mapping[str, ClientStrategy]) -> None:
        self.parts = dict(parts)
        _only_one(self, "replays", [n for n, p in parts.items() if _replays(p)])
        self._integrating = [n for n, p in parts.items() if p.path() is not None]
        _only_one(self, "keeps a path integral", self._integrating)
        _only_one(self, "replaces the loss", [n for n, p in parts.items() if _replaces(p)])
        for hook, does in (("gradient", "takes the gradient"), ("fit", "trains by itself")):
            _only_one(self, does, found := self._overriding(hook))
            rest = STEP_HOOKS if hook == "fit" else ("loss",)
            others = [n for n in parts if n not in found and any(map(parts[n].overrides, rest))]
            if hook == "fit":  # what others declare concerns steps too
                others += [n for n in parts if n not in found and _declares_steps(parts[n])]
            if found and others:
                raise ValueError(f"{found[0]} {does}, so {others[0]} can't change the steps")
        self.needs_plain_sgd = any(part.needs_plain_sgd for part in parts.values())
        self.keeps_network = any(part.keeps_network for part in parts.values())
        self._pulling = [n for n, p in parts.items() if p.pull() is not None]

    def overrides(self, hook: str) -> bool:
        """Whether any part changes a hook; two declared penalties have to be taken in turn."""
        if len(self._pulling) > 1:
            explicit = [bool(self._pull_of(name).is_explicit) for name in self._pulling]
            if hook == "proximal" and not all(explicit):
                return True
            if hook == "adjust" and any(explicit):
                return True
        if hook == "after_step" and self._integrating and self._pulling != self._integrating:
            # A path leaves out an explicit penalty of its own part, and no other.
            is_told_apart = any(self._pull_of(name).is_explicit for name in self._pulling)
            return is_told_apart or bool(self._overriding(hook))
        return bool(self._overriding(hook))

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare what all parts remember, each name behind that of its part."""
        return {
            f"{name}.{key}": spec
            for name, part in self.parts.items()
            for key, spec in part.declare(model, facts).items()
        }

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:
        """Declare what all parts share; their names must differ."""
        found: dict[str, TensorSpec] = {}
        for part in self.parts.values():
            new = part.shares(model, facts)
            if clash := [key for key in new if key in found]:
                raise ValueError(f"two of {', '.join(self.parts)} share {clash[0]!r}")
            found |= new
        return found

    def rehearsal(self) -> Rehearsal | None:
        """Declare what the part that replays does."""
        for name, part in self.parts.items():
            if (rehearsal := part.rehearsal()) is not None:
                return replace(rehearsal, buffer=f"{name}.{rehearsal.buffer}")
        return None

    def pull(self) -> Pull | None:
        """Declare the penalty if there is a single one."""
        if len(self._pulling) != 1:
            return None
        (name,) = self._pulling
        pull = self._pull_of(name)
        return replace(pull, curvature=f"{name}.{pull.curvature}", anchor=f"{name}.{pull.anchor}")

    def path(self) -> PathIntegral | None:
        """Declare the path integral of the part that keeps one."""
        for name in self._integrating:
            path = self.parts[name].path()
            assert path is not None  # what a part declares does not change
            moved = None if path.moved is None else f"{name}.{path.moved}"
            return PathIntegral(f"{name}.{path.charge}", moved)
        return None

    def proximity(self) -> float:
        """Declare the sum."""
        return sum(part.proximity() for part in self.parts.values())

    def start(
        self, model: FlatModel, params: Tensor, memory: Memory, experience: Experience
    ) -> Memory:
        """Begin an experience, in each part."""
        for name, part in self.parts.items():
            memory = _with(memory, name, part.start(model, params, _of(memory, name), experience))
        return memory

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Begin a round, in each part."""
        for name, part in self.parts.items():
            params, own = part.enter(model, params, _of(memory, name))
            memory = _with(memory, name, own)
        return params, memory

    def is_frozen(self, memory: Memory) -> bool:
        """Whether any part says so."""
        return any(part.is_frozen(_of(memory, name)) for name, part in self.parts.items())

    def fit(self, task: LocalTask) -> Trained:
        """Train as the part does that trains by itself."""
        (name,) = self._overriding("fit")
        trained = self.parts[name].fit(replace(task, memory=_of(task.memory, name)))
        return replace(trained, memory=_with(task.memory, name, trained.memory))

    def view(self, model: FlatModel) -> FlatModel:
        """Return the network as each part shows it to the next."""
        for part in self.parts.values():
            model = part.view(model)
        return model

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        """Change the batch, in each part."""
        for name, part in self.parts.items():
            batch = part.extend(batch, _of(memory, name), generator)
        return batch

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return the replaced loss or cross-entropy, and what other parts add to it."""
        once = _Once(model)
        base = supervised_loss(once(params, batch.x), batch)
        total, added = base, torch.zeros(())
        for name, part in self.parts.items():
            if part.overrides("loss"):
                own = part.loss(once, params, batch, _of(memory, name))
                if part.replaces_loss:
                    total = own
                else:
                    added = added + (own - base)
        return total + added

    def gradient(
        self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the part that takes it, or that of the loss."""
        for name in self._overriding("gradient"):
            return self.parts[name].gradient(model, params, batch, _of(memory, name))
        return super().gradient(model, params, batch, memory)

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        """Change the gradient, in each part."""
        for name, part in self.parts.items():
            gradients = part.adjust(gradients, params, _of(memory, name))
        return gradients

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        """Take the implicit step of each part in turn, declared penalties first.

        What a part computes, such as putting parameters back to where they belong, is then not
        undone by a penalty.
        """
        for name, part in sorted(self.parts.items(), key=lambda p: p[1].overrides("proximal")):
            params = part.proximal(params, _of(memory, name), lr=lr)
        return params

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        """Keep account of a step, in each part."""
        for name, part in self.parts.items():
            own = part.after_step(before, after, gradients, _of(memory, name))
            memory = _with(memory, name, own)
        return memory

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """End a round, in each part, the last first: what it changed on entry is undone again."""
        for name, part in reversed(self.parts.items()):
            local, own = part.leave(passage, _of(memory, name))
            passage, memory = replace(passage, local=local), _with(memory, name, own)
        return passage.local, memory

    def num_beside(self, memory: Memory) -> int:
        """Return the sum."""
        return sum(part.num_beside(_of(memory, name)) for name, part in self.parts.items())

    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        """Change what is sent, in each part."""
        for name, part in self.parts.items():
            update = part.upload(update, data, _of(memory, name))
        return update

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Consolidate an experience, in each part."""
        for name, part in self.parts.items():
            own = part.finish(model, params, data, _of(memory, name), generator)
            memory = _with(memory, name, own)
        return memory

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,
        generator: Generator,
    ) -> Tensor:
        """Return the parameters to answer with, changed by each part."""
        for name, part in self.parts.items():
            params = part.serve(model, params, _of(memory, name), data, generator)
        return params

    def _overriding(self, hook: str) -> list[str]:
        return [name for name, part in self.parts.items() if part.overrides(hook)]

    def _pull_of(self, name: str) -> Pull:
        pull = self.parts[name].pull()
        assert pull is not None  # what a part declares does not change
        return pull


class _Once(FlatModel):
    """A network that is asked only once for the same parameters and inputs."""

    def __init__(self, model: FlatModel) -> None:
        self.__dict__.update(model.__dict__)
        self._asked = model
        self._answers: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, params: Tensor, x: Tensor) -> Tensor:
        for asked, inputs, answer in self._answers:
            if asked is params and inputs is x:
                return answer
        answer = super().__call__(params, x)
        self._answers.append((params, x, answer))
        return answer

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        return self._asked.forward(params, x)


def _replays(part: ClientStrategy) -> bool:
    """Whether a part lets samples of its own join a batch, whose places only one can know."""
    return part.rehearsal() is not None or part.overrides("extend")


def _replaces(part: ClientStrategy) -> bool:
    return part.replaces_loss and part.overrides("loss")


def _declares_steps(part: ClientStrategy) -> bool:
    declared = part.rehearsal(), part.pull(), part.path()
    return any(one is not None for one in declared)


def _only_one(combined: Combined, does: str, found: list[str]) -> None:
    if len(found) > 1:
        names = " and ".join(found)
        raise ValueError(
            f"of {'+'.join(combined.parts)}, only one part can be one that {does}: {names} both do"
        )


def _of(memory: Memory, name: str) -> Memory:
    """Return the memory of a part."""
    prefix = f"{name}."
    return memory.select(
        {key.removeprefix(prefix): key for key in memory if key.startswith(prefix)}
    )


def _with(memory: Memory, name: str, own: Memory) -> Memory:
    """Return the whole memory with that of a part in its place."""
    return memory.replace(**{f"{name}.{key}": value for key, value in own.items()})
