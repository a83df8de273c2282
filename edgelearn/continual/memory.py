"""What a device remembers between experiences: named tensors, declared with shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgelearn.errors import StrategyError
from edgelearn.scenario.samples import EMPTY, Batch, SampleStore
from edgelearn.seeds import permutation


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a strategy keeps.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        is_kept: Whether it outlives a round; what does not costs RAM in training, but no storage,
            and is zeros when the next round begins.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    is_kept: bool = True

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def device_bytes(self, _sample_bytes: int) -> int:
        """Bytes on a real device: the same."""
        return self.stored_bytes

    def initial(self) -> Tensor:
        """Return the value at the beginning: zeros."""
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Samples that a strategy keeps: ids into the device's store, -1 where there is none.

    Attributes:
        capacity: Most samples.
        is_public: Whether they are the scenario's public samples, which a device has from the
            beginning on, in the same order as any other.
    """

    capacity: int
    is_public: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Ids are int32."""
        return torch.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """One id for each place."""
        return (self.capacity,)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the ids."""
        return 4 * self.capacity

    def device_bytes(self, sample_bytes: int) -> int:
        """Bytes on a real device, which stores the samples themselves."""
        return self.capacity * (4 + sample_bytes)

    def initial(self) -> Tensor:
        """Return the value at the beginning: empty."""
        return torch.full((self.capacity,), EMPTY, dtype=torch.int32)


Declaration = Mapping[str, TensorSpec | SampleSpec]


def kept(declaration: Declaration) -> dict[str, TensorSpec | SampleSpec]:
    """Return the part of a declaration that outlives a round."""
    return {
        name: spec
        for name, spec in declaration.items()
        if isinstance(spec, SampleSpec) or spec.is_kept
    }


def passing(declaration: Declaration) -> dict[str, Tensor]:
    """Return what does not outlive a round, as it is when the next one begins."""
    return {n: spec.initial() for n, spec in declaration.items() if n not in kept(declaration)}


class Memory(Mapping[str, Tensor]):
    """A device's memory: an immutable mapping of tensors, and the store that sample ids lead to.

    Example:
        >>> memory = Memory({"seen": torch.zeros(1)})
        >>> memory.replace(seen=torch.ones(1))["seen"]
        tensor([1.])
        >>> memory["seen"]
        tensor([0.])
    """

    __slots__ = ("_store", "_tensors")

    def __init__(self, tensors: Mapping[str, Tensor], store: SampleStore | None = None) -> None:
        self._tensors = dict(tensors)
        self._store = store

    @classmethod
    def initial(cls, declaration: Declaration, store: SampleStore | None = None) -> Memory:
        """Return the memory of a device that has learned nothing yet."""
        return cls({name: spec.initial() for name, spec in declaration.items()}, store)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def store(self) -> SampleStore:
        """The store that sample ids lead to."""
        if self._store is None:
            raise StrategyError("this memory has no sample store")
        return self._store

    def replace(self, **tensors: Tensor) -> Memory:
        """Return a memory with some tensors replaced; names must be declared ones.

        Raises:
            StrategyError: If a name is unknown.
        """
        if unknown := [name for name in tensors if name not in self._tensors]:
            raise StrategyError(
                f"memory has no {', '.join(unknown)}; declared: {', '.join(self._tensors)}"
            )
        return Memory({**self._tensors, **tensors}, self._store)

    def select(self, names: Mapping[str, str]) -> Memory:
        """Return a memory of some tensors under other names: new name -> name here."""
        return Memory({new: self._tensors[old] for new, old in names.items()}, self._store)

    def draw(self, name: str, count: int, generator: torch.Generator) -> Batch | None:
        """Draw stored samples uniformly, without replacement while they last.

        Args:
            name: Name of the sample ids in this memory.
            count: Samples wanted; as many as there are if fewer.
            generator: Source of randomness.

        Returns:
            The batch, with each sample's place among the ids; None if nothing is stored yet.
        """
        ids = self[name]
        held = (ids != EMPTY).nonzero().flatten()
        if len(held) == 0 or count == 0:
            return None
        # One word from the generator, and the rest by counting: a compiled engine does the same.
        word = int(torch.randint(2**62, (), generator=generator))
        places = held[torch.from_numpy(permutation(word, len(held))[:count])]
        return replace(self.store.batch(ids[places]), places=places)


def check(memory: Mapping[str, Tensor], declaration: Declaration) -> None:
    """Check that a memory is what was declared.

    Raises:
        StrategyError: Naming the tensor, what it is, and what was declared.
    """
    if missing := [name for name in declaration if name not in memory]:
        raise StrategyError(f"memory lacks the declared {', '.join(missing)}")
    if extra := [name for name in memory if name not in declaration]:
        raise StrategyError(f"memory has {', '.join(extra)}, which is not declared")
    for name, spec in declaration.items():
        value = memory[name]
        if tuple(value.shape) != tuple(spec.shape) or value.dtype != spec.dtype:
            raise StrategyError(
                f"memory {name!r} is {tuple(value.shape)} {value.dtype}, "
                f"declared {tuple(spec.shape)} {spec.dtype}"
            )
