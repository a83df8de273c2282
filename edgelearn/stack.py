"""Plain stacks of layers, which engines can train without autograd.

A stack is a `nn.Sequential` (nested ones too) of `Linear`, `Conv2d`, `ReLU`, `MaxPool2d` and
`Flatten` that ends in logits. Its structure is data, so a forward pass, a gradient, a training step
or a compiled plan can be written out. Whatever else a network does makes it no stack, and autograd
trains it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.params import FlatModel


class NotAStackError(ValueError):
    """A network is no plain stack; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b; `weight` and `bias` are places in the flat vector (bias -1: none)."""

    weight: int
    bias: int
    fan_in: int
    fan_out: int


@dataclass(frozen=True, slots=True)
class Conv2d:
    """Convolution with stride 1 and zero padding; W is [channels_out, channels_in, *kernel]."""

    weight: int
    bias: int
    channels_in: int
    channels_out: int
    kernel: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ReLU:
    """max(x, 0)."""


@dataclass(frozen=True, slots=True)
class MaxPool2d:
    """Largest value of each `size` x `size` cell; what is left over at the border is dropped."""

    size: int


@dataclass(frozen=True, slots=True)
class Flatten:
    """All dimensions but the first into one."""


Layer = Linear | Conv2d | ReLU | MaxPool2d | Flatten


@dataclass(frozen=True, slots=True)
class Stack:
    """The structure of a plain stack.

    Attributes:
        layers: In order.
        input_shape: Shape of one sample.
        num_params: Length of the flat vector, P.
    """

    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    num_params: int

    @classmethod
    def of(cls, model: FlatModel, input_shape: tuple[int, ...]) -> Stack:
        """Recognize a network.

        Args:
            model: The network.
            input_shape: Shape of one sample.

        Raises:
            NotAStackError: With the reason, if it is not a plain stack.
        """
        layout = model.layout
        count = layout.num_trained_tensors
        names, sizes = layout.names[:count], layout.sizes[:count]
        ends = itertools.accumulate(sizes)
        places = {n: e - s for n, e, s in zip(names, ends, sizes, strict=True)}
        layers: list[Layer] = []
        for name, module in leaves(model.module):
            try:
                layers += _layer(name, module, places)
            except NotAStackError as error:
                where = f" (layer {name!r})" if name else ""
                raise NotAStackError(f"{error}{where}") from None
        if layout.num_trained != layout.num_network:
            raise NotAStackError("some of its tensors are not trained by gradient")
        owned = [place for layer in layers for place in _places_of(layer)]
        if sorted(owned) != sorted(places.values()):
            raise NotAStackError("layers share parameters")
        shape = input_shape
        for layer in layers:
            shape = _shape_after(layer, shape)
        if not layers or not isinstance(layers[-1], Linear):
            raise NotAStackError("it does not end in a linear layer")
        return cls(tuple(layers), input_shape, layout.num_trained)

    @property
    def is_linear(self) -> bool:
        """Whether it is linear layers with or without ReLU between them, and nothing else."""
        layers = [layer for layer in self.layers if not isinstance(layer, Flatten)]
        return isinstance(layers[0], Linear) and all(isinstance(y, Linear | ReLU) for y in layers)

    @property
    def linears(self) -> tuple[tuple[Linear, bool], ...]:
        """Each linear layer and whether a ReLU follows it; for stacks that are `is_linear`."""
        found: list[tuple[Linear, bool]] = []
        for layer in self.layers:
            if isinstance(layer, Linear):
                found.append((layer, False))
            elif isinstance(layer, ReLU) and found:
                found[-1] = (found[-1][0], True)
        return tuple(found)


def stack_of(model: FlatModel, input_shape: tuple[int, ...]) -> Stack | None:
    """Return a network's structure, or None if it is no plain stack; remembered by network."""
    found = _found.setdefault(model.module, {})
    if input_shape not in found:
        try:
            found[input_shape] = Stack.of(model, input_shape)
        except NotAStackError:
            found[input_shape] = None
    return found[input_shape]


_found: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Stack | None]] = WeakKeyDictionary()


