"""HeteroFL's aggregation, against a slow loop over single numbers, and against FedAvg."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelearn.errors import RunError
from edgelearn.federated.heterofl import HeteroFL
from edgelearn.federated.server import restore, snapshot
from edgelearn.fleet.grid import FleetGrid

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict  # isort: skip
from flwr.serverapp.strategy import FedAvg  # isort: skip

SHAPES = {"w": (4, 3), "b": (4,), "k": (2, 3, 2, 2)}
HALF = {"w": (2, 3), "b": (2,), "k": (2, 2, 2, 2)}
QUARTER = {"w": (1, 2), "b": (1,), "k": (1, 2, 2, 2)}
Arrays = dict[str, NDArray[np.float32]]


def some(shapes: dict[str, tuple[int, ...]], seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {n: generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def record_of(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})


def aggregate(strategy: FedAvg, whole: Arrays, sent: list[tuple[Arrays, int]]) -> Arrays | None:
    grid = FleetGrid(lambda messages: [], num_devices=len(sent))
    asked = list(strategy.configure_train(1, record_of(whole), ConfigRecord(), grid))
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": record_of(arrays),
                    "metrics": MetricRecord({"num-examples": count, "loss": float(count)}),
                }
            ),
            reply_to=message,
        )
        for message, (arrays, count) in zip(asked, sent, strict=True)
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    total = sum(count for _, count in sent)
    assert metrics["loss"] == pytest.approx(sum(c * c for _, c in sent) / total)
    return None if arrays is None else {name: array.numpy() for name, array in arrays.items()}


def strategy() -> HeteroFL:
    return HeteroFL(min_train_nodes=1, min_available_nodes=1)


def test_each_number_is_the_mean_of_those_who_hold_it() -> None:
    whole = some(SHAPES, 0)
    sent = [(some(HALF, 1), 3), (some(QUARTER, 2), 10), (some(HALF, 3), 1)]
    found = aggregate(strategy(), whole, sent)
    assert found is not None
    for name, values in found.items():
        assert values.dtype == np.float32
        for index in itertools.product(*map(range, SHAPES[name])):
            held = [
                (arrays[name][index], count)
                for arrays, count in sent
                if all(i < n for i, n in zip(index, arrays[name].shape, strict=True))
            ]
            expected = float(whole[name][index])
            if held:
                expected = sum(float(v) * n for v, n in held) / sum(n for _, n in held)
            assert values[index] == pytest.approx(expected, abs=1e-6), (name, index)
    assert np.array_equal(found["w"][2:], whole["w"][2:])  # nobody holds it: the same bits
    assert np.array_equal(found["k"][:, 2:], whole["k"][:, 2:])


def test_whole_models_are_averaged_as_fedavg_does_to_the_last_bit() -> None:
    sent = [(some(SHAPES, seed), 3 + seed) for seed in range(3)]
    ours = aggregate(strategy(), some(SHAPES, 9), sent)
    theirs = aggregate(FedAvg(min_train_nodes=1, min_available_nodes=1), some(SHAPES, 9), sent)
    assert ours is not None
    assert theirs is not None
    assert all(np.array_equal(ours[name], theirs[name]) for name in SHAPES)


def test_where_all_are_alike_the_mean_is_fedavgs_on_what_they_hold() -> None:
    whole, sent = some(SHAPES, 0), [(some(HALF, seed), 1 + seed) for seed in range(3)]
    ours = aggregate(strategy(), whole, sent)
    theirs = aggregate(FedAvg(min_train_nodes=1, min_available_nodes=1), some(HALF, 9), sent)
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours["w"][:2], theirs["w"], atol=1e-6)


def test_errors_do_not_count() -> None:
    whole, target = some(SHAPES, 0), strategy()
    grid = FleetGrid(lambda messages: [], num_devices=2)
    first, second = target.configure_train(1, record_of(whole), ConfigRecord(), grid)
    half = some(HALF, 1)
    metrics = MetricRecord({"num-examples": 2, "loss": 0.0})
    good = Message(RecordDict({"arrays": record_of(half), "metrics": metrics}), reply_to=first)
    bad = Message(Error(2, "it raised"), reply_to=second)
    arrays, _ = target.aggregate_train(1, [good, bad])
    assert arrays is not None
    np.testing.assert_allclose(arrays["w"].numpy()[:2], half["w"], atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{**HALF, "w": (5, 3)}, {**HALF, "w": (2,)}, {"w": (2, 3)}, {**HALF, "x": (1,)}]
)
def test_what_is_no_leading_block_is_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(RunError, match="a reply's"):
        aggregate(strategy(), some(SHAPES, 0), [(some(wrong, 1), 1)])


def test_between_rounds_it_remembers_nothing() -> None:
    target = strategy()
    aggregate(target, some(SHAPES, 0), [(some(HALF, 1), 1)])
    arrays, values = snapshot(target)
    assert not arrays
    again = strategy()
    restore(again, arrays, values)
    assert snapshot(again) == snapshot(target)
