"""Which weights stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.compress.prune import (
    above,
    cubic_sparsity,
    largest,
    prunable,
    sparsity_of,
    two_of_four,
)
from edgelearn.params import FlatModel, Layout


def network() -> FlatModel:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    return FlatModel(module)


def params_of(model: FlatModel) -> torch.Tensor:
    return model.initial()[: model.layout.num_trained]


def test_biases_and_norms_are_left_alone() -> None:
    model = network()
    layout = model.layout
    may = prunable(layout)
    assert may.shape == (layout.num_trained,)
    for name in layout.names[: layout.num_trained_tensors]:
        expected = name in ("0.weight", "3.weight")
        assert bool((may[layout.places[name]] == expected).all()), name


def test_a_threshold_keeps_what_is_above_it() -> None:
    layout = Layout.of(nn.Linear(3, 1))
    params = torch.tensor([0.5, -0.5, 0.6, 0.0])
    assert above(params, layout, 0.5).tolist() == [False, False, True, True]
    assert above(params, layout, 0.0).tolist() == [True, True, True, True]
    assert above(torch.zeros(4), layout, 0.0).tolist() == [False, False, False, True]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_smallest_of_all_are_pruned(sparsity: float) -> None:
    model = network()
    params, may = params_of(model), prunable(model.layout)
    mask = largest(params, model.layout, sparsity)
    count = int(may.sum())
    ranked = sorted((abs(float(v)), i) for i, v in enumerate(params) if may[i])
    pruned = {i for _, i in ranked[: round(sparsity * count)]}
    assert {i for i in range(len(params)) if not mask[i]} == pruned


def test_each_layer_for_itself() -> None:
    model = network()
    layout, params = model.layout, params_of(model).clone()
    params[layout.places["0.weight"]] *= 100
    by_layer = largest(params, layout, 0.5, scope="layer")
    assert int((~by_layer[layout.places["0.weight"]]).sum()) == 27
    assert int((~by_layer[layout.places["3.weight"]]).sum()) == 30
    everywhere = largest(params, layout, 0.5)
    assert int((~everywhere[layout.places["3.weight"]]).sum()) > 50


def test_equal_weights_are_pruned_in_order_and_exactly_as_many() -> None:
    layout = Layout.of(nn.Linear(6, 1, bias=False))
    assert largest(torch.ones(6), layout, 0.5).tolist() == [False] * 3 + [True] * 3
    params = torch.tensor([2.0, 1.0, -2.0, 2.0, 1.0, 3.0])
    assert largest(params, layout, 0.5).tolist() == [False, False, True, True, False, True]


def test_what_was_pruned_stays_so_as_sparsity_grows() -> None:
    model = network()
    params = params_of(model)
    first = largest(params, model.layout, 0.3)
    second = largest(params * first, model.layout, 0.6)
    assert not bool((second & ~first).any())
    assert sparsity_of(params * second, model.layout) == pytest.approx(0.6, abs=0.01)


def test_two_of_every_four_of_a_row() -> None:
    layout = Layout.of(nn.Linear(6, 2))
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 9.0, 0.1]])
    mask = two_of_four(torch.cat([weight.flatten(), torch.zeros(2)]), layout)
    assert mask[:12].view(2, 6).tolist() == [
        [False, True, True, False, True, True],
        [True, True, False, False, True, True],
    ]
    assert mask[12:].all()


def test_two_of_four_in_a_convolution_looks_at_what_one_channel_sees() -> None:
    model = network()
    mask = two_of_four(params_of(model), model.layout)
    rows = mask[model.layout.places["0.weight"]].view(3, 18)
    assert (rows[:, :16].reshape(-1, 4).sum(1) == 2).all()
    assert rows[:, 16:].all()


def test_the_cubic_schedule() -> None:
    seen = [
        cubic_sparsity(t, begin=10, num_steps=4, final=0.9, initial=0.1, every=2)
        for t in (0, 9, 10, 11, 12, 14, 16, 18, 99)
    ]
    # s_f + (s_i - s_f) (1 - done / 4)^3, done = 0, 0, 1, 2, 3, 4
    cubes = [0.9 - 0.8 * (1 - d / 4) ** 3 for d in (0, 0, 1, 2, 3)]
    assert seen == pytest.approx([0.0, 0.0, *cubes, 0.9, 0.9])
    assert cubic_sparsity(3, begin=3, num_steps=0, final=0.7) == 0.7
    assert cubic_sparsity(2, begin=3, num_steps=0, final=0.7) == 0.0


def test_a_network_without_weights_is_not_sparse() -> None:
    model = FlatModel(nn.BatchNorm1d(3))
    assert sparsity_of(params_of(model), model.layout) == 0.0
    assert largest(params_of(model), model.layout, 0.5).all()


def test_what_is_not_allowed_is_named() -> None:
    layout = Layout.of(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        largest(torch.zeros(3), layout, 1.5)
    with pytest.raises(ValueError, match="scope is 'all'"):
        largest(torch.zeros(3), layout, 0.5, scope="all")
    with pytest.raises(ValueError, match="epsilon is -1"):
        above(torch.zeros(3), layout, -1.0)
    with pytest.raises(ValueError, match=r"initial is 0\.6"):
        cubic_sparsity(0, begin=0, num_steps=1, final=0.5, initial=0.6)
    with pytest.raises(ValueError, match="every is 0"):
        cubic_sparsity(0, begin=0, num_steps=1, final=0.5, every=0)