def _shape_after(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a sample behind a layer."""
    if isinstance(layer, Flatten):
        return (math.prod(shape),)
    if isinstance(layer, Linear):
        if shape != (layer.fan_in,):
            raise NotAStackError(f"a linear layer gets samples of shape {shape}, not flat ones")
        return (layer.fan_out,)
    if isinstance(layer, Conv2d):
        if len(shape) != 3:
            raise NotAStackError(f"a convolution gets samples of shape {shape}")
        sides = zip(shape[1:], layer.kernel, layer.padding, strict=True)
        return (layer.channels_out, *(side + 2 * pad - k + 1 for side, k, pad in sides))
    if isinstance(layer, MaxPool2d):
        if len(shape) != 3:
            raise NotAStackError(f"a pooling gets samples of shape {shape}")
        return (shape[0], shape[1] // layer.size, shape[2] // layer.size)
    return shape


def leaves(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """Return what nested `nn.Sequential`s consist of, in order, with names."""
    if type(module) is not nn.Sequential:
        return [(name, module)]
    _refuse_hooks(module)
    prefix = f"{name}." if name else ""
    return [leaf for n, child in module.named_children() for leaf in leaves(child, f"{prefix}{n}")]


def _layer(name: str, module: nn.Module, places: dict[str, int]) -> list[Layer]:
    """Return the layer of a leaf; none if it does nothing."""
    _refuse_hooks(module)
    prefix = f"{name}." if name else ""

    def place(leaf: str) -> int:
        return places.get(f"{prefix}{leaf}", -1)

    kind = type(module)
    if kind is nn.Linear:
        assert isinstance(module, nn.Linear)
        bias = place("bias")
        return [Linear(place("weight"), bias, module.in_features, module.out_features)]
    if kind is nn.Conv2d:
        assert isinstance(module, nn.Conv2d)
        return [_convolution(module, place("weight"), place("bias"))]
    if kind is nn.ReLU:
        return [ReLU()]
    if kind is nn.MaxPool2d:
        assert isinstance(module, nn.MaxPool2d)
        size = module.kernel_size
        plain = (module.padding, module.dilation, module.ceil_mode) == (0, 1, False)
        if not (isinstance(size, int) and module.stride == size and plain):
            raise NotAStackError("MaxPool2d is more than disjoint square cells")
        return [MaxPool2d(size)]
    if kind is nn.Flatten:
        assert isinstance(module, nn.Flatten)
        if (module.start_dim, module.end_dim) != (1, -1):
            raise NotAStackError("Flatten keeps more than the first dimension")
        return [Flatten()]
    if kind is nn.Identity:
        return []
    raise NotAStackError(f"{kind.__name__} is neither Linear, Conv2d, ReLU, MaxPool2d nor Flatten")


def _convolution(module: nn.Conv2d, weight: int, bias: int) -> Conv2d:
    plain = (module.stride, module.dilation, module.groups, module.padding_mode)
    if plain != ((1, 1), (1, 1), 1, "zeros") or isinstance(module.padding, str):
        raise NotAStackError("Conv2d has a stride, dilation, groups or padding other than zeros")
    rows, columns = module.kernel_size
    top, left = module.padding
    return Conv2d(
        weight,
        bias,
        module.in_channels,
        module.out_channels,
        (rows, columns),
        (int(top), int(left)),
    )


def _refuse_hooks(module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise NotAStackError("a module has hooks")


def _places_of(layer: Layer) -> list[int]:
    if not isinstance(layer, Linear | Conv2d):
        return []
    return [layer.weight] if layer.bias < 0 else [layer.weight, layer.bias]


# -- linear stacks, written out --------------------------------------------------------------------


class LinearStack:
    """Forward and backward passes of a linear stack on one flat vector, in place.

    Args:
        stack: Its structure; `is_linear`.
        params: Vector [P], the parameters; `step` changes it.
    """

    def __init__(self, stack: Stack, params: Tensor) -> None:
        self._linears = stack.linears
        self._weights = [_weight_of(params, layer) for layer, _ in self._linears]
        self._biases = [_bias_of(params, layer) for layer, _ in self._linears]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the input of each layer and the logits [B, C]."""
        inputs, z = [], x.flatten(1)
        for (_, relu), weight, bias in zip(self._linears, self._weights, self._biases, strict=True):
            inputs.append(z)
            z = F.linear(z, weight, bias)
            if relu:
                z.relu_()
        return inputs, z

    def step(self, inputs: list[Tensor], delta: Tensor, *, lr: float, decay: float = 0.0) -> None:
        """Take a step of SGD, theta <- (1 - lr decay) theta - lr dL/dtheta; no gradient is written.

        Args:
            inputs: Of the forward pass.
            delta: dL/dlogits [B, C].
            lr: Learning rate.
            decay: Weight decay.
        """
        keep = 1.0 - lr * decay
        for index in range(len(inputs) - 1, -1, -1):
            weight, bias, x = self._weights[index], self._biases[index], inputs[index]
            below = delta.mm(weight) if index else None
            weight.addmm_(delta.t(), x, beta=keep, alpha=-lr)
            if bias is not None:
                if decay:
                    bias.mul_(keep)
                bias.sub_(delta.sum(0), alpha=lr)
            if below is not None:
                delta = self._through_relu(index, below, x)

    def gradient(self, inputs: list[Tensor], delta: Tensor, out: Tensor) -> None:
        """Write dL/dtheta into `out` [P]."""
        for index in range(len(inputs) - 1, -1, -1):
            layer, x = self._linears[index][0], inputs[index]
            torch.mm(delta.t(), x, out=_weight_of(out, layer))
            if layer.bias >= 0:
                torch.sum(delta, 0, out=_bias_of(out, layer))
            if index:
                delta = self._through_relu(index, delta.mm(self._weights[index]), x)

    def squared_gradients(self, inputs: list[Tensor], deltas: Tensor, out: Tensor) -> None:
        """Add the squared gradient of each sample to `out` [P].

        The gradient of sample b with respect to W is delta_b x_b^T, so the sum of its squares is
        (delta^2)^T (x^2): one product, exact.

        Args:
            inputs: Of the forward pass.
            deltas: Each sample's own dL_b/dlogits_b [B, C].
            out: [P].
        """
        for index in range(len(inputs) - 1, -1, -1):
            layer, x = self._linears[index][0], inputs[index]
            squares = deltas.square()
            _weight_of(out, layer).addmm_(squares.t(), x.square())
            if layer.bias >= 0:
                bias = _bias_of(out, layer)
                assert bias is not None
                bias.add_(squares.sum(0))
            if index:
                deltas = self._through_relu(index, deltas.mm(self._weights[index]), x)

    def _through_relu(self, index: int, delta: Tensor, activated: Tensor) -> Tensor:
        """Return dL/dz of the layer below from dL/d(its output)."""
        if not self._linears[index - 1][1]:
            return delta
        below: Tensor = torch.ops.aten.threshold_backward(delta, activated, 0.0)
        return below


def _weight_of(flat: Tensor, layer: Linear) -> Tensor:
    size = layer.fan_in * layer.fan_out
    return flat[layer.weight : layer.weight + size].view(layer.fan_out, layer.fan_in)


def _bias_of(flat: Tensor, layer: Linear) -> Tensor | None:
    return None if layer.bias < 0 else flat[layer.bias : layer.bias + layer.fan_out]


def cross_entropy(
    logits: Tensor, y: Tensor, weight: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the loss (scalar) and its derivative by the logits [B, C].

    Args:
        logits: [B, C].
        y: Labels [B], int64.
        weight: Of each sample [B]; None is the mean.
        mask: Classes that count [B, C], bool; None is all.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    logs = torch.log_softmax(logits, 1)
    picked = logs.gather(1, y[:, None])
    delta = logs.exp_()
    delta.scatter_add_(1, y[:, None], torch.full_like(picked, -1.0))
    if weight is None:
        return -picked.mean(), delta.mul_(1.0 / len(y))
    return -(picked[:, 0] * weight).sum(), delta.mul_(weight[:, None])
