"""Class-incremental Split Fashion-MNIST against an independent implementation, within its band.

The whole table is `edgelearn reproduce fashion-oracle`; these rows find a method that learns,
forgets or remembers otherwise than it should.
"""

from __future__ import annotations

from typing import Any

import pytest

from edgelearn.errors import DatasetError
from edgelearn.reproduce.centralised import EXEMPLARS
from edgelearn.reproduce.fashion_oracle import BASE, CLASS, learn
from edgelearn.scenario.datasets import fashion_mnist
from edgelearn.scenario.spec import DataSpec

POINTS = 3.0


def is_missing() -> bool:
    try:
        fashion_mnist(DataSpec(dataset="fashion-mnist"))
    except DatasetError:
        return True
    return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(is_missing(), reason="Fashion-MNIST is not on this machine"),
]


def accuracy(strategy: str, args: dict[str, Any], **changes: Any) -> float:
    setting = {**BASE, "kind": CLASS, "strategy": strategy, "args": args, **changes}
    return learn(**setting, seed=0)["acc"]


def test_naive_forgets_all_but_the_last_pair() -> None:
    assert 19.9 <= accuracy("naive", {}, steps=100) <= 20.0


def test_more_exemplars_remember_more() -> None:
    ten = accuracy(EXEMPLARS, {"per_class": 10})
    hundred = accuracy(EXEMPLARS, {"per_class": 100})
    assert 60.5 - POINTS <= ten <= 62.9 + POINTS
    assert 80.0 - POINTS <= hundred <= 80.9 + POINTS
    joint = accuracy("naive", {}, stream={"cumulative": True})
    assert 81.8 - POINTS <= joint <= 83.5 + POINTS
    assert joint > hundred > ten
