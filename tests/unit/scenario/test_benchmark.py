"""Benchmarks as data sets, with stand-ins for Avalanche's objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgelearn.errors import DatasetError
from edgelearn.scenario.benchmark import from_benchmark


def stream(*labels: list[int], shape: tuple[int, ...] = (1, 2, 2), dtype: Any = np.uint8) -> Any:
    return [
        SimpleNamespace(
            dataset=[(np.full(shape, 7 * k + y, dtype), y, 0) for k, y in enumerate(ys)]
        )
        for ys in labels
    ]


def of(train: Any, test: Any) -> Any:
    return SimpleNamespace(train_stream=train, test_stream=test)


def test_labels_are_numbered_in_the_order_of_the_stream() -> None:
    given = of(stream([5, 3, 5], [0, 4]), stream([0, 3, 4, 5]))
    dataset = from_benchmark(given, name="mine")
    assert (dataset.name, dataset.num_classes) == ("mine", 4)
    assert dataset.y_train.tolist() == [1, 0, 1, 2, 3]
    assert dataset.y_test.tolist() == [2, 0, 3, 1]
    assert dataset.x_train[:, 0, 0, 0].tolist() == [5, 10, 19, 0, 11]
    assert dataset.users_train is None


def test_where_classes_come_back_the_experience_is_the_user() -> None:
    dataset = from_benchmark(of(stream([0, 2], [2, 0, 0]), stream([0], [2])))
    assert dataset.y_train.tolist() == [0, 2, 2, 0, 0]
    assert dataset.num_classes == 3
    assert dataset.users_train is not None
    assert dataset.users_train.tolist() == [0, 0, 1, 1, 1]
    assert dataset.users_test is not None
    assert dataset.users_test.tolist() == [0, 1]


def test_each_sample_keeps_its_experience() -> None:
    back = from_benchmark(of(stream([0, 2], [2, 0, 0]), stream([0], [2])))
    split = from_benchmark(of(stream([1, 1], [0]), stream([0, 1])))
    for dataset, train in ((back, [0, 0, 1, 1, 1]), (split, [0, 0, 1])):
        assert dataset.experiences_train is not None
        assert dataset.experiences_train.tolist() == train
        assert dataset.num_experiences == 2
    assert back.experiences_test is not None
    assert back.experiences_test.tolist() == [0, 1]
    assert split.experiences_test is None  # one test set for all of them
    with pytest.raises(DatasetError, match="2 experiences to test and 3 to train on"):
        from_benchmark(of(stream([0], [0], [0]), stream([0], [0])))


def test_numbers_that_bytes_cannot_hold_stay_as_they_are() -> None:
    given = of(stream([0], [1], dtype=np.float64), stream([0, 1], dtype=np.float64))
    dataset = from_benchmark(given)
    assert (dataset.x_train.dtype, dataset.scale) == (np.float32, 1.0)
    assert dataset.x_test[1, 0, 0, 0] == 8.0


def test_uneven_experiences_are_kept() -> None:
    dataset = from_benchmark(of(stream([9], [1, 2, 3]), stream([9, 1])))
    assert dataset.y_train.tolist() == [0, 1, 2, 3]
    assert dataset.experiences_train is not None
    assert dataset.experiences_train.tolist() == [0, 1, 1, 1]


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(DatasetError, match=r"only the test stream has the classes \[9\]"):
        from_benchmark(of(stream([0], [1]), stream([0, 9])))
    with pytest.raises(DatasetError, match="experience 1 of the benchmark has no samples"):
        from_benchmark(of(stream([0], []), stream([0])))
    with pytest.raises(DatasetError, match="has no experiences"):
        from_benchmark(of([], stream([0])))
    with pytest.raises(DatasetError, match="several shapes"):
        from_benchmark(of([*stream([0]), *stream([1], shape=(1, 3, 3))], stream([0])))
