from __future__ import annotations

import math

from edgelearn.continual.boundaries import Detections, detections


def test_by_hand():
    visits = {0: [1, 3, 5, 6, 8], 1: [2, 9], 2: [4, 7]}
    changes = [[4, 7], [4, 7], []]
    alarms = {
        0: {1: 1, 6: 2, 8: 1},  # false; found at the second visit, and again: false; found
        2: {7: 1},  # nothing ever changes there: false
    }
    # Device 1 was away between the changes: that one does not count, and the second it missed.
    assert detections(visits, alarms, changes) == Detections(
        num_changes=3,
        num_found=2,
        delay=((6 - 4) + (8 - 7)) / 2,
        delay_visits=(1 + 0) / 2,
        num_false=3,
        num_visits=9,
    )


def test_nothing_to_find():
    found = detections({}, {}, [])
    assert (found.num_changes, found.num_found, found.num_false, found.num_visits) == (0, 0, 0, 0)
    assert math.isnan(found.delay)
    assert math.isnan(found.delay_visits)
