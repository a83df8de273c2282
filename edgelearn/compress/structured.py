"""Structured pruning: whole channels are taken out, so the network is smaller for any engine.

A channel that goes out of one layer comes into the next, into the norm between them, and into all
that a residual sum ties it to; all of it has to go at once. torch-pruning (an extra: `prune`) finds
these groups by following a forward pass. The importance of a channel is the squared Euclidean norm
of its weights in a layer, averaged over the layers and norms of its group.

References: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017,
arXiv:1608.08710 (norms of filters; theirs is L1); Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any
Structural Pruning", CVPR 2023, arXiv:2301.12900 (groups, and the norm over a group).
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgelearn.errors import ExtraMissingError, RunError, StateError
from edgelearn.params import Layout

_PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDING = 1e-9
_FOLLOWING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prune_channels(
    module: nn.Module,
    example: Tensor,
    *,
    ratio: float,
    round_to: int = 1,
    keep: Collection[str] = (),
) -> nn.Module:
    """Return a smaller network, without the channels that matter least.

    The outputs of the last layer that is executed, a classifier's classes, all stay.

    Args:
        module: The network; it stays as it is.
        example: One input or more [B, ...].
        ratio: Part of each layer's channels that goes, in [0, 1); at least one stays.
        round_to: Channels that stay are a multiple of this, as some kernels like it; so some more
            go. A layer with no more than this keeps them all.
        keep: Names of further modules that keep all their outputs.

    Returns:
        A new network in the same mode, train or eval.

    Raises:
        ValueError: If an argument is out of its range.
        ExtraMissingError: If torch-pruning is not installed.
        RunError: If the network has something that channels can't be taken out of; it is named.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; allowed: 0 to less than 1")
    if round_to < 1:
        raise ValueError(f"round_to is {round_to}; at least 1 is allowed")
    pruning = torch_pruning()
    was_training = module.training
    smaller = copy.deepcopy(module).eval()
    for parameter in smaller.parameters():  # the groups are read off the graph of gradients
        parameter.requires_grad_(True)
    _check_supported(smaller)
    parts = dict(smaller.named_modules())
    if missing := [name for name in keep if name not in parts]:
        raise ValueError(f"keep names {missing[0]!r}, which the network does not have")
    last, shape = _last_layer(smaller, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # parameters that it doesn't understand
            pruner = pruning.pruner.BasePruner(
                smaller,
                example,
                importance=pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                pruning_ratio_dict=_ratios(smaller, ratio, round_to),
                round_to=None if round_to == 1 else round_to,
                ignored_layers=[last, *(parts[name] for name in keep)],
            )
            pruner.step()
        with torch.no_grad():
            found = tuple(smaller(example).shape)
    except Exception as error:  # whatever it makes of a network that it can't follow
        raise RunError(
            f"channels of {type(module).__name__} can't be pruned, it has something that "
            f"torch-pruning does not follow: {type(error).__name__}: {error}"
        ) from error
    if found != shape:
        raise RunError(
            f"the pruned network answers {found}, expected {shape}: name the layers that make its "
            "outputs in `keep`"
        )
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(trained[name])
        parameter.grad = None
    return smaller.train(was_training)


def resized(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return a network with smaller layers, so that the tensors of a pruned one fit in.

    Args:
        module: The network as its factory makes it; it stays as it is.
        shapes: Shape of each parameter and floating-point buffer, by name.

    Returns:
        A new network; values of tensors with another shape mean nothing.

    Raises:
        StateError: If names differ, or a shape is not one that pruning could have made.
    """
    made = copy.deepcopy(module)
    whole = Layout.of(made)
    if odd := sorted(set(whole.names).symmetric_difference(shapes)):
        raise StateError(f"the tensors are of another network: {odd[0]!r} is in one of them only")
    for name, full in zip(whole.names, whole.shapes, strict=True):
        shape = tuple(shapes[name])
        if shape == full:
            continue
        owner, _, leaf = name.rpartition(".")
        part = made.get_submodule(owner)
        is_smaller = len(shape) == len(full) and all(map(operator.le, shape, full))
        if not is_smaller or not isinstance(part, (*_PRUNABLE, *_FOLLOWING)):
            raise StateError(
                f"{name} is {shape}; the {type(part).__name__} of the network has {full}, and "
                "pruning channels does not make one of the other"
            )
        value = getattr(part, leaf)
        smaller = value.detach()[tuple(slice(n) for n in shape)].clone()
        if isinstance(value, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=value.requires_grad)
        setattr(part, leaf, smaller)
    for part in made.modules():
        _update_sizes(part)
    return made


def _update_sizes(part: nn.Module) -> None:
    """Bring what a layer says of its sizes in line with its tensors."""
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, _ConvNd):
        if part.groups == part.in_channels == part.out_channels:  # depthwise, or one of each
            part.groups = len(part.weight) if part.groups > 1 else 1
        part.out_channels = len(part.weight)
        part.in_channels = part.weight.shape[1] * part.groups
    elif isinstance(part, _BatchNorm) and part.running_mean is not None:
        part.num_features = len(part.running_mean)


def _check_supported(module: nn.Module) -> None:
    for name, part in module.named_modules():
        own = [leaf for leaf, _ in part.named_parameters(recurse=False)]
        if own and not isinstance(part, (*_PRUNABLE, *_FOLLOWING)):
            raise RunError(
                f"channels can't be pruned: {name or 'the network itself'} is a "
                f"{type(part).__name__} with parameters; allowed are Linear, Conv1d to Conv3d and "
                "BatchNorm1d to BatchNorm3d"
            )


def _ratios(module: nn.Module, ratio: float, round_to: int) -> dict[nn.Module, float]:
    """Return each layer's part that goes; left to itself, torch-pruning skips what would be empty.

    It keeps int(count * (1 - part)) channels, so the part is made a little smaller than it is.
    """
    found: dict[nn.Module, float] = {}
    for part in module.modules():
        if isinstance(part, _PRUNABLE):
            count = part.weight.shape[0]
            most = max(count - round_to, 0) / count
            found[part] = max(min(ratio, most) - _ROUNDING, 0.0)
    return found


def _last_layer(module: nn.Module, example: Tensor) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the layer that is executed last, and the shape of the answer."""
    called: list[nn.Module] = []
    hooks = [
        part.register_forward_pre_hook(lambda layer, _inputs: called.append(layer))
        for part in module.modules()
        if isinstance(part, _PRUNABLE)
    ]
    try:
        with torch.no_grad():
            shape = tuple(module(example).shape)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise RunError("channels can't be pruned: the network has no linear or convolution layer")
    return called[-1], shape


def torch_pruning() -> Any:
    """Return the package.

    Raises:
        ExtraMissingError: If it is not installed.
    """
    try:
        return import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ExtraMissingError(
            package="torch-pruning", extra="prune", needed_for="pruning channels"
        ) from error
