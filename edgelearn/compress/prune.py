r"""Magnitude pruning: which weights stay, as a flat vector over the trained parameters.

A mask [T] is True where a parameter stays. Biases, and scales and shifts of norms, which are
vectors or scalars, are always among these: they are few, and the network needs them.

References: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
Networks", NeurIPS 2015, arXiv:1506.02626 (threshold); Zhu, Gupta, "To prune, or not to prune:
exploring the efficacy of pruning for model compression", 2017, arXiv:1710.01878, equation 1
(schedule); Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378 (2:4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgelearn.params import Layout

SCOPES = ("global", "layer")
_GROUP, _KEPT = 4, 2  # of the pattern 2:4


def prunable(layout: Layout) -> Tensor:
    """Return which trained parameters may be pruned [T], bool: those of matrices and kernels."""
    may = torch.zeros(layout.num_trained, dtype=torch.bool)
    for place in _weights(layout):
        may[place] = True
    return may


def above(params: Tensor, layout: Layout, epsilon: float) -> Tensor:
    """Keep weights with |w| > epsilon.

    Args:
        params: [T].
        layout: Of these parameters.
        epsilon: At least 0; 0 keeps all that is not 0.

    Returns:
        Mask [T], bool, True where a parameter stays.
    """
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon is {epsilon}; at least 0 is allowed, and finite")
    return (params.abs() > epsilon) | ~prunable(layout)


def largest(params: Tensor, layout: Layout, sparsity: float, *, scope: str = "global") -> Tensor:
    """Keep the weights of largest magnitude, so that round(sparsity n) of n are pruned.

    Of equal ones, those that come first are pruned.

    Args:
        params: [T].
        layout: Of these parameters.
        sparsity: Part that is pruned, in [0, 1].
        scope: "global" compares all weights, "layer" those of each tensor with one another.

    Returns:
        Mask [T], bool, True where a parameter stays.

    Example:
        >>> from torch import nn
        >>> layout = Layout.of(nn.Linear(4, 1))
        >>> largest(torch.tensor([0.1, -3.0, 0.2, 1.0, 0.0]), layout, 0.5)
        tensor([False,  True, False,  True,  True])
    """
    check_sparsity(sparsity)
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; allowed: {', '.join(SCOPES)}")
    mask = torch.ones(layout.num_trained, dtype=torch.bool)
    if scope == "layer":
        for place in _weights(layout):
            mask[place] = _largest(params[place].abs(), sparsity)
    else:
        may = prunable(layout)
        mask[may] = _largest(params[may].abs(), sparsity)
    return mask


def two_of_four(params: Tensor, layout: Layout) -> Tensor:
    """Keep the 2 of largest magnitude among every 4 neighbours of a row.

    A row is what one output unit sees: in_features of a linear layer, in_channels x kernel of a
    convolution, in the order in which they are stored. What is left of a row at its end, fewer than
    4, stays. Of equal ones, those that come first stay.

    Args:
        params: [T].
        layout: Of these parameters.

    Returns:
        Mask [T], bool, True where a parameter stays.
    """
    mask = torch.ones(layout.num_trained, dtype=torch.bool)
    for name, place in zip(_weight_names(layout), _weights(layout), strict=True):
        num_rows = layout.shapes[layout.names.index(name)][0]
        rows = params[place].abs().view(num_rows, -1)
        width = rows.shape[1] // _GROUP * _GROUP
        groups = rows[:, :width].reshape(-1, _GROUP)
        order = groups.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(1, order[:, :_KEPT], torch.ones((), dtype=torch.bool).expand(len(order), 2))
        mask[place].view(num_rows, -1)[:, :width] = kept.view(num_rows, width)
    return mask


def cubic_sparsity(
    step: int, *, begin: int, num_steps: int, final: float, initial: float = 0.0, every: int = 1
) -> float:
    r"""Return the sparsity at a step: s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta t))^3.

    It rises fast at first, when there is much to spare, and slowly at the end. It changes at t_0,
    t_0 + Delta t, ..., t_0 + n Delta t, is 0 before and s_f after.

    Args:
        step: t.
        begin: t_0.
        num_steps: n, at least 0; 0 prunes in one shot at t_0.
        final: s_f, in [0, 1].
        initial: s_i, from 0 to s_f.
        every: Delta t, at least 1.

    Example:
        >>> [cubic_sparsity(t, begin=1, num_steps=2, final=0.5) for t in range(5)]
        [0.0, 0.0, 0.4375, 0.5, 0.5]
    """
    check_sparsity(final)
    if not 0 <= initial <= final:
        raise ValueError(f"initial is {initial}; allowed: 0 to the final {final}")
    if num_steps < 0 or every < 1:
        raise ValueError(
            f"num_steps is {num_steps}, every is {every}; at least 0 and at least 1 are allowed"
        )
    if step < begin:
        return 0.0
    done = (step - begin) // every
    if done >= num_steps:
        return final
    return final + (initial - final) * (1 - done / num_steps) ** 3


def sparsity_of(params: Tensor, layout: Layout) -> float:
    """Return the part of the weights that is 0, of those that may be pruned; params is [T]."""
    may = prunable(layout)
    return float((params[may] == 0).double().mean()) if bool(may.any()) else 0.0


def check_sparsity(sparsity: float) -> None:
    """Refuse what is no part of a whole.

    Raises:
        ValueError: If it is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; allowed: 0 to 1")


def _largest(magnitudes: Tensor, sparsity: float) -> Tensor:
    """Return a mask [n] of the largest; exactly round(sparsity n) are not among them."""
    count = round(sparsity * len(magnitudes))
    if count == 0:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    threshold = magnitudes.kthvalue(count).values
    below, equal = magnitudes < threshold, magnitudes == threshold
    return ~(below | (equal & (equal.cumsum(0) <= count - below.sum())))


def _weight_names(layout: Layout) -> list[str]:
    count = layout.num_trained_tensors
    pairs = zip(layout.names[:count], layout.shapes[:count], strict=True)
    return [name for name, shape in pairs if len(shape) > 1]


def _weights(layout: Layout) -> list[slice]:
    """Return where tensors lie in [T] that may be pruned."""
    return [layout.places[name] for name in _weight_names(layout)]
