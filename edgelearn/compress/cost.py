"""What a network costs before any engine runs it: parameters, and multiplications for an answer.

A multiply-accumulate (MAC) is one product and its addition to a sum; the 2 operations that some
papers count for it are 1 here. Counted are those of linear and convolution layers, for one input.
Norms, activations, pooling and sums of values are not: they are a few per cent, and engines fold or
fuse them.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from edgelearn.errors import RunError

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Numbers that are trained or could be; what has two names counts once.
        nonzero: Those of them that are not 0.
        macs: Multiply-accumulates of linear and convolution layers for one input, zeros included:
            dense kernels multiply by them. None if there are products that the count does not
            cover.
        uncounted: The operator that makes these; "" if all are counted.
    """

    parameters: int
    nonzero: int
    macs: int | None
    uncounted: str = ""


class UncountedError(RunError):
    """A network multiplies in a way that the count of MACs does not cover.

    Attributes:
        operator: What does.
        why: The message.
    """

    def __init__(self, operator: str, why: str) -> None:
        super().__init__(operator, why)
        self.operator, self.why = operator, why

    def __str__(self) -> str:
        return self.why


def cost(module: nn.Module, example: Tensor) -> Cost:
    """Count what a network costs.

    Args:
        module: The network; it stays as it is.
        example: One input or more [B, ...], B at least 1.

    Example:
        >>> cost(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.zeros(1, 1, 5, 5))
        Cost(parameters=20, nonzero=20, macs=162, uncounted='')
    """
    values = [parameter.detach() for parameter in module.parameters()]
    parameters = sum(value.numel() for value in values)
    nonzero = sum(int(torch.count_nonzero(value)) for value in values)
    try:
        return Cost(parameters, nonzero, count_macs(module, example))
    except UncountedError as error:
        return Cost(parameters, nonzero, None, error.operator)


def count_macs(module: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates for one input.

    Each linear and convolution layer tells its own when it is called, so a layer that is used twice
    counts twice. Torch's own count of what it multiplied must be the same: so what a network
    multiplies outside of its layers is no silent gap.

    Args:
        module: The network; it stays as it is.
        example: One input or more [B, ...].

    Raises:
        UncountedError: If there are products that the count does not cover, such as those of
            attention.
    """
    for name, part in module.named_modules():
        own = [leaf for leaf, _ in part.named_parameters(recurse=False)]
        if own and not isinstance(part, (nn.Linear, _ConvNd, *_NORMS)):
            kind = type(part).__name__
            raise UncountedError(
                kind,
                f"MACs of {kind} ({name or 'the network itself'}) can't be counted; "
                "counted are Linear and convolutions, and norms count nothing",
            )
    total, counter = 0, FlopCounterMode(display=False)
    of_layers: Counter[str] = Counter()  # what torch multiplied within them, by its operator

    def before(_layer: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        of_layers.subtract(_multiplied(counter))

    def after(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += _layer_macs(layer, inputs[0], output)
        of_layers.update(_multiplied(counter))

    seen = copy.deepcopy(module).eval()
    for part in seen.modules():
        if isinstance(part, nn.Linear | _ConvNd):
            part.register_forward_pre_hook(before)
            part.register_forward_hook(after)
    with torch.no_grad(), counter:
        seen(example[:1])
    everything = _multiplied(counter)
    if (multiplied := everything.total()) != total:
        beside = {name for name, num in everything.items() if num != of_layers[name]}
        raise UncountedError(
            ", ".join(sorted(beside)) or "a layer",
            f"the network's layers have {total} MACs, but torch multiplied {multiplied} times: "
            "what it multiplies outside of linear and convolution layers can't be counted",
        )
    return total


def _multiplied(counter: FlopCounterMode) -> Counter[str]:
    """Return the multiplications so far by torch's operator, such as "mm"."""
    found = counter.get_flop_counts().get("Global", {})
    return Counter({str(op).rpartition(".")[2]: flops // 2 for op, flops in found.items()})


def _layer_macs(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    if isinstance(layer, _ConvTransposeNd):  # each number that goes in meets the whole kernel
        return x.numel() * layer.weight[0].numel()
    assert isinstance(layer, _ConvNd)
    return output.numel() * layer.weight[0].numel()
