"""Which kind of device each one is, and what a kind holds and serves.

All of it follows from the scenario alone, so that a device and its server agree without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import StateError
from edgelearn.scenario.spec import Scenario
from edgelearn.seeds import numpy_generator

DEFAULT_KIND = "phone-mid"
BASE = ""  # the network of [model] itself, held by the devices that no variant takes


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device.

    Attributes:
        name: Of its profile; several, joined by ", ", where they do not differ in the rest.
        variant: Which of the scenario's networks it holds; "" is that of `[model]`.
        width: Part of each of its hidden layers that it holds, in (0, 1].
        runtime_args: Arguments of the runtime that it serves with.
    """

    name: str
    variant: str = BASE
    width: float = 1.0
    runtime_args: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def network(self) -> tuple[str, float]:
        """Variant and width; kinds that agree in them learn alike."""
        return self.variant, self.width


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

    def places_of(self, num_devices: int) -> NDArray[np.int64]:
        """Return the places of all devices' kinds [D]."""
        return np.zeros(num_devices, np.int64) if self.places is None else self.places

    @property
    def widths(self) -> tuple[float, ...]:
        """Widths that devices have, falling."""
        return tuple(sorted({kind.width for kind in self.kinds}, reverse=True))


def kinds_of(scenario: Scenario) -> Kinds:
    """Return the kinds of a fleet, by what they hold and serve.

    All of it goes by the devices' profiles; only variants may be dealt out instead, by their shares
    of the fleet.

    Example:
        >>> from edgelearn.scenario.load import load
        >>> found = kinds_of(load("split-digits", {"fleet.width": {"phone-mid": 0.5}}))
        >>> found.of_device(3).network
        ('', 0.5)
    """
    fleet, shares = scenario.fleet, _shares(scenario)
    names = names_of(fleet.profiles)
    found: list[Kind] = []
    place_of = np.empty((len(names), len(shares)), np.int64)
    for row, name in enumerate(names):
        for column, kind in enumerate(kinds_with(scenario, name)):
            place_of[row, column] = _place(kind, found)
    if len(found) == 1:
        return Kinds(tuple(found))
    rows = deal(fleet.profiles, fleet.num_devices, scenario.seed)
    columns = deal(shares, fleet.num_devices, scenario.seed, purpose="variants")
    return Kinds(tuple(found), place_of[rows, columns])


def kinds_with(scenario: Scenario, profile: str) -> tuple[Kind, ...]:
    """Return the kinds that devices with a profile are of, one for each network that is dealt out.

    Args:
        scenario: The scenario.
        profile: As `[fleet] profiles` names it, or any other: then what it does not say by profile.
    """
    fleet, variants = scenario.fleet, scenario.model.variants
    by_profile = {spec.profile: variant for variant, spec in variants.items() if spec.profile}
    arguments = {**scenario.runtime.args, **fleet.runtime_args.get(profile, {})}
    width = float(fleet.width.get(profile, 1.0))
    return tuple(
        Kind(profile, by_profile.get(profile, variant), width, arguments)
        for variant in names_of(_shares(scenario))
    )


def _shares(scenario: Scenario) -> Mapping[str, float]:
    """Return the share of the fleet for each network that is dealt out."""
    shares = {name: spec.share for name, spec in scenario.model.variants.items() if spec.share}
    if (rest := 1 - sum(shares.values())) > 1e-9:
        shares[BASE] = rest
    return shares


def _place(kind: Kind, found: list[Kind]) -> int:
    """Return the place of a kind among those found; it joins one that holds and serves the same."""
    for place, other in enumerate(found):
        if (other.network, other.runtime_args) == (kind.network, kind.runtime_args):
            found[place] = replace(other, name=f"{other.name}, {kind.name}")
            return place
    found.append(kind)
    return len(found) - 1


def names_of(shares: Mapping[str, float]) -> Sequence[str]:
    """Return the names of what is dealt out, sorted; of a fleet without profiles the default."""
    return sorted(shares) or [DEFAULT_KIND]


def deal(
    shares: Mapping[str, float], num_devices: int, seed: int, *, purpose: str = "profiles"
) -> NDArray[np.int64]:
    """Deal out profiles, or networks, in proportion to their shares.

    Args:
        shares: Name -> its share, in any unit; empty is a fleet of the default kind.
        num_devices: Devices in the fleet, D.
        seed: The run's seed.
        purpose: What is dealt out; part of the seed.

    Returns:
        For each device the place of what it gets among `names_of` [D].

    Example:
        >>> sorted(deal({"large": 1.0, "small": 3.0}, 4, 0).tolist())
        [0, 1, 1, 1]
    """
    names = names_of(shares)
    weights = np.array([shares[name] for name in names] if shares else [1.0])
    cuts = np.round(np.cumsum(weights / weights.sum()) * num_devices).astype(int)
    places = np.searchsorted(cuts, np.arange(num_devices), side="right")
    return numpy_generator(seed, purpose).permutation(np.minimum(places, len(names) - 1))
