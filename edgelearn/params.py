"""Parameters as one flat float32 vector and its layout.

Load is a copy, an update is in place, an average is an axpy. State dicts and Flower records exist
only at the border. The vector holds the trainable parameters first, floating-point buffers (such as
batch-norm statistics) after them, and last what a client strategy shares through the server beside
the network (such as control variates), which the network itself never sees.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from edgelearn.errors import StateError

SHARED = "shared/"  # before the names of what is no part of the network


@dataclass(frozen=True)
class Layout:
    """Names, shapes and places of the tensors in a flat vector.

    Attributes:
        names: Tensor names, in order.
        shapes: Their shapes.
        num_trained_tensors: How many of them, from the front, training changes by gradient.
        num_shared_tensors: How many of them, from the back, are no part of the network.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_trained_tensors: int
    num_shared_tensors: int = 0

    @classmethod
    def of(
        cls, module: nn.Module, shared: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> Layout:
        """Return the layout of a module's parameters and floating-point buffers.

        Args:
            module: The network.
            shared: Shapes of tensors that travel beside it, by name.
        """
        parameters = list(module.named_parameters())
        trained: list[tuple[str, Tensor]] = [(n, p) for n, p in parameters if p.requires_grad]
        carried: list[tuple[str, Tensor]] = [(n, p) for n, p in parameters if not p.requires_grad]
        carried += [(n, b) for n, b in module.named_buffers() if b.is_floating_point()]
        tensors = trained + carried
        return cls(
            names=(*(name for name, _ in tensors), *(f"{SHARED}{name}" for name in shared)),
            shapes=(*(tuple(t.shape) for _, t in tensors), *(tuple(s) for s in shared.values())),
            num_trained_tensors=len(trained),
            num_shared_tensors=len(shared),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Number of elements of the vector, P."""
        return sum(self.sizes)

    @cached_property
    def num_trained(self) -> int:
        """Number of leading elements that training changes by gradient, T <= P."""
        return sum(self.sizes[: self.num_trained_tensors])

    @cached_property
    def num_network(self) -> int:
        """Number of leading elements that are the network, without what is shared beside it."""
        return sum(self.sizes[: len(self.sizes) - self.num_shared_tensors])

    @property
    def beside(self) -> Layout:
        """Layout of what is shared beside the network, without the network."""
        count = self.num_shared_tensors
        first = len(self.names) - count
        return Layout(self.names[first:], self.shapes[first:], 0, count)

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each tensor lies in the vector, by name."""
        ends = itertools.accumulate(self.sizes)
        sized = zip(self.names, self.sizes, ends, strict=True)
        return {name: slice(end - size, end) for name, size, end in sized}

    def shared(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of what travels beside the network in `flat` [P], by the names given."""
        first = len(self.names) - self.num_shared_tensors
        views = self.views(flat)
        return {name.removeprefix(SHARED): views[name] for name in self.names[first:]}

    @cached_property
    def digest(self) -> str:
        """Short fingerprint; two layouts with the same one are interchangeable."""
        text = json.dumps([self.names, self.shapes, self.num_trained_tensors])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return named views of `flat` [P], or of its trained part [T]; nothing is copied.

        Raises:
            StateError: If the vector has another length.
        """
        length = flat.shape[-1]
        if length not in (self.size, self.num_trained):
            raise StateError(
                f"a parameter vector has {length} elements, expected {self.size}"
                + (f" or {self.num_trained}" if self.num_trained != self.size else "")
            )
        count = len(self.names) if length == self.size else self.num_trained_tensors
        pieces = torch.split(flat, list(self.sizes[:count]))
        return {
            name: piece.view(shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=False)
        }

    def write(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copy some tensors, by name, to their places in a vector [P]."""
        for name, tensor in tensors.items():
            flat[self.places[name]] = tensor.reshape(-1)

    def flatten(self, tensors: Mapping[str, Any]) -> Tensor:
        """Copy named tensors or arrays into a new vector [P], float32.

        Raises:
            StateError: If a name is missing or unknown, or a shape differs.
        """
        if missing := [name for name in self.names if name not in tensors]:
            raise StateError(f"parameters lack {', '.join(missing)}")
        if unknown := [name for name in tensors if name not in self.names]:
            raise StateError(f"parameters have unknown names {', '.join(unknown)}")
        flat = torch.empty(self.size, dtype=torch.float32)
        for name, view in self.views(flat).items():
            value = torch.as_tensor(tensors[name])
            if value.shape != view.shape:
                raise StateError(
                    f"parameter {name!r} has shape {tuple(value.shape)}, "
                    f"expected {tuple(view.shape)}"
                )
            view.copy_(value)
        return flat


class FlatModel:
    """A module as a pure function of a flat parameter vector: `model(params, x) -> logits`.

    Example:
        >>> model = FlatModel(nn.Linear(4, 2))
        >>> params = model.initial()
        >>> model(params, torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, module: nn.Module, shared: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> None:
        """Wrap a network.

        Args:
            module: The network.
            shared: Shapes of tensors that travel beside it, by name; they begin as zeros.
        """
        self.module = module
        self.layout = Layout.of(module, shared)
        self._places = _places(module)
        # `carry` binds what is not trained to other vectors, so its first values are kept here.
        self._tail = self._values()[self.layout.num_trained :]

    def _values(self) -> Tensor:
        layout = self.layout
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        beside = zip(layout.names, layout.shapes, strict=True)
        state |= {name: torch.zeros(shape) for name, shape in beside if name.startswith(SHARED)}
        return layout.flatten({name: state[name].detach() for name in layout.names})

    def initial(self) -> Tensor:
        """Return a new vector [P] with the module's own values."""
        values = self._values()
        values[self.layout.num_trained :] = self._tail
        return values

    def __call__(self, params: Tensor, x: Tensor) -> Tensor:
        """Evaluate the module.

        Args:
            params: Vector [P], or its trained part [T] while the module holds the rest
                (`carry`).
            x: Inputs [B, ...].

        Returns:
            Logits [B, C].
        """
        return self.forward(params, x)

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Evaluate the module, as a call does; what a network changes about that goes here."""
        with self.bound(self.layout.views(params)):
            out: Tensor = self.module(x)
        return out

    @contextmanager
    def bound(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the module see tensors, by name, in place of its own for the while of a block."""
        # As torch.func.functional_call does, without its 0.5 ms of bookkeeping.
        before = [slots[leaf] for slots, leaf, _ in self._places]
        try:
            for slots, leaf, name in self._places:
                if name in tensors:
                    slots[leaf] = tensors[name]
            yield
        finally:
            for (slots, leaf, _), tensor in zip(self._places, before, strict=True):
                slots[leaf] = tensor

    def carry(self, params: Tensor) -> None:
        """Bind the module's untrained tensors to the tail of `params` [P], by reference.

        A training step differentiates with respect to the trained part alone; what a forward
        pass writes (batch-norm statistics) lands in the tail of this vector.
        """
        self._bind(self._untrained(params))

    def carry_copy(self, params: Tensor) -> dict[str, Tensor]:
        """Bind the module's untrained tensors to copies of those in `params` [P].

        Returns:
            The copies by name, into which a forward pass writes.
        """
        copies = {name: view.clone() for name, view in self._untrained(params).items()}
        self._bind(copies)
        return copies

    def _untrained(self, params: Tensor) -> dict[str, Tensor]:
        last = len(self.layout.names) - self.layout.num_shared_tensors
        names = self.layout.names[self.layout.num_trained_tensors : last]
        if not names:
            return {}
        views = self.layout.views(params)
        return {name: views[name] for name in names}

    def _bind(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.module.get_submodule(owner)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _places(module: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Return where a module looks its tensors up: (dictionary, key, name in the layout)."""
    first: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        first.setdefault(id(tensor), name)
    return [
        (slots, leaf, first[id(tensor)])
        for owner in module.modules()
        for slots in (owner._parameters, owner._buffers)
        for leaf, tensor in slots.items()
        if tensor is not None
    ]
