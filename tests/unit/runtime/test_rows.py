"""Which networks can be asked for several devices in one batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel
from edgelearn.runtime.rows import shared_batch
from edgelearn.scenario.models import cnn, mlp


class Calls(nn.Module):
    """Two layers of four features, called by a function of the test's."""

    def __init__(self, call: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.call = nn.Linear(4, 4), nn.Linear(4, 3), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.first, self.second, x)


def folded(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    tokens = first(x.reshape(-1, 4))  # rows and tokens in one dimension
    return second(tokens.reshape(len(x), -1, 4).mean(1))


def transposed(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x.transpose(0, 1)).mean(0))


def by_token(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x).mean(1))


def centred(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x - x.mean(0)))


def backwards(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x.flip(0)).flip(0))


def in_two_ways(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x) if len(x) > 3 else x)


def picky(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    raise ValueError("not these inputs")


@pytest.mark.parametrize(
    ("call", "shape", "expected"),
    [
        (by_token, (3, 4), True),
        (folded, (3, 4), False),
        (folded, (1, 4), True),  # one token: a row stays a row
        (transposed, (3, 4), False),
        (transposed, (5, 4), False),  # as many tokens as rows are tried
        (centred, (4,), False),
        (backwards, (4,), False),
        (in_two_ways, (4,), False),
        (picky, (4,), False),
    ],
)
def test_networks_that_mix_rows_are_told_apart(
    call: Callable[[nn.Module, nn.Module, Tensor], Tensor], shape: tuple[int, ...], expected: bool
) -> None:
    assert (shared_batch(FlatModel(Calls(call)), shape) is not None) == expected


def test_a_batch_has_as_many_rows_as_the_largest_layer_allows() -> None:
    small = FlatModel(mlp(input_shape=(1, 8, 8), num_classes=10))
    assert shared_batch(small, (1, 8, 8)) == 512
    images = FlatModel(cnn(input_shape=(1, 28, 28), num_classes=10))
    assert shared_batch(images, (1, 28, 28)) == 2**19 // (8 * 28 * 28)
    huge = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(2**17, 2)))
    assert shared_batch(huge, (2**17,)) == 16


def test_batch_norm_and_dropout_are_tried_as_they_are_served() -> None:
    model = FlatModel(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    )
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    state = torch.get_rng_state()
    assert shared_batch(model, (4,)) == 512
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.module.modules())
