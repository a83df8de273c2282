"""Which kind of device each one is, and what a kind holds and serves.

All of it follows from the scenario alone, so that a device and its server agree without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import StateError
from edgelearn.scenario.spec import FleetSpec, RuntimeSpec
from edgelearn.seeds import numpy_generator

DEFAULT_KIND = "phone-mid"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device.

    Attributes:
        name: Of its profile; several, joined by ", ", where they do not differ in the rest.
        width: Part of each hidden layer that it holds, in (0, 1].
        runtime_args: Arguments of the runtime that it serves with.
    """

    name: str
    width: float
    runtime_args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kinds:
    """The kinds of a fleet.

    Attributes:
        kinds: Those that devices are of; no two hold and serve the same.
        places: Which of them each device is [D]; None if there is one.
    """

    kinds: tuple[Kind, ...]
    places: NDArray[np.int64] | None = None

    def place(self, device: int) -> int:
        """Return the place of a device's kind among the kinds.

        Raises:
            StateError: If there is no such device.
        """
        if self.places is None:
            return 0
        if not 0 <= device < len(self.places):
            count = len(self.places)
            raise StateError(f"there is no device {device}: the fleet has {count}, counted from 0")
        return int(self.places[device])

    def of_device(self, device: int) -> Kind:
        """Return the kind of a device."""
        return self.kinds[self.place(device)]

    @property
    def widths(self) -> tuple[float, ...]:
        """Widths that devices have, falling."""
        return tuple(sorted({kind.width for kind in self.kinds}, reverse=True))


def kinds_of(fleet: FleetSpec, runtime: RuntimeSpec, seed: int) -> Kinds:
    """Return the kinds of a fleet, by what they hold and serve.

    Example:
        >>> fleet = FleetSpec(num_devices=4, cohort=2, width={"phone-mid": 0.5})
        >>> found = kinds_of(fleet, RuntimeSpec(args={"weight_bits": 4}), 0)
        >>> found.of_device(3)
        Kind(name='phone-mid', width=0.5, runtime_args={'weight_bits': 4})
    """
    names = names_of(fleet.profiles)
    found: list[Kind] = []
    place_of = np.empty(len(names), np.int64)
    for place, name in enumerate(names):
        arguments = {**runtime.args, **fleet.runtime_args.get(name, {})}
        width = float(fleet.width.get(name, 1.0))
        for index, kind in enumerate(found):
            if (kind.width, kind.runtime_args) == (width, arguments):
                found[index] = Kind(f"{kind.name}, {name}", width, arguments)
                place_of[place] = index
                break
        else:
            place_of[place] = len(found)
            found.append(Kind(name, width, arguments))
    if len(found) == 1:
        return Kinds(tuple(found))
    return Kinds(tuple(found), place_of[deal(fleet.profiles, fleet.num_devices, seed)])


def names_of(shares: Mapping[str, float]) -> Sequence[str]:
    """Return the names of a fleet's profiles, sorted."""
    return sorted(shares) or [DEFAULT_KIND]


def deal(shares: Mapping[str, float], num_devices: int, seed: int) -> NDArray[np.int64]:
    """Deal out profiles in proportion to their shares.

    Args:
        shares: Name -> its share, in any unit; empty is a fleet of the default kind.
        num_devices: Devices in the fleet, D.
        seed: The run's seed.

    Returns:
        For each device the place of its profile among `names_of` [D].
    """
    names = names_of(shares)
    weights = np.array([shares[name] for name in names] if shares else [1.0])
    cuts = np.round(np.cumsum(weights / weights.sum()) * num_devices).astype(int)
    places = np.searchsorted(cuts, np.arange(num_devices), side="right")
    return numpy_generator(seed, "profiles").permutation(np.minimum(places, len(names) - 1))
