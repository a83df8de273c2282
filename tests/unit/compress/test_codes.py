"""Codes on a fixed grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgelearn.compress.codes import grid, moved_codes, nearest_codes, weights
from edgelearn.compress.quantize import quantize_weight


def some_weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 3, 3)])
def test_without_headroom_it_is_the_grid_of_the_runtime(shape: tuple[int, ...]) -> None:
    weight = some_weight(*shape)
    codes, scale = quantize_weight(weight)
    assert torch.equal(grid(weight), scale)
    assert torch.equal(nearest_codes(weight, scale), codes)
    own = weights(codes, scale)
    assert own.shape == weight.shape
    assert float((own - weight).abs().max()) <= float(scale.max()) / 2 + 1e-7


def test_headroom_leaves_codes_to_grow_into() -> None:
    weight = some_weight(4, 9)
    scale = grid(weight, headroom=2.0)
    assert torch.equal(scale, 2 * grid(weight))
    assert nearest_codes(weight, scale).abs().amax() == 64  # of 63.5


def test_zeros_get_a_grid_that_they_can_leave() -> None:
    weight = torch.zeros(3, 16)
    assert grid(weight).tolist() == pytest.approx([0.25 / 127] * 3)
    weight[1, 2], weight[2, 0] = -0.5, 2.0
    assert (127 * grid(weight)).tolist() == pytest.approx([2.0, 0.5, 2.0])
    assert nearest_codes(torch.zeros(3, 16), grid(weight)).count_nonzero() == 0


@pytest.mark.parametrize("move", [0.3, -0.3, 1e-3, 2.75, -1.5])
def test_stochastic_rounding_is_unbiased(move: float) -> None:
    torch.manual_seed(0)
    count = 400_000
    codes = torch.full((count,), 7, dtype=torch.int8)
    moved = moved_codes(codes, torch.full((count,), move), rounding="stochastic")
    assert moved.dtype == torch.int8
    low = 7 + int(torch.tensor(move).floor())
    assert set(moved.unique().tolist()) <= {low, low + 1}  # one of the two neighbours
    fraction = move - int(torch.tensor(move).floor())
    error = (fraction * (1 - fraction) / count) ** 0.5
    assert float(moved.double().mean()) - 7 == pytest.approx(move, abs=4 * error)


def test_what_is_not_to_move_does_not() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(1000)
    for rounding in ("stochastic", "nearest"):
        moved = moved_codes(codes, torch.zeros(len(codes)), rounding=rounding)
        assert torch.equal(moved, codes)
        assert torch.equal(moved_codes(codes, -codes.float(), rounding=rounding), 0 * codes)


def test_codes_stay_in_their_range() -> None:
    codes = torch.tensor([127, -127, 100, -100, 0], dtype=torch.int8)
    move = torch.tensor([0.9, -0.9, 1e4, -1e4, 1e9])
    for rounding in ("stochastic", "nearest"):
        moved = moved_codes(codes, move, rounding=rounding)
        assert moved.tolist() == [127, -127, 127, -127, 127]


def test_to_the_nearest_small_moves_are_lost_and_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    codes = torch.tensor([3, 3, 3, 3], dtype=torch.int8)
    move = torch.tensor([0.49, -0.49, 0.51, -0.51])
    assert moved_codes(codes, move, rounding="nearest").tolist() == [3, 3, 4, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_says_what_is_drawn() -> None:
    codes, move = torch.zeros(50, dtype=torch.int8), torch.full((50,), 0.5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(moved_codes(codes, move, rounding="stochastic"))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
