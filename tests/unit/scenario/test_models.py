from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.scenario.models import cnn, mlp


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (12,)])
@pytest.mark.parametrize("hidden", [(), (5,), (5, 6)])
def test_mlp(shape, hidden):
    module = mlp(input_shape=shape, num_classes=4, hidden=hidden)
    assert module(torch.zeros(2, *shape)).shape == (2, 4)
    assert sum(isinstance(m, nn.Linear) for m in module) == len(hidden) + 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_cnn(shape, kernel_size):
    module = cnn(
        input_shape=shape, num_classes=4, channels=(2, 3), hidden=5, kernel_size=kernel_size
    )
    assert module(torch.zeros(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"input_shape": (12,)}, r"needs images \[C, H, W\], samples are \(12,\)"),
        ({"kernel_size": 4}, "kernel_size is 4; it must be odd"),
        ({"channels": (1, 2, 3, 4)}, "4 poolings leave nothing of samples of .1, 8, 8."),
    ],
)
def test_a_cnn_that_does_not_fit(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        cnn(**{"input_shape": (1, 8, 8), "num_classes": 4, **kwargs})
