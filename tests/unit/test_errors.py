from __future__ import annotations

import pickle

import pytest

from edgelearn import errors
from edgelearn.errors import (
    EdgelearnError,
    ExtraMissingError,
    Fault,
    ScenarioError,
    nearest,
)

LEAVES = [
    "ScenarioError",
    "PluginError",
    "DatasetError",
    "DatasetMissingError",
    "StrategyError",
    "DivergenceError",
    "EgressError",
    "StateError",
    "ExtraMissingError",
    "RunError",
]


def test_the_tree_drawn_in_the_module_is_the_tree():
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, EdgelearnError)
    }
    assert classes == {*LEAVES, "EdgelearnError"}
    for name in LEAVES:
        assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("client", "lr", "is missing"), "[client] lr: is missing"),
        (Fault("client", "lr", "is missing", line=7), "line 7: [client] lr: is missing"),
        (Fault("", "seed", "is missing"), "seed: is missing"),
        (Fault("", "seed", "is missing", line=1), "line 1: seed: is missing"),
    ],
)
def test_a_fault_says_where_it_is(fault, expected):
    assert str(fault) == expected


def test_a_scenario_error_lists_all_faults():
    faults = [Fault("a", "b", "one", 3), Fault("", "c", "two")]
    error = ScenarioError("my.toml", faults)
    assert error.faults == tuple(faults)
    assert str(error) == "my.toml: 2 faults\n  line 3: [a] b: one\n  c: two"
    assert str(ScenarioError("my.toml", faults[:1])).startswith("my.toml: 1 fault\n")


def test_a_missing_extra_says_what_to_install():
    error = ExtraMissingError(package="quadprog", extra="avalanche", needed_for="GEM")
    assert str(error) == "GEM needs the package 'quadprog': pip install 'edgelearn[avalanche]'"


@pytest.mark.parametrize(
    "error",
    [
        ScenarioError("my.toml", [Fault("a", "b", "one", 3)]),
        ExtraMissingError(package="quadprog", extra="avalanche", needed_for="GEM"),
        errors.StateError("damaged"),
        errors.DatasetMissingError("far away", remedy="look closer", is_fetched=True),
    ],
)
def test_errors_survive_the_way_out_of_a_worker_process(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert getattr(back, "faults", None) == getattr(error, "faults", None)


def test_nearest():
    assert nearest("batch", ["batch_size", "epochs", "lr"]) == " (did you mean 'batch_size'?)"
    assert nearest("zzz", ["epochs"]) == ""
    assert nearest("x", []) == ""
