"""Which kind of device each one is, and how wide a model that kind holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelearn.scenario.spec import FleetSpec
from edgelearn.seeds import numpy_generator

DEFAULT_KIND = "phone-mid"


def kinds(
    shares: Mapping[str, float], num_devices: int, seed: int
) -> tuple[Sequence[str], NDArray[np.int64]]:
    """Deal out kinds of devices in proportion to their shares.

    Args:
        shares: Kind -> its share, in any unit; empty is a fleet of the default kind.
        num_devices: Devices in the fleet, D.
        seed: The run's seed.

    Returns:
        The kinds, and for each device the place of its kind among them [D].
    """
    names: Sequence[str] = sorted(shares) or [DEFAULT_KIND]
    weights = np.array([shares[name] for name in names] if shares else [1.0])
    cuts = np.round(np.cumsum(weights / weights.sum()) * num_devices).astype(int)
    places = np.searchsorted(cuts, np.arange(num_devices), side="right")
    places = numpy_generator(seed, "profiles").permutation(np.minimum(places, len(names) - 1))
    return names, places


def widths(fleet: FleetSpec, seed: int) -> tuple[float, ...]:
    """Return the width of each device's model, in (0, 1]; none if all hold the whole model.

    It follows from the scenario alone, so that a device and its server agree on it without a word.

    Example:
        >>> fleet = FleetSpec(num_devices=4, cohort=2, width={"phone-mid": 0.5})
        >>> widths(fleet, 0)
        (0.5, 0.5, 0.5, 0.5)
    """
    if all(width == 1 for width in fleet.width.values()):
        return ()
    names, places = kinds(fleet.profiles, fleet.num_devices, seed)
    of_kind = [float(fleet.width.get(name, 1.0)) for name in names]
    return tuple(of_kind[place] for place in places.tolist())
