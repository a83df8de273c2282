"""Measuring a predictor: what is called how often, agreement, and refusals; never seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatPredictor, FloatRuntime
from edgelearn.runtime.measure import measure, refresh_ms


class Counted:
    """Answers with the largest input, and notes what it was asked."""

    model_bytes = 123

    def __init__(self, *, sign: int = 1) -> None:
        self.sizes: list[int] = []
        self.threads: set[int] = set()
        self.first: list[float] = []
        self.sign = sign

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.threads.add(torch.get_num_threads())
        self.first.append(float(x[0, 0]))
        return self.sign * x


def inputs(count: int = 10) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(0))


def test_calls_batches_and_threads_are_as_asked() -> None:
    predict, x = Counted(), inputs()
    before = torch.get_num_threads()
    found = measure(predict, Counted(), x, batches=(1, 5), num_warm=3, num_runs=7, num_threads=2)
    assert torch.get_num_threads() == before
    assert predict.threads == {2}
    assert predict.sizes == [10, *[1] * 10, *[5] * 10]
    assert len(set(predict.first[1:11])) == 10  # another input in each call
    assert [(y.batch, y.num_runs) for y in found.latencies] == [(1, 7), (5, 7)]
    assert all(0 < y.p50_ms <= y.p99_ms for y in found.latencies)
    assert found.model_bytes == 123


def test_agreement_and_accuracy_are_counted() -> None:
    x = inputs()
    y = x.argmax(1)
    y[0] = (y[0] + 1) % 4
    few: dict[str, Any] = {"batches": (1,), "num_warm": 0, "num_runs": 1}
    same = measure(Counted(), Counted(), x, y, **few)
    assert (same.agreement, same.accuracy) == (1.0, pytest.approx(0.9))
    other = measure(Counted(sign=-1), Counted(), x, **few)
    assert (other.agreement, other.accuracy) == (0.0, None)


def test_each_refresh_has_new_parameters() -> None:
    seen: list[Tensor] = []

    class Noting:
        def prepare(self, model: FlatModel, params: Tensor) -> FloatPredictor:
            seen.append(params)
            return FloatRuntime().prepare(model, params)

    model = FlatModel(torch.nn.Linear(4, 2))
    assert refresh_ms(Noting(), model, model.initial(), inputs(), num_runs=3) > 0
    assert len({tuple(params.tolist()) for params in seen}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": (1, 11)}, "allowed: 1 to 10 rows"),
        ({"batches": ()}, "allowed: 1 to 10 rows"),
        ({"batches": (0,)}, "allowed: 1 to 10 rows"),
        ({"batches": (1,), "num_runs": 0}, "num_runs is 0"),
        ({"batches": (1,), "num_threads": 0}, "num_threads 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(Counted(), Counted(), inputs(), **arguments)
