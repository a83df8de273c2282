"""Networks as lists of operators: what `torch.fx` shows of a forward pass, or a refusal by name.

Supported are the modules `Linear` (on flat samples), `Conv2d` (zero padding), `BatchNorm1d` and
`BatchNorm2d` behind one of them, `ReLU`, `ReLU6`, `MaxPool2d`, `AvgPool2d`, `AdaptiveAvgPool2d` to
one place, `Flatten` of all but the first dimension, `Dropout` and `Identity`, their functions where
they have no parameters, and sums of two values, so residual networks. Each layer is used once.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node, Tracer

from edgelearn.params import FlatModel
from edgelearn.runtime.network import Layer, Network, Norm, Operator, UnsupportedError

SUPPORTED = (
    "Linear, Conv2d, BatchNorm behind them, ReLU, ReLU6, MaxPool2d, AvgPool2d, "
    "AdaptiveAvgPool2d(1), Flatten, Dropout, Identity and sums of two values"
)
_TOLERANCE = 1e-3  # of the largest logit: folding and other kernels round otherwise


def read_network(model: FlatModel, shape: tuple[int, ...]) -> Network:
    """Read a network, and see that what was read computes the same.

    Args:
        model: The network.
        shape: Shape of one sample.

    Raises:
        UnsupportedError: If it does anything else; the operator is named.
    """
    model.module.eval()
    network = _Reader(model.module).read()
    generator = torch.Generator().manual_seed(0)
    x, params = torch.rand(2, *shape, generator=generator), model.initial()
    # A new norm does nothing. Shifts that cancel out: any others add up, in a deep network beyond
    # what float32 holds.
    params += 0.1 * torch.rand(len(params), generator=generator) - 0.05
    with torch.no_grad():
        expected = model(params, x)
        values = network.evaluate(network.folded(model, params), x)
    for step in network.operators:
        if step.kind == "Gemm" and values[step.inputs[0]].dim() != 2:
            dims = values[step.inputs[0]].dim()
            raise _unsupported(f"Linear on values of {dims} dimensions", step.name)
        if step.kind == "Add" and len({values[name].shape for name in step.inputs}) > 1:
            raise _unsupported("a sum of values of different shapes", step.name)
    found = values[network.output]
    if not bool(torch.isfinite(expected).all()):
        raise UnsupportedError("the network's answers are not finite, so nothing can be compared")
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())
    ):
        raise UnsupportedError("the network computes something that reading it does not show")
    return network


def _unsupported(what: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} at {where!r} can't be written down for another engine; supported are {SUPPORTED}"
    )


_NORM = "BatchNormalization"
_SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout2d)
_MODULES_OF: Mapping[Any, Callable[..., nn.Module]] = {
    F.relu: lambda *_args, **_options: nn.ReLU(),
    torch.relu: lambda: nn.ReLU(),
    "relu": lambda: nn.ReLU(),
    F.relu6: lambda *_args, **_options: nn.ReLU6(),
    torch.flatten: lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    "flatten": lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    F.max_pool2d: lambda kernel_size, stride=None, padding=0, dilation=1, **options: nn.MaxPool2d(
        kernel_size, stride, padding, dilation, **options
    ),
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.dropout: lambda *_args, **_options: nn.Identity(),  # the network is in evaluation mode
}
_RESHAPES = ("view", "reshape", torch.reshape)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


_FOLLOWING = threading.Lock()  # of two that overlap, one would leave torch patched for good


@final
class _Follower(Tracer):
    """Follows the modules of its own thread alone: torch patches those of the whole process."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note a call, or let another thread's happen."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Note a parameter that is looked up, or let another thread have it."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Reader:
    """Follows one forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        first: dict[int, str] = {}
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        self._stored = {name: first.setdefault(id(tensor), name) for name, tensor in named}
        self._operators: list[Operator] = []
        self._values: dict[Node, str] = {}
        self._layers: set[str] = set()
        self._norms: dict[str, Norm] = {}
        self._counts: set[Any] = set()
        self._shapes: set[Any] = set()

    def read(self) -> Network:
        if type(self._module).__module__.startswith("torch.nn.") and not list(
            self._module.children()
        ):
            output = self._module_step(self._module, "", "output", ("input",))
            return self._folded(Network(tuple(self._operators), "input", output))
        entry = output = ""
        try:
            with _FOLLOWING:
                graph = _Follower().trace(self._module)
        except Exception as error:  # whatever a forward pass does that can't be followed
            raise UnsupportedError(
                f"the forward pass can't be followed: {type(error).__name__}: {error}"
            ) from error
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        for node in graph.nodes:
            if node.op == "placeholder":
                if self._values:
                    raise _unsupported("a second input", node.name)
                entry = self._values[node] = node.name
            elif node.op == "output":
                if not isinstance(node.args[0], Node):
                    raise _unsupported("an output that is no tensor", node.name)
                output = self._values[node.args[0]]
            elif not self._is_about_shape(node):
                self._values[node] = self._step(node)
        return self._folded(Network(tuple(self._operators), entry, output))

    def _step(self, node: Node) -> str:
        if node.op == "call_module":
            module = self._module.get_submodule(str(node.target))
            if len(node.args) != 1 or node.kwargs:
                raise _unsupported(f"{type(module).__name__} with arguments", str(node.target))
            return self._module_step(module, str(node.target), node.name, self._taken(node))
        if node.op == "get_attr":
            raise _unsupported("a tensor used outside a supported module", str(node.target))
        what = _name_of(node.target)
        if node.target in _RESHAPES and self._is_flattening(node):
            taken = self._taken(node, first_only=True)
            return self._module_step(nn.Flatten(), node.name, node.name, taken)
        if node.op in ("call_function", "call_method"):
            if node.target in _SUMS:
                if len(node.args) != 2 or node.kwargs:
                    raise _unsupported(f"{what} with arguments", node.name)
                return self._add(
                    Operator("Add", node.name, self._taken(node), node.name, torch.add)
                )
            if node.target in _MODULES_OF:
                options = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")}
                try:
                    module = _MODULES_OF[node.target](*node.args[1:], **options)
                except TypeError as error:
                    raise _unsupported(f"{what} ({error})", node.name) from error
                taken = self._taken(node, first_only=True)
                return self._module_step(module, node.name, node.name, taken)
        raise _unsupported(what, node.name)

    def _is_about_shape(self, node: Node) -> bool:
        """Note what asks for a shape, or for the number of rows in it."""
        args = node.args
        if node.target == "size" and args[1:] == (0,):
            self._counts.add(node)
        elif (node.target is getattr and args[1] == "shape") or node.target == "size":
            self._shapes.add(node)
        elif node.target is operator.getitem and args[0] in self._shapes and args[1] == 0:
            self._counts.add(node)
        return node in self._counts or node in self._shapes

    def _is_flattening(self, node: Node) -> bool:
        """Whether a reshape keeps the rows and flattens the rest."""
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
        is_flat = len(sizes) == 2 and sizes[0] in self._counts and sizes[1:] == (-1,)
        return is_flat and not node.kwargs

    def _taken(self, node: Node, *, first_only: bool = False) -> tuple[str, ...]:
        args = node.args or (node.kwargs.get("input"),)
        names = []
        for arg in args[:1] if first_only else args:
            if not isinstance(arg, Node) or arg not in self._values:
                raise _unsupported(f"{_name_of(node.target)} of a constant", node.name)
            names.append(self._values[arg])
        return tuple(names)

    def _add(self, step: Operator) -> str:
        self._operators.append(step)
        return step.output

    def _module_step(
        self, module: nn.Module, name: str, output: str, inputs: tuple[str, ...]
    ) -> str:
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            raise _unsupported(f"{kind.__name__} with hooks", name)
        if kind in _SKIPPED:
            return inputs[0]
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
            self._norms[name] = self._norm(module, name)
            return self._add(Operator(_NORM, name, inputs, output, nn.Identity()))
        if kind in (nn.Linear, nn.Conv2d):
            assert isinstance(module, nn.Linear | nn.Conv2d)
            if name in self._layers:
                raise _unsupported("a second use of a layer", name)
            self._layers.add(name)
            prefix = f"{name}." if name else ""
            bias = None if module.bias is None else self._stored[f"{prefix}bias"]
            layer = Layer(self._stored[f"{prefix}weight"], bias)
            if isinstance(module, nn.Linear):
                step = Operator("Gemm", name, inputs, output, F.linear, {"transB": 1}, layer)
            else:
                step = Operator("Conv", name, inputs, output, *_convolution(module, name), layer)
            return self._add(step)
        return self._add(_without_parameters(module, name, inputs, output))

    def _norm(self, module: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> Norm:
        if module.running_mean is None:
            raise _unsupported(f"{type(module).__name__} without running statistics", name)
        prefix = f"{name}." if name else ""
        return Norm(
            self._stored[f"{prefix}weight"] if module.affine else None,
            self._stored[f"{prefix}bias"] if module.affine else None,
            self._stored[f"{prefix}running_mean"],
            self._stored[f"{prefix}running_var"],
            module.eps,
        )

    def _folded(self, network: Network) -> Network:
        """Fold each norm into the layer that makes its input, and nothing else takes that."""
        consumers, kept = network.consumers(), dict[str, Operator]()  # by what they make
        for step in network.operators:
            if step.kind != _NORM:
                kept[step.output] = step
                continue
            before = kept.pop(step.inputs[0], None)
            is_alone = before is not None and len(consumers[before.output]) == 1
            if before is None or before.layer is None or before.layer.norm or not is_alone:
                raise _unsupported("BatchNorm that is not right behind a layer", step.name)
            layer = replace(before.layer, norm=self._norms[step.name])
            kept[step.output] = replace(before, output=step.output, layer=layer)
        return replace(network, operators=tuple(kept.values()))


def _name_of(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _convolution(module: nn.Conv2d, name: str) -> tuple[Callable[..., Tensor], Mapping[str, Any]]:
    if module.padding_mode != "zeros":
        raise _unsupported(f"Conv2d padded with {module.padding_mode!r}", name)
    left, right, top, bottom = module._reversed_padding_repeated_twice
    stride, dilation, groups = module.stride, module.dilation, module.groups
    pads = (left, right, top, bottom)

    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, pads), weight, bias, stride, 0, dilation, groups)

    attributes = {
        "kernel_shape": list(module.kernel_size),
        "strides": list(stride),
        "pads": [top, left, bottom, right],
        "dilations": list(dilation),
        "group": groups,
    }
    return compute, attributes


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]


def _without_parameters(
    module: nn.Module, name: str, inputs: tuple[str, ...], output: str
) -> Operator:
    kind = type(module)
    if kind is nn.ReLU:
        return Operator("Relu", name, inputs, output, torch.relu)
    if kind is nn.ReLU6:
        return Operator("Clip", name, inputs, output, lambda x: x.clamp(0, 6))
    if kind is nn.Flatten:
        assert isinstance(module, nn.Flatten)
        if (module.start_dim, module.end_dim) != (1, -1):
            raise _unsupported("Flatten that keeps more than the first dimension", name)
        return Operator("Flatten", name, inputs, output, lambda x: x.flatten(1), {"axis": 1})
    if kind is nn.AdaptiveAvgPool2d:
        assert isinstance(module, nn.AdaptiveAvgPool2d)
        if module.output_size not in (1, (1, 1)):
            raise _unsupported(f"AdaptiveAvgPool2d to {module.output_size}", name)
        return Operator("GlobalAveragePool", name, inputs, output, lambda x: x.mean((2, 3), True))
    if kind not in (nn.MaxPool2d, nn.AvgPool2d):
        raise _unsupported(kind.__name__, name)
    assert isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
    attributes = {
        "kernel_shape": _pair(module.kernel_size),
        "strides": _pair(module.stride),
        "pads": _pair(module.padding) * 2,
        "ceil_mode": int(module.ceil_mode),
    }
    if isinstance(module, nn.MaxPool2d):
        if module.return_indices:
            raise _unsupported("MaxPool2d that returns indices", name)
        attributes["dilations"] = _pair(module.dilation)
        return Operator("MaxPool", name, inputs, output, module.forward, attributes)
    if module.divisor_override is not None:
        raise _unsupported("AvgPool2d with a divisor of its own", name)
    attributes["count_include_pad"] = int(module.count_include_pad)
    return Operator("AveragePool", name, inputs, output, module.forward, attributes)
