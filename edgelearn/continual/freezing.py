"""A living training object as bytes, and back: what Avalanche keeps between two rounds.

Avalanche's own checkpoints fail on current torch and can't be taken within an experience, and a
plain pickle of a buffer of 200 samples holds the whole data set that they were taken from. Here

- what belongs to the framework (network, optimizer, current data) is named, not stored,
- tensors are stored as their own bytes, not as the storage that they are a view of,
- copies of the network are stored as their tensors,
- generators and iterators, which Python can't store, come back as if they had just been made,
- whatever `reducers` name is stored as they say.

Pickled bytes can run any code when they are read. They are read from the local disk of the device
that wrote them, and from nowhere else: never from the server or another device.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from edgelearn.errors import StateError, StrategyError

Reducer = Callable[[Any], tuple[Any, ...]]
_PROTOCOL = 5


@dataclass(frozen=True)
class Surroundings:
    """What a frozen object refers to and does not own.

    Attributes:
        named: Objects by name; they are not stored, and are given again when it is thawed.
        network: The network; neither it nor its parameters are stored.
        template: A copy of the network as it was built, to rebuild other copies from; it has to be
            among `named`.
        reducers: How objects of a class (or one derived from it) are stored, as
            `object.__reduce__` tells it.
    """

    named: Mapping[str, Any]
    network: nn.Module
    template: nn.Module
    reducers: Mapping[type[Any], Reducer]

    def freeze(self, value: Any) -> bytes:
        """Return the bytes of an object.

        Raises:
            StrategyError: If something in it can't be stored.
        """
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self).dump(value)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise StrategyError(f"its state can't be stored: {error}") from error
        return buffer.getvalue()

    def thaw(self, data: bytes) -> Any:
        """Return the object again.

        Args:
            data: What `freeze` returned on this very device.

        Raises:
            StateError: If the bytes are damaged, or were written by other code.
        """
        try:
            return _Unpickler(io.BytesIO(data), self).load()
        except Exception as error:  # damaged bytes make pickle raise nearly anything
            raise StateError(f"the state of a strategy can't be read: {error}") from error


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, around: Surroundings) -> None:
        super().__init__(file, _PROTOCOL)
        self._around = around
        self._names = {id(value): name for name, value in around.named.items()}
        tensors = (*around.network.named_parameters(), *around.network.named_buffers())
        self._tensors = {id(tensor): name for name, tensor in tensors}

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if (name := self._names.get(id(obj))) is not None:
            return "named", name
        if obj is self._around.network:
            return "network", ""
        if (name := self._tensors.get(id(obj))) is not None:
            return "tensor", name
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return _reduce_tensor(obj)
        if isinstance(obj, nn.Module) and _is_copy(obj, self._around.template):
            return _network_copy, _reduce_network(obj, self._around.template)
        if isinstance(obj, GeneratorType):
            return _reduce_generator(obj)
        if isinstance(obj, _BaseDataLoaderIter):
            return iter, ((),)
        for kind, reduce in self._around.reducers.items():
            if isinstance(obj, kind):
                return reduce(obj)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, around: Surroundings) -> None:
        super().__init__(file)
        self._around = around

    def persistent_load(self, pid: tuple[str, str]) -> Any:
        kind, name = pid
        network = self._around.network
        if kind == "network":
            return network
        if kind == "tensor":
            return {**dict(network.named_parameters()), **dict(network.named_buffers())}[name]
        if name not in self._around.named:
            raise pickle.UnpicklingError(f"there is no {name}")
        return self._around.named[name]


def _reduce_tensor(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    is_parameter = isinstance(tensor, nn.Parameter)
    kind = str(tensor.dtype).removeprefix("torch.")
    return _tensor, (kind, tuple(tensor.shape), raw, tensor.requires_grad, is_parameter)


def _tensor(
    kind: str, shape: tuple[int, ...], raw: bytes, requires_grad: bool, is_parameter: bool
) -> Tensor:
    dtype: torch.dtype = getattr(torch, kind)
    value = torch.empty(shape, dtype=dtype)
    if raw:
        value.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    if is_parameter:
        return nn.Parameter(value, requires_grad=requires_grad)
    return value.requires_grad_(requires_grad)


def _is_copy(module: nn.Module, template: nn.Module) -> bool:
    shapes, others = (
        {name: tensor.shape for name, tensor in (*m.named_parameters(), *m.named_buffers())}
        for m in (module, template)
    )
    return type(module) is type(template) and shapes == others


def _reduce_network(copied: nn.Module, template: nn.Module) -> tuple[Any, ...]:
    tensors = {n: (p.detach(), p.requires_grad) for n, p in copied.named_parameters()}
    tensors |= {n: (b.detach(), False) for n, b in copied.named_buffers()}
    return template, tensors, copied.training, additions(copied, template)


def _network_copy(
    template: nn.Module,
    tensors: Mapping[str, tuple[Tensor, bool]],
    is_training: bool,
    added: Mapping[str, Any],
) -> nn.Module:
    copied = copy.deepcopy(template)
    with torch.no_grad():
        for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
            value, requires_grad = tensors[name]
            tensor.copy_(value)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(requires_grad)
    vars(copied).update(added)
    return copied.train(is_training)


def additions(changed: nn.Module, template: nn.Module) -> dict[str, Any]:
    """Return what somebody wrote onto a network: attributes that it had not, or not so."""
    plain, old = vars(nn.Module()), vars(template)
    return {
        name: value
        for name, value in vars(changed).items()
        if name not in plain and not (name in old and _equal(value, old[name]))
    }


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one is other or one == other)
    except (ValueError, RuntimeError):  # arrays and tensors, compared element by element
        return False


def _reduce_generator(generator: GeneratorType[Any, Any, Any]) -> tuple[Any, ...]:
    """Tell how a generator was made: `iter(x)`, or a function of a module with its arguments."""
    frame, code = generator.gi_frame, generator.gi_code
    if frame is None:
        return iter, ((),)
    names = code.co_varnames[: code.co_argcount]
    arguments = tuple(frame.f_locals[name] for name in names)
    if code.co_name == "__iter__" and len(arguments) == 1:
        return iter, arguments
    function = frame.f_globals.get(code.co_name)
    if getattr(function, "__code__", None) is not code:
        raise pickle.PicklingError(f"the generator {code.co_qualname} can't be made again")
    return function, arguments
