"""Parameters and multiplications, counted by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from edgelearn.compress.cost import UncountedError, cost, count_macs


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(5, 3), (5,), 15),
        (nn.Linear(5, 3), (7, 5), 105),  # at each of 7 places
        (nn.Conv2d(2, 4, 3, padding=1), (2, 6, 6), 6 * 6 * 4 * 2 * 9),
        (nn.Conv2d(2, 4, 3, stride=2, bias=False), (2, 7, 7), 3 * 3 * 4 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), 3 * 3 * 4 * 9),
        (nn.Conv1d(2, 3, 2), (2, 5), 4 * 3 * 2 * 2),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4), 4 * 4 * 2 * 3 * 4),
    ],
)
def test_layers_cost_what_their_sums_have(
    layer: nn.Module, shape: tuple[int, ...], macs: int
) -> None:
    assert count_macs(layer, torch.zeros(3, *shape)) == macs  # of one input, of 3


def test_zeros_count_as_parameters_and_multiplications_but_not_as_nonzero() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        module[0].weight[0] = 0
    before = copy.deepcopy(module.state_dict())
    module.train()
    found = cost(module, torch.ones(1, 4))
    assert (found.parameters, found.nonzero, found.macs) == (12 + 3 + 6 + 8, 25, 18)
    assert module.training
    assert not module[0]._forward_hooks
    for name, value in module.state_dict().items():  # no statistics moved
        assert torch.equal(value, before[name]), name


def test_what_has_two_names_is_one_parameter_but_is_multiplied_by_twice() -> None:
    layer = nn.Linear(4, 4)
    found = cost(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(1, 4))
    assert (found.parameters, found.macs) == (20, 32)


class _Outside(nn.Module):
    """Multiplies where no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return x @ x.T


@pytest.mark.parametrize(
    ("module", "example", "operator", "message"),
    [
        (_Outside(), torch.zeros(1, 4), "mm", "16 MACs, but torch multiplied 20 times"),
        (nn.Sequential(nn.LSTM(4, 3)), torch.zeros(1, 4), "LSTM", r"LSTM \(0\) can't be counted"),
        (nn.Embedding(4, 3), torch.zeros(1, 2).long(), "Embedding", ".the network itself."),
    ],
)
def test_what_is_not_covered_is_named_and_no_number_stands_for_it(
    module: nn.Module, example: torch.Tensor, operator: str, message: str
) -> None:
    with pytest.raises(UncountedError, match=message):
        count_macs(module, example)
    found = cost(module, example)
    assert (found.macs, found.uncounted) == (None, operator)
    assert found.parameters == found.nonzero == sum(p.numel() for p in module.parameters())


def test_the_error_survives_the_way_out_of_a_worker_process() -> None:
    back = pickle.loads(pickle.dumps(UncountedError("mm", "why")))
    assert (back.operator, str(back)) == ("mm", "why")
