"""The guard admits a reply that is exactly as declared, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgelearn.errors import EgressError
from edgelearn.federated.egress import Schema, consolidate_schema, evaluate_schema, fit_schema
from edgelearn.params import FlatModel

LAYOUT = FlatModel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).layout
FIT = fit_schema(LAYOUT)
EVALUATE = evaluate_schema(3)


def arrays() -> dict[str, Any]:
    return {n: torch.zeros(s) for n, s in zip(LAYOUT.names, LAYOUT.shapes, strict=True)}


def metrics() -> dict[str, Any]:
    return {"num-examples": 3, "loss": 0.5, "num-steps": 2}


def counts() -> dict[str, Any]:
    three = [1, 0, 2]
    return {"num-examples": 3, "model-bytes": 9, "count": three, "served": three, "float": three}


def refusal(schema: Schema, arrays: Any, metrics: Any) -> EgressError:
    with pytest.raises(EgressError, match=r"^not sent: ") as caught:
        schema.admit(arrays, metrics)
    return caught.value


def test_what_is_declared_passes() -> None:
    FIT.admit(arrays(), metrics())
    FIT.admit(dict(reversed(arrays().items())), dict(reversed(metrics().items())))
    consolidate_schema().admit({}, {"num-examples": 0})
    EVALUATE.admit({}, counts())


def test_the_schema_of_training_is_the_models_own() -> None:
    assert list(FIT.arrays) == list(LAYOUT.names)
    assert "1.running_mean" in FIT.arrays
    assert set(FIT.scalars) == {"num-examples", "loss", "num-steps"}
    assert FIT.counts == {}


@pytest.mark.parametrize("name", ["labels", "0.weights", "0.weight "])
def test_another_tensor_does_not_pass(name: str) -> None:
    error = refusal(FIT, {**arrays(), name: torch.zeros(2)}, metrics())
    assert "a tensor that is not declared" in str(error)
    assert "declared: 0.weight, 0.bias" in str(error)


def test_a_missing_tensor_does_not_pass() -> None:
    some = arrays()
    del some["0.bias"]
    assert "the declared tensor '0.bias' is missing" in str(refusal(FIT, some, metrics()))
    assert "'0.weight' is missing" in str(refusal(FIT, {}, metrics()))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, 2),
        torch.zeros(2, 3, 1),
        torch.zeros(6),
        torch.zeros(0),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(2, 3, dtype=torch.uint8),
        np.zeros((2, 3), np.float32),
        [[0.0] * 3] * 2,
        None,
    ],
)
def test_a_tensor_of_another_shape_or_kind_does_not_pass(value: Any) -> None:
    error = refusal(FIT, {**arrays(), "0.weight": value}, metrics())
    assert "'0.weight' is not" in str(error)


@pytest.mark.parametrize("name", ["loss", "num-examples", "num-steps"])
@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        (1,),
        "1.0",
        b"1",
        None,
        True,
        np.float64(1.0),
        np.int64(1),
        torch.tensor(1.0),
        {"a": 1.0},
        1 + 1j,
        math.nan,
        math.inf,
        -math.inf,
    ],
    ids=repr,
)
def test_a_metric_of_another_kind_does_not_pass(name: str, value: Any) -> None:
    error = refusal(FIT, arrays(), {**metrics(), name: value})
    assert f"the metric {name!r} is not" in str(error)


def test_a_whole_number_where_a_float_is_declared_and_the_reverse() -> None:
    refusal(FIT, arrays(), {**metrics(), "loss": 1})
    refusal(FIT, arrays(), {**metrics(), "num-steps": 2.0})


@pytest.mark.parametrize("value", [-1, 2**53 + 1, 10**400, -(10**400)])
def test_whole_numbers_are_bounded(value: int) -> None:
    error = refusal(FIT, arrays(), {**metrics(), "num-examples": value})
    assert "not a whole number from 0 to 2**53" in str(error)
    refusal(EVALUATE, {}, {**counts(), "served": [0, value, 0]})


def test_the_bounds_themselves_pass() -> None:
    FIT.admit(arrays(), {**metrics(), "num-examples": 0, "num-steps": 2**53})


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        [1, 2, 3, 4],
        [],
        (1, 2, 3),
        [1, 2, 3.0],
        [1, 2, True],
        [1, 2, -1],
        [1, 2, "3"],
        [1, 2, [3]],
        7,
        torch.tensor([1, 2, 3]),
        np.array([1, 2, 3]),
    ],
    ids=repr,
)
def test_counts_that_do_not_pass(value: Any) -> None:
    refusal(EVALUATE, {}, {**counts(), "count": value})


def test_phases_do_not_admit_what_others_send() -> None:
    refusal(EVALUATE, arrays(), counts())
    refusal(consolidate_schema(), {}, metrics())
    refusal(consolidate_schema(), {"0.weight": torch.zeros(2, 3)}, {"num-examples": 1})
    refusal(FIT, arrays(), {**metrics(), "count": [1, 2, 3]})


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("more_arrays", "more_metrics"),
    [
        ({SECRET: torch.zeros(1)}, {}),
        ({}, {SECRET: 1.0}),
        ({"0.bias": torch.zeros(5, 3, 1, 7)}, {}),
        ({}, {"loss": SECRET}),
        ({}, {"loss": type(SECRET, (), {})()}),
        ({}, {"num-steps": -5317}),
    ],
)
def test_a_refusal_tells_nothing_of_what_was_found(more_arrays: Any, more_metrics: Any) -> None:
    """It travels to the server; what was found is a note, which stays with the exception."""
    error = refusal(FIT, {**arrays(), **more_arrays}, {**metrics(), **more_metrics})
    assert SECRET not in str(error)
    assert "5, 3, 1, 7" not in str(error)
    assert "5317" not in str(error)
    (note,) = error.__notes__
    assert any(found in note for found in (SECRET, "5, 3, 1, 7", "5317"))
    assert len(note) < 250


def test_a_long_list_of_declared_names_is_cut() -> None:
    schema = Schema(arrays={f"layer{i}.weight": (1,) for i in range(100)})
    error = refusal(schema, {**dict.fromkeys(schema.arrays, torch.zeros(1)), "x": 1}, {})
    assert "(100 in all)" in str(error)
    assert len(str(error)) < 300
