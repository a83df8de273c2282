"""Tensors that live while something runs: how many bytes at the highest, and what they were.

Every operation is seen as torch dispatches it, below autograd, and each storage that it returns is
followed until it is freed. What an operation allocates for itself and frees before it returns is
not seen; for convolutions, whose kernels need most, a rule reckons it. `device.allocated` measures
what there really is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KERNEL = "kernel"  # the phase of what a rule reckons


@dataclass(slots=True)
class Storage:
    """A piece of memory that an operation made.

    Attributes:
        num_bytes: Its size.
        operation: The operation, such as "aten.mm.default".
        phase: What the count was told to be going on.
        step: In which step, as the count was told.
        is_backward: Whether a backward pass made it.
        is_graph: Whether gradients were being recorded: in a backward pass, for what is computed
            again.
        outlives_backward: Whether it was still there once no backward pass was going on.
    """

    num_bytes: int
    operation: str
    phase: str
    step: int
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
        step: Number of the step, for `Storage.step`; likewise.
        peak: Bytes at the highest, of what was made in the block.
        made: Bytes of all that was made in it, freed again or not; workspaces of kernels with it.
        at_peak: What was there then.
        peak_step: The step that it was in.
        has_backward: Whether a backward pass made anything.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.step = 0
        self.peak = self.made = 0
        self.peak_step = 0
        self.has_backward = False
        self._alive: dict[int, Storage] = {}
        self.at_peak: list[Storage] = []
        self._now = 0
        self._keys: dict[int, int] = {}  # by address; a key is never used again
        self._next = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here; to make sure of it torch would import its compiler, a second.
        return False

    @property
    def alive(self) -> list[Storage]:
        """What is there now, of what was made in the block."""
        return list(self._alive.values())

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
        if (num_bytes := _workspace(func, args, out)) > 0:
            self.made += num_bytes
            operation, is_graph = str(func), torch.is_grad_enabled()
            self._look(Storage(num_bytes, operation, KERNEL, self.step, _in_backward(), is_graph))
        return out

    def _note(self, storage: torch.UntypedStorage, operation: str, given: set[int]) -> None:
        address = storage._cdata
        if address in self._keys or address in given:
            return  # a view, or written in place
        made = Storage(
            storage.nbytes(),
            operation,
            self.phase,
            self.step,
            _in_backward(),
            torch.is_grad_enabled(),
        )
        self.has_backward |= made.is_backward
        self._keys[address] = key = self._next
        self._next += 1
        self._alive[key] = made
        self._now += made.num_bytes
        self.made += made.num_bytes
        weakref.finalize(storage, self._forget, address).atexit = False
        self._look()

    def _look(self, workspace: Storage | None = None) -> None:
        """Take down what is there, if it is more than ever before."""
        now = self._now + (workspace.num_bytes if workspace else 0)
        if now < self.peak:  # of equals the last: an optimizer has settled by then
            return
        self.peak, self.peak_step = now, self.step
        self.at_peak = list(self._alive.values())
        if workspace:
            self.at_peak.append(workspace)

    def _forget(self, address: int) -> None:
        gone = self._alive.pop(self._keys.pop(address))
        gone.outlives_backward = not _in_backward()
        self._now -= gone.num_bytes


def _workspace(func: Any, args: Sequence[Any], out: Any) -> int:
    """Return the bytes that a convolution's kernel needs beside inputs and outputs.

    oneDNN, which torch uses on x86, computes in a layout of its own, in blocks of 16 channels (8 of
    an input with so few). A forward pass holds the larger one of input and output once more, a
    backward pass both; images of at most three channels are read as they are. Found with torch 2.15
    on AVX-512; other kernels need more or less, a device's own maybe nothing.
    """
    if func is torch.ops.aten.convolution.default:
        return max(_read(args[0], always=False), _blocked(out, 16))
    if func is torch.ops.aten.convolution_backward.default:
        gradient, given, mask = args[0], args[1], args[-1]
        return _blocked(gradient, 16) + _read(given, always=mask[0])
    return 0


def _read(given: Tensor, *, always: bool) -> int:
    channels = given.shape[1]
    if channels <= 3 and not always:
        return 0
    return _blocked(given, 8 if 3 < channels <= 8 else 16)


def _blocked(tensor: Tensor, block: int) -> int:
    channels = tensor.shape[1]
    return tensor.numel() // channels * math.ceil(channels / block) * block * tensor.itemsize


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
