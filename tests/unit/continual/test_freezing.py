"""Objects as bytes: what is stored, what is only named, and what can't be."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from edgelearn.continual.freezing import Surroundings, additions
from edgelearn.errors import StateError, StrategyError


def surroundings(**named: Any) -> Surroundings:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    template = copy.deepcopy(network)
    return Surroundings({"template": template, **named}, network, template, {})


def through(around: Surroundings, value: Any) -> Any:
    return around.thaw(around.freeze(value))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3),
        torch.tensor(1.5),
        torch.empty(0, 4),
        torch.arange(6).view(2, 3).t(),
        torch.tensor([True, False]),
        torch.randn(3).to(torch.bfloat16),
        torch.randn(3, requires_grad=True),
    ],
)
def test_tensors_come_back_as_they_were(tensor: torch.Tensor) -> None:
    found = through(surroundings(), tensor)
    assert torch.equal(found, tensor)
    assert (found.dtype, found.requires_grad) == (tensor.dtype, tensor.requires_grad)
    assert type(through(surroundings(), nn.Parameter(torch.ones(2)))) is nn.Parameter


def test_a_view_does_not_hold_what_it_is_a_view_of() -> None:
    assert len(surroundings().freeze(torch.zeros(100_000)[:3])) < 300


def test_what_is_named_is_not_stored() -> None:
    data = torch.randn(1000)
    around = surroundings(data=data)
    frozen = around.freeze({"mine": data, "network": around.network})
    assert len(frozen) < 200
    found = around.thaw(frozen)
    assert found["mine"] is data
    assert found["network"] is around.network
    with pytest.raises(StateError, match="there is no data"):
        surroundings().thaw(frozen)


def test_parameters_are_those_of_the_network() -> None:
    around = surroundings()
    frozen = around.freeze(list(around.network.parameters()))
    assert len(frozen) < 200
    for found, own in zip(around.thaw(frozen), around.network.parameters(), strict=True):
        assert found is own


def test_copies_of_the_network_are_its_tensors_and_what_was_written_on_it() -> None:
    around = surroundings()
    teacher = copy.deepcopy(around.network).eval()
    with torch.no_grad():
        teacher[0].weight.fill_(7.0)
        teacher[1].running_mean.fill_(3.0)
    teacher[0].bias.requires_grad_(False)
    teacher.classes = {1, 2}
    found = through(around, teacher)
    assert torch.equal(found[0].weight, teacher[0].weight)
    assert torch.equal(found[1].running_mean, teacher[1].running_mean)
    assert (found[0].bias.requires_grad, found[0].weight.requires_grad) == (False, True)
    assert (found.training, found.classes) == (False, {1, 2})
    assert around.network[0].weight.max() < 7.0
    x = torch.randn(4, 3)
    assert torch.equal(found(x), teacher(x))


def test_another_network_of_the_same_class_is_stored_as_itself() -> None:
    found = through(surroundings(), nn.Sequential(nn.Linear(5, 1)))
    assert found[0].weight.shape == (1, 5)


def test_additions_are_what_the_template_had_not() -> None:
    network = nn.Linear(2, 2)
    template = copy.deepcopy(network)
    assert additions(network, template) == {}
    network.saved = {"a": torch.ones(2)}
    network.in_features = 3
    assert set(additions(network, template)) == {"saved", "in_features"}


def cycle(items: list[int], start: int = 0) -> Iterator[int]:
    while True:
        yield from items[start:]


class Endless:
    def __iter__(self) -> Iterator[int]:
        return (yield from itertools.repeat(5))


def test_generators_begin_anew() -> None:
    made = cycle([1, 2, 3], 1)
    assert [next(made) for _ in range(3)] == [2, 3, 2]
    found = through(surroundings(), made)
    assert [next(found) for _ in range(3)] == [2, 3, 2]
    assert next(through(surroundings(), iter(Endless()))) == 5
    done = (x for x in ())
    list(done)
    assert list(through(surroundings(), done)) == []


def test_iterators_over_loaders_come_back_exhausted() -> None:
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2)
    iterator = iter(loader)
    next(iterator)
    assert list(through(surroundings(), iterator)) == []
    assert len(list(through(surroundings(), loader))) == 2


def test_what_cannot_be_stored_is_an_error_with_its_name() -> None:
    with pytest.raises(StrategyError, match=r"generator .*genexpr.* can't be made again"):
        surroundings().freeze(x for x in range(3))
    with pytest.raises(StrategyError, match="can't be stored"):
        surroundings().freeze(lambda: 1)


def test_damaged_bytes_are_an_error() -> None:
    around = surroundings()
    with pytest.raises(StateError, match="can't be read"):
        around.thaw(around.freeze([1, 2, 3])[:-2])


def test_reducers_have_the_word() -> None:
    network = nn.Linear(1, 1)
    reducers = {SimpleNamespace: lambda value: (list, ([value.x],))}
    around = Surroundings({}, network, copy.deepcopy(network), reducers)
    assert through(around, {"a": SimpleNamespace(x=4)}) == {"a": [4]}


def test_the_same_object_twice_is_the_same_object_again() -> None:
    tensor = torch.ones(3)
    one, other = through(surroundings(), [tensor, tensor])
    assert one is other
