"""Laws of scenario files: what is written is what is read, and no input ends in a traceback."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from edgelearn.errors import ScenarioError
from edgelearn.scenario.load import from_dict, to_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
PLAIN = st.recursive(
    st.one_of(st.booleans(), INTEGERS, NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
BASE: dict[str, Any] = {
    "name": "toy",
    "data": {"dataset": "digits"},
    "model": {"name": "mlp"},
    "fleet": {"num_devices": 6, "cohort": 3},
    "stream": {"kind": "class-incremental", "num_experiences": 5, "rounds_per_experience": 2},
    "client": {"strategy": "naive", "lr": 0.05},
}


@given(
    title=TEXT,
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    args=st.dictionaries(TEXT, PLAIN, max_size=4),
    profiles=st.dictionaries(TEXT, st.floats(1e-300, 1e300), max_size=3),
)
def test_toml_round_trip(title, seed, lr, args, profiles):
    raw = copy.deepcopy(BASE)
    raw.update(title=title, seed=seed)
    raw["client"].update(lr=lr, args=args)
    raw["fleet"]["profiles"] = profiles
    scenario = from_dict(raw)
    again = from_dict(tomllib.loads(to_toml(scenario)))
    assert again == scenario
    assert again.digest == scenario.digest
    assert from_dict(scenario.as_dict()) == scenario


KEYS = st.sampled_from(
    [
        "name",
        "seed",
        "data",
        "data.dataset",
        "model.args",
        "model.args.x",
        "fleet",
        "fleet.cohort",
        "fleet.num_devices",
        "fleet.profiles",
        "fleet.profiles.pi",
        "stream.kind",
        "client.lr",
        "client.lr.x",
        "client.strategy",
        "server.strategy",
        "evaluate.num_devices",
        "unknown",
        "unknown.key",
        "client.unknown",
        "",
        ".",
        "client.",
    ]
)
ANYTHING = st.one_of(PLAIN, st.floats(), st.integers(), st.none(), st.dates())


@example(
    overrides={"client.strategy": "~nobody-here/x.py:X", "server.strategy": "~nobody-here/x.py:X"}
)
@given(overrides=st.dictionaries(KEYS, ANYTHING, max_size=5))
def test_whatever_is_wrong_is_a_fault(overrides):
    text = "".join(f"# line {i}\n" for i in range(5))
    try:
        scenario = from_dict(copy.deepcopy(BASE), overrides=overrides, text=text)
    except ScenarioError as error:
        scenario, faults, message = None, error.faults, str(error)
    if scenario is None:
        assert faults
        assert len(set(faults)) == len(faults)
        assert f"{len(faults)} fault" in message
    else:
        assert from_dict(tomllib.loads(to_toml(scenario))) == scenario
