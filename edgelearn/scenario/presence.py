"""Which devices are there at which position: some join late, some leave early."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.spec import FleetSpec
from edgelearn.seeds import numpy_generator


@dataclass(frozen=True, slots=True)
class Presence:
    """When each device is part of the fleet.

    Attributes:
        joins: First position at which it is there [D].
        leaves: First position at which it no longer is [D]; T where it stays.
    """

    joins: NDArray[np.int64]
    leaves: NDArray[np.int64]

    def at(self, position: int) -> NDArray[np.bool_]:
        """Return who is there at a position [D]."""
        return (self.joins <= position) & (position < self.leaves)


def presence(fleet: FleetSpec, num_experiences: int, seed: int) -> Presence | None:
    """Draw who joins late and who leaves early; None if nobody does.

    As many devices as the shares say, rounded, join at one of the positions 1..T-1 or leave before
    one of them, each position with the same chance. No device does both unless the shares are more
    than all together; it is then there for a position at least.

    Raises:
        ScenarioError: If at some position too few are left for a cohort.
    """
    if fleet.late_share == 0 and fleet.leaving_share == 0:
        return None
    count, T = fleet.num_devices, num_experiences
    generator = numpy_generator(seed, "presence")
    order = generator.permutation(count)
    joins, leaves = np.zeros(count, np.int64), np.full(count, T, np.int64)
    late = order[: round(fleet.late_share * count)]
    leaving = order[count - round(fleet.leaving_share * count) :]
    both = np.isin(late, leaving)
    joins[late] = generator.integers(1, np.where(both, T - 1, T), len(late))
    leaves[leaving] = generator.integers(joins[leaving] + 1, T, len(leaving))
    found = Presence(joins, leaves)
    for position in range(T):
        if (there := int(found.at(position).sum())) < fleet.cohort:
            message = f"got {fleet.cohort}; {there} devices are there at position {position}"
            raise ScenarioError("fleet", [Fault("fleet", "cohort", message)])
    return found
