"""Class statistics over a frozen network: what nearest class means and streaming LDA share.

The network's body is trained until it is frozen; from then on its features mean the same for ever,
so statistics of them are exact, whatever comes later. Both methods are linear in the features, so
their classifier is written into the network's last layer, and any runtime serves it.

The body freezes with the end of experience `frozen_after` - 1, on the global parameters that all
devices then have. Statistics of features that still change would be stale, so a device begins to
gather them with that experience: what it saw in earlier ones is not in them (none with the default
of 1). A server strategy with momentum goes on moving the body after devices send zeros: use FedAvg.

An int8 runtime takes the ranges of activations from samples that the device has at hand. Where the
features of earlier classes reach much further than those of the current ones they are cut off; a
few kept samples prevent it (`slda+replay`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelearn.continual.features import features, last_linear
from edgelearn.continual.memory import Memory, TensorSpec
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples

_ROWS = 1024
_BELOW = 100.0  # in units of a large feature times the largest weight
_SMALLEST = 0.01  # a feature is taken for at least that: inputs behind dead units have the step 1


@dataclass(frozen=True, slots=True)
class Observed:
    """Samples as a frozen network sees them.

    Attributes:
        features: [n, d], float64.
        labels: [n], int64.
    """

    features: Tensor
    labels: Tensor

    @property
    def mark(self) -> Tensor:
        """By what these samples are known again [d + 1]: their number, and the features' sum."""
        count = torch.tensor([float(len(self.labels))])
        return torch.cat([count, self.features.sum(0).float()])


@torch.no_grad()
def observe(model: FlatModel, params: Tensor, data: Samples) -> Observed:
    """Return the features of samples in their order, with the network in the mode that it is in."""
    parts, labels = [], []
    for start in range(0, len(data), _ROWS):
        batch = data.batch(slice(start, start + _ROWS))
        parts.append(features(model, params, batch.x).double())
        labels.append(batch.y)
    if not parts:
        none = torch.empty(0, last_linear(model).num_features, dtype=torch.float64)
        return Observed(none, torch.empty(0, dtype=torch.int64))
    return Observed(torch.cat(parts), torch.cat(labels))


def declare(model: FlatModel) -> dict[str, TensorSpec]:
    """Declare class means and counts, how far the device is, and what it took in last.

    Raises:
        StrategyError: If the network does not end in a linear layer with a bias.
    """
    head = last_linear(model)
    if head.bias is None:
        raise StrategyError("a classifier of class statistics needs a last layer with a bias")
    classes, size = head.num_classes, head.num_features
    return {
        "means": TensorSpec((classes, size)),
        "counts": TensorSpec((classes,), torch.int64),
        "begun": TensorSpec((1,), torch.int64),
        "finished": TensorSpec((1,), torch.int64),
        "latest": TensorSpec((size + 1,)),
    }


def begun(memory: Memory) -> Memory:
    """Return the memory when an experience begins."""
    return memory.replace(begun=memory["begun"] + 1)


def finished(memory: Memory) -> Memory:
    """Return the memory when an experience has ended."""
    return memory.replace(finished=memory["finished"] + 1)


def is_trained(memory: Memory, frozen_after: int) -> bool:
    """Whether the body is trained in the experience that has begun."""
    return int(memory["begun"]) <= frozen_after


def is_settled(memory: Memory, frozen_after: int) -> bool:
    """Whether the body does not change any more, as far as this device knows."""
    return int(memory["finished"]) >= frozen_after


def is_known(seen: Observed, memory: Memory) -> bool:
    """Whether samples are those that were taken in last; recomputed features may differ a little.

    After consolidation, and before the next experience, a device still has them at hand.
    """
    return torch.allclose(seen.mark, memory["latest"], rtol=1e-4, atol=1e-4)


def merged_means(memory: Memory, seen: Observed) -> tuple[Tensor, Tensor]:
    """Return class means [C, d], float64, and counts [C] with more samples taken in.

    mu_c <- (n_c mu_c + sum of the new) / (n_c + number of the new): what adding one sample after
    another comes to.
    """
    counts = memory["counts"]
    totals = memory["means"].double() * counts[:, None]
    totals = totals.index_add(0, seen.labels, seen.features)
    counts = counts + torch.bincount(seen.labels, minlength=len(counts))
    return totals / counts.clamp(min=1)[:, None], counts


def with_classifier(
    model: FlatModel, params: Tensor, weight: Tensor, bias: Tensor, means: Tensor, counts: Tensor
) -> Tensor:
    """Write a linear classifier of features into a network's last layer.

    - What all rows have in common changes no answer, but costs an int8 code, which spans the row's
      largest weight, its resolution: the mean row and bias of the classes seen are subtracted.
    - A class without samples gets the row of one with, and a bias that is lower by about a hundred
      times what a weight and a feature can make: it loses to that class on every input, in float
      and in integers alike, for equal rows have equal codes. For features of usual size that is
      thousands to millions of steps of the quantized bias: neither nothing nor beyond 32 bits.
      Steps are in proportion to a row's largest weight, so the row with the largest is taken.

    Args:
        model: The network.
        params: [P]; not changed.
        weight: [C, d].
        bias: [C].
        means: Class means [C, d].
        counts: Samples of each class [C]; at least one is not 0.

    Returns:
        [P].
    """
    head, known = last_linear(model), counts > 0
    weight, bias = weight - weight[known].mean(0), bias - bias[known].mean()
    widest = weight.abs().amax(1).masked_fill(~known, -1).argmax()
    row, level = weight[widest], bias[widest]
    largest, feature = row.abs().max(), means.abs().max().clamp(min=_SMALLEST)
    below = _BELOW * feature * torch.where(largest > 0, largest, torch.ones_like(largest))
    out = params.clone()
    head.weights(out).copy_(torch.where(known[:, None], weight, row))
    biases = head.biases(out)
    assert biases is not None  # `declare` refuses a head without
    biases.copy_(torch.where(known, bias, level - below))
    return out
