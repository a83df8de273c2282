from __future__ import annotations

import numpy as np
import pytest

from edgelearn.errors import ScenarioError
from edgelearn.scenario.presence import presence
from edgelearn.scenario.spec import FleetSpec


def fleet(num_devices=100, cohort=1, **shares):
    return FleetSpec(num_devices=num_devices, cohort=cohort, **shares)


def test_all_are_there_unless_the_scenario_says_otherwise():
    assert presence(fleet(), 5, 0) is None


def test_as_many_join_late_and_leave_early_as_the_shares_say():
    found = presence(fleet(late_share=0.3, leaving_share=0.2), 5, 0)
    late, leaving = found.joins > 0, found.leaves < 5
    assert (late.sum(), leaving.sum(), (late & leaving).sum()) == (30, 20, 0)
    assert set(found.joins[late]) == set(found.leaves[leaving]) == {1, 2, 3, 4}


def test_those_that_do_both_are_there_for_a_while():
    found = presence(fleet(late_share=0.9, leaving_share=0.8), 4, 0)
    assert (found.joins > 0).sum() == 90
    assert (found.leaves < 4).sum() == 80
    assert (found.joins < found.leaves).all()
    everywhere = [found.at(position).sum() for position in range(4)]
    assert min(everywhere) > 0
    assert sum(everywhere) == (found.leaves - found.joins).sum()


def test_all_may_be_late_but_then_nobody_is_there_at_first():
    with pytest.raises(ScenarioError, match="cohort: got 1; 0 devices are there at position 0"):
        presence(fleet(late_share=1.0), 3, 0)


def test_too_few_for_a_cohort():
    late = {"late_share": 0.5}
    presence(fleet(10, 5, **late), 2, 0)
    with pytest.raises(ScenarioError, match="cohort: got 6; 5 devices are there at position 0"):
        presence(fleet(10, 6, **late), 2, 0)
    with pytest.raises(ScenarioError, match="cohort: got 6; 5 devices are there at position 1"):
        presence(fleet(10, 6, leaving_share=0.5), 2, 0)


def test_it_depends_on_the_seed_alone():
    spec = fleet(late_share=0.5, leaving_share=0.3)
    first, again, other = (presence(spec, 6, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.joins, again.joins)
    assert np.array_equal(first.leaves, again.leaves)
    assert not np.array_equal(first.joins, other.joins)
