"""What of a network is quantized: two forms, one of which a network has.

As a graph: a network that `edgelearn.runtime.network_reader` can read has batch norm folded into
the layer before it, and values that enter a sum or an average are codes, which is what an engine
for devices makes of it (`edgelearn.runtime.qdq`). Layer by layer: any other network (recurrent,
attention, a layer used twice) has integer layers, and everything between them stays float.
Networks without norms, sums and averages are the same in both.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard, final

from torch import Tensor, nn

from edgelearn.params import SHARED, FlatModel
from edgelearn.runtime.int8_layers import Layer, QuantizedLayer, Rounded
from edgelearn.runtime.network import Network, Operator, UnsupportedError
from edgelearn.runtime.network_reader import read_network
from edgelearn.runtime.observers import Observe, See
from edgelearn.runtime.qdq import points_of


@dataclass(frozen=True, slots=True)
class Parts:
    """Parameters, as a form has them.

    Attributes:
        weights: Weight and bias of each layer, float, by prefix.
        in_float: What stays as it is, by its name in the skeleton.
        observe: Shows the float values that become codes, of inputs [n, ...]: `observe(x, see)`.
    """

    weights: Mapping[str, tuple[Tensor, Tensor | None]]
    in_float: Mapping[str, Tensor]
    observe: Observe


class Form(ABC):
    """The quantized form of a network.

    Attributes:
        skeleton: The network with its quantized parts, whose numbers are to be bound.
        layers: What stands before the names of each layer's numbers in the skeleton.
        rounded: The same of values that become codes though no layer takes them.
    """

    skeleton: nn.Module
    layers: tuple[str, ...]
    rounded: tuple[str, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """What stands before the names of each range."""
        return (*self.layers, *self.rounded)

    @abstractmethod
    def parts(self, model: FlatModel, params: Tensor) -> Parts:
        """Return the parts of parameters [P]."""


def form_of(model: FlatModel, shape: tuple[int, ...]) -> Form:
    """Return the form of a network whose inputs have a shape."""
    if _is_quantized(model.module):
        return Layers(model.module)
    try:
        network = read_network(model, shape)
    except UnsupportedError:  # by other engines; here it is served layer by layer
        return Layers(model.module)
    layers = [step.layer for step in network.operators if step.layer is not None]
    if any(layer.norm for layer in layers) or _rounded(network):
        return _Graph(network, model.module)
    return Layers(model.module)


def _rounded(network: Network) -> list[str]:
    """Return the values that become codes though not only layers take them."""
    consumers = network.consumers()
    return [
        value
        for value in (point.carried[-1] for point in points_of(network))
        if value == network.output or any(step.layer is None for step in consumers[value])
    ]


# -- as a graph ------------------------------------------------------------------------------------


@final
class _Graph(Form):
    def __init__(self, network: Network, module: nn.Module) -> None:
        self._network, rounded = network, _rounded(network)
        self.layers = tuple(f"{_module_name(step.name)}." for step in self._layer_steps())
        self.rounded = tuple(f"{_rounded_name(value)}." for value in rounded)
        self._shown: dict[str, list[str]] = {}  # prefixes that see each value
        for step, prefix in zip(self._layer_steps(), self.layers, strict=True):
            self._shown.setdefault(step.inputs[0], []).append(prefix)
        for value, prefix in zip(rounded, self.rounded, strict=True):
            self._shown.setdefault(value, []).append(prefix)
        layers = {step.name: module.get_submodule(step.name) for step in self._layer_steps()}
        self.skeleton = _Skeleton(network, frozenset(rounded), layers).eval()

    def _layer_steps(self) -> list[Operator]:
        return [step for step in self._network.operators if step.layer is not None]

    def parts(self, model: FlatModel, params: Tensor) -> Parts:
        folded = self._network.folded(model, params)

        def observe(x: Tensor, see: See) -> None:
            for name, value in self._network.values(folded, x):
                for prefix in self._shown.get(name, ()):
                    see(prefix, value)

        weights = {f"{_module_name(name)}.": own for name, own in folded.items()}
        return Parts(weights, {}, observe)


@final
class _Skeleton(nn.Module):
    """A network's operators, layers and some values in integers."""

    def __init__(
        self, network: Network, rounded: frozenset[str], layers: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self._network, self._is_rounded = network, rounded
        for name, layer in layers.items():
            self.add_module(_module_name(name), QuantizedLayer(_layer(layer)))
        for value in rounded:
            self.add_module(_rounded_name(value), Rounded())

    def forward(self, x: Tensor) -> Tensor:
        network, out = self._network, x
        for name, value in network.walk(self._made(network.input, x), self._step):
            if name == network.output:
                out = value
        return out

    def _step(self, step: Operator, taken: list[Tensor]) -> Tensor:
        if step.layer is None:
            return self._made(step.output, step.compute(*taken))
        return self._made(step.output, self.get_submodule(_module_name(step.name))(*taken))

    def _made(self, name: str, value: Tensor) -> Tensor:
        if name not in self._is_rounded:
            return value
        rounded: Tensor = self.get_submodule(_rounded_name(name))(value)
        return rounded


def _module_name(name: str) -> str:
    """Return what a layer is called in the skeleton, which is flat: names can't have dots.

    With a colon, so that none is an attribute of modules.
    """
    return f"layer:{name.replace('.', '/')}"


def _rounded_name(value: str) -> str:
    return f"{value}:codes"


# -- layer by layer --------------------------------------------------------------------------------

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@final
class Layers(Form):
    """Integer layers in a float network."""

    rounded = ()

    def __init__(self, module: nn.Module) -> None:
        named = module.named_modules()
        self.layers = tuple(_prefix(name) for name, layer in named if _is_quantized(layer))
        self.skeleton = _with_quantized_layers(module)

    def parts(self, model: FlatModel, params: Tensor) -> Parts:
        """Return the parts; weights and biases are views of the parameters [P]."""
        views, stored = model.layout.views(params), _stored_names(model.module)
        quantized = _quantized_names(model.module)
        # What a layer that stays float shares with a quantized one is kept for it.
        taken = {stored[name] for name in stored if name not in quantized}
        in_float = {
            name: view
            for name, view in views.items()
            if not name.startswith(SHARED) and (name in taken or name not in stored.values())
        }
        return Parts(weights_of(model, params), in_float, partial(self._observe, model, params))

    def _observe(self, model: FlatModel, params: Tensor, x: Tensor, see: See) -> None:
        def hook_of(prefix: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _layer, inputs: see(prefix, inputs[0])

        hooks = [
            model.module.get_submodule(prefix[:-1]).register_forward_pre_hook(hook_of(prefix))
            for prefix in self.layers
        ]
        model.module.eval()
        try:
            model(params, x)
        finally:
            for hook in hooks:
                hook.remove()


def weights_of(model: FlatModel, params: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each layer that is quantized, by prefix: views of parameters [P].

    Layers that share a weight have the same view.
    """
    views, stored = model.layout.views(params), _stored_names(model.module)
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, layer in model.module.named_modules():
        if _is_quantized(layer):
            prefix = _prefix(name)
            bias = stored.get(f"{prefix}bias")
            weight = views[stored[f"{prefix}weight"]]
            found[prefix] = weight, None if bias is None else views[bias]
    return found


def _prefix(name: str) -> str:
    """Return what stands before the names of a module's own tensors."""
    return f"{name}." if name else ""


def _is_quantized(module: nn.Module) -> TypeGuard[Layer]:
    # A subclass may do something else with its weight: it stays float.
    return type(module) in (nn.Linear, nn.Conv2d)


def _layer(module: nn.Module) -> Layer:
    assert _is_quantized(module)  # as the reader of networks has found
    return module


def _stored_names(module: nn.Module) -> dict[str, str]:
    """Return for each parameter its name in the layout: the first of those that share it."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _quantized_names(module: nn.Module) -> set[str]:
    """Return the names of all parameters that quantized layers replace."""
    return {
        f"{_prefix(name)}{leaf}"
        for name, layer in module.named_modules(remove_duplicate=False)
        for leaf in ("weight", "bias")
        if _is_quantized(layer)
    }


def _with_quantized_layers(module: nn.Module) -> nn.Module:
    if _is_quantized(module):
        return _quantized(module).eval()
    skeleton = copy.deepcopy(module).eval()
    made: dict[int, QuantizedLayer] = {}
    for name, layer in list(skeleton.named_modules(remove_duplicate=False)):
        if _is_quantized(layer):
            owner, _, leaf = name.rpartition(".")
            quantized = made.setdefault(id(layer), _quantized(layer))
            setattr(skeleton.get_submodule(owner), leaf, quantized)
    for layer in skeleton.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            # Torch's fast path would take its layers' float weights; hooks keep it off.
            layer.register_forward_pre_hook(_pass_on)
    return skeleton


def _quantized(layer: Layer) -> QuantizedLayer:
    """Return the quantized layer, with the hooks that the float one has."""
    quantized = QuantizedLayer(layer)
    for name in _HOOKS:
        getattr(quantized, name).update(getattr(layer, name))
    return quantized


def _pass_on(_layer: nn.Module, _inputs: object) -> None:
    """Change nothing."""
