"""Kinds dealt out over a fleet in proportion to shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgelearn.seeds import numpy_generator


def dealt(shares: Mapping[str, float], num_devices: int, seed: int, purpose: str) -> list[str]:
    """Give each device a kind, in proportion to the shares, the same for every call.

    Args:
        shares: Kind -> its share, above 0; they need not sum to 1.
        num_devices: Devices in the fleet.
        seed: The run's seed.
        purpose: What is dealt out; part of the seed.

    Example:
        >>> sorted(dealt({"large": 1.0, "small": 3.0}, 4, 0, "networks"))
        ['large', 'small', 'small', 'small']
    """
    names = sorted(shares)
    weights = np.array([shares[name] for name in names])
    cuts = np.round(np.cumsum(weights / weights.sum()) * num_devices).astype(int)
    kinds = np.searchsorted(cuts, np.arange(num_devices), side="right")
    kinds = numpy_generator(seed, purpose).permutation(np.minimum(kinds, len(names) - 1))
    return [names[int(kind)] for kind in kinds]
