"""Which kind of device each one is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgelearn.errors import StateError
from edgelearn.scenario.kinds import Kinds, deal, kinds_of
from edgelearn.scenario.load import load

SHARES = {"a": 1.0, "b": 2.0, "c": 1.0}


def kinds(args: Mapping[str, Any] | None = None, *, seed: int = 3, **fleet: Any) -> Kinds:
    fleet = {"num_devices": 40, "cohort": 4, "profiles": SHARES, **fleet}
    overrides = {f"fleet.{key}": value for key, value in fleet.items()}
    overrides |= {"runtime.args": args or {}, "seed": seed}
    return kinds_of(load("split-digits", overrides))


def test_devices_are_dealt_out_by_shares() -> None:
    places = deal(SHARES, 40, 3)
    assert np.bincount(places).tolist() == [10, 20, 10]
    assert np.array_equal(places, deal(SHARES, 40, 3))
    assert not np.array_equal(places, deal(SHARES, 40, 4))


def test_what_does_not_differ_is_one_kind() -> None:
    found = kinds({"bits": 8}, width={"a": 1.0})
    assert [kind.name for kind in found.kinds] == ["a, b, c"]
    assert found.places is None
    assert found.of_device(39).runtime_args == {"bits": 8}


def test_kinds_differ_by_width_and_runtime() -> None:
    found = kinds(
        {"bits": 8, "more": 1}, width={"b": 0.5, "c": 0.5}, runtime_args={"c": {"bits": 4}}
    )
    assert [(kind.name, kind.width) for kind in found.kinds] == [("a", 1.0), ("b", 0.5), ("c", 0.5)]
    assert found.widths == (1.0, 0.5)
    assert found.kinds[2].runtime_args == {"bits": 4, "more": 1}
    names = ["abc"[place] for place in deal(SHARES, 40, 3)]
    assert [found.of_device(device).name for device in range(40)] == names


def test_two_profiles_that_hold_and_serve_the_same_are_one_kind() -> None:
    found = kinds(width={"a": 0.5, "c": 0.5})
    assert [kind.name for kind in found.kinds] == ["a, c", "b"]
    assert sum(found.place(device) == 1 for device in range(40)) == 20


@pytest.mark.parametrize("device", [-1, 40])
def test_a_device_that_there_is_not(device: int) -> None:
    with pytest.raises(StateError, match="the fleet has 40, counted from 0"):
        kinds(width={"a": 0.5}).of_device(device)
