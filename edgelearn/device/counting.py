"""Tensors that live while something runs: how many bytes at the highest, and what they were.

Every operation is seen as torch dispatches it, below autograd, and each storage that it returns is
followed until it is freed. What an operation allocates for itself and frees before it returns (the
workspace of a kernel) is not seen; `device.allocated` measures that too.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(slots=True)
class Storage:
    """A piece of memory that an operation made.

    Attributes:
        num_bytes: Its size.
        operation: The operation, such as "aten.mm.default".
        phase: What the count was told to be going on.
        is_backward: Whether a backward pass made it.
        is_graph: Whether gradients were being recorded: in a backward pass, for what is computed
            again.
        outlives_backward: Whether it was still there once no backward pass was going on.
    """

    num_bytes: int
    operation: str
    phase: str
    is_backward: bool
    is_graph: bool
    outlives_backward: bool = True


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes for the while of a `with` block.

    Example:
        >>> with Count() as count:
        ...     _ = torch.ones(10) + torch.ones(10)
        >>> count.peak
        120

    Attributes:
        phase: What is going on, for `Storage.phase`; to be set by whoever knows.
        peak: Bytes at the highest, of what was made in the block.
        at_peak: Key of each storage that was alive then -> the storage.
        alive: The same, now.
        has_backward: Whether a backward pass made anything.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.peak = 0
        self.has_backward = False
        self.alive: dict[int, Storage] = {}
        self.at_peak: dict[int, Storage] = {}
        self._now = 0
        self._keys: dict[int, int] = {}  # by address; a key is never used again
        self._next = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for made in tree_leaves(out):
            if _is_tensor(made):
                self._note(made.untyped_storage(), str(func), given)
        return out

    def _note(self, storage: torch.UntypedStorage, operation: str, given: set[int]) -> None:
        address = storage._cdata
        if address in self._keys or address in given:
            return  # a view, or written in place
        made = Storage(
            storage.nbytes(), operation, self.phase, _in_backward(), torch.is_grad_enabled()
        )
        self.has_backward |= made.is_backward
        self._keys[address] = key = self._next
        self._next += 1
        self.alive[key] = made
        self._now += made.num_bytes
        weakref.finalize(storage, self._forget, address).atexit = False
        if self._now > self.peak:
            self.peak, self.at_peak = self._now, dict(self.alive)

    def _forget(self, address: int) -> None:
        gone = self.alive.pop(self._keys.pop(address))
        gone.outlives_backward = not _in_backward()
        self._now -= gone.num_bytes


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
