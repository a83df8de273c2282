"""Which samples stand best for all: herding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def herded(features: Tensor, count: int) -> Tensor:
    """Return the places of `count` samples whose mean stays closest to the mean of all.

    Greedy: the k-th chosen is the one that brings the mean of the first k closest to that of all,
    so the first m of the order are as good a choice of m as herding makes. With unit features,
    |mu - (sum + phi) / k|^2 is least where phi . (k mu - sum) is largest, one product per sample.
    A sample is chosen once; the smallest place wins a tie.

    Reference: Welling, "Herding dynamical weights to learn", ICML 2009; Rebuffi et al., "iCaRL",
    2017, arXiv:1611.07725, algorithm 4. We differ: that algorithm does not say that a sample is
    chosen only once, and the authors' code walks on where one comes up again.

    Args:
        features: [n, D]; normalized here, zeros stay zeros.
        count: How many to choose; at most n are.

    Returns:
        Places in the order of choice [min(count, n)], int64.
    """
    unit = F.normalize(features.double(), dim=1)
    squares = unit.square().sum(1)  # 1, but 0 for zeros
    mean, total = unit.mean(0), torch.zeros(unit.shape[1], dtype=torch.float64)
    is_chosen = torch.zeros(len(unit), dtype=torch.bool)
    order: list[int] = []
    for k in range(1, min(count, len(unit)) + 1):
        scores = unit @ (k * mean - total) - squares / 2
        place = int(scores.masked_fill(is_chosen, float("-inf")).argmax())
        is_chosen[place] = True
        order.append(place)
        total = total + unit[place]
    return torch.tensor(order, dtype=torch.int64)
