"""Reading networks: what a trace does not show, and what it does to other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Proxy

from edgelearn.params import FlatModel
from edgelearn.runtime.network import UnsupportedError
from edgelearn.runtime.network_reader import read_network

WAIT_S = 20.0  # whoever waits so long has failed


class Interrupted(nn.Module):
    """Does something else while it is followed."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.layer, self.norm, self.act = nn.Linear(4, 3), nn.BatchNorm1d(3), act

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            self.act()
        return self.norm(self.layer(x))  # type: ignore[no-any-return]


def test_another_thread_s_network_answers_meanwhile() -> None:
    other, x = FlatModel(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), torch.rand(5, 4)
    expected, found = other(other.initial(), x), []
    with ThreadPoolExecutor(1) as pool:

        def ask() -> None:
            found.append(pool.submit(other, other.initial(), x).result(WAIT_S))

        network = read_network(FlatModel(Interrupted(ask)), (4,))
    assert [step.kind for step in network.operators] == ["Gemm"]
    assert torch.equal(found[0], expected)


def test_two_that_are_read_at_once_leave_torch_as_it_was() -> None:
    before, second_is_on, first_is_done = (
        nn.Module.__call__,
        threading.Event(),
        threading.Event(),
    )

    def enter() -> None:
        second_is_on.set()
        first_is_done.wait(WAIT_S)

    def read_second() -> None:
        read_network(FlatModel(Interrupted(enter)), (4,))

    with ThreadPoolExecutor(1) as pool:
        second = []

        def begin_second() -> None:
            second.append(pool.submit(read_second))
            second_is_on.wait(0.2)  # it can't be, as this one is not done

        read_network(FlatModel(Interrupted(begin_second)), (4,))
        first_is_done.set()
        second[0].result(WAIT_S)
    assert nn.Module.__call__ is before


class Overwriting(nn.Module):
    """Changes a value in place that others take later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)
        kept.add_(self.second(x))
        return self.last(kept)  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    module.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    return module


@pytest.mark.parametrize("factory", [Overwriting, hooked])
def test_what_a_graph_does_not_show_is_noticed(factory: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedError, match="something that reading it does not show"):
        read_network(FlatModel(factory()), (4,))
