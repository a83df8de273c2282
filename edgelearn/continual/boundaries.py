"""How well devices found the boundaries of experiences that they were not told of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Detections:
    """What became of the changes that devices met.

    Attributes:
        num_changes: Changes after which a device took part before the next one.
        num_found: Of these, those after which it noticed one.
        delay: Rounds from the change to the alarm, mean over those found; 0 is the first round with
            new data.
        delay_visits: The same in rounds in which the device took part.
        num_false: Alarms without a change since the last one.
        num_visits: Rounds in which devices took part, summed over devices.
    """

    num_changes: int
    num_found: int
    delay: float
    delay_visits: float
    num_false: int
    num_visits: int


def detections(
    visits: Mapping[int, Sequence[int]],
    alarms: Mapping[int, Mapping[int, int]],
    changes: Sequence[Sequence[int]],
) -> Detections:
    """Compare alarms with changes.

    Args:
        visits: Rounds in which each device took part, ascending.
        alarms: Number of alarms by device and round.
        changes: First rounds with changed data, by device, ascending.
    """
    delays: list[int] = []
    own_delays: list[int] = []
    num_changes = num_false = 0
    for device, rounds in visits.items():
        taken = np.array(rounds)
        raised = alarms.get(device, {})
        # Which stretch between two changes each visit lies in; 0 is before the first.
        stretch = np.searchsorted(np.array(changes[device]), taken, side="right")
        for k in np.unique(stretch).tolist():
            here = taken[stretch == k].tolist()
            noticed = [visit for visit, when in enumerate(here) if raised.get(when)]
            total = sum(raised.get(when, 0) for when in here)
            if k == 0:
                num_false += total
                continue
            num_changes += 1
            if noticed:
                delays.append(here[noticed[0]] - changes[device][k - 1])
                own_delays.append(noticed[0])
                num_false += total - 1
    return Detections(
        num_changes=num_changes,
        num_found=len(delays),
        delay=float(np.mean(delays)) if delays else float("nan"),
        delay_visits=float(np.mean(own_delays)) if own_delays else float("nan"),
        num_false=num_false,
        num_visits=sum(len(rounds) for rounds in visits.values()),
    )
