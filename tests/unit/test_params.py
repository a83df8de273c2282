from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgelearn.errors import StateError
from edgelearn.params import FlatModel, Layout


def network(*, freeze: bool = False) -> nn.Module:
    """Convolution, batch norm and a linear layer, with values that are not at their start."""
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        module[1].running_mean.uniform_(-1, 1)
        module[1].running_var.uniform_(0.5, 2)
        module[1].weight.uniform_(0.5, 2)
    if freeze:
        for parameter in module[0].parameters():
            parameter.requires_grad_(False)
    return module


def test_layout_of_batch_norm_and_frozen_parameters():
    layout = Layout.of(network(freeze=True))
    assert layout.names == (
        "1.weight",
        "1.bias",
        "4.weight",
        "4.bias",
        "0.weight",
        "0.bias",
        "1.running_mean",
        "1.running_var",
    )  # what is trained first; the integer count of batches is not a parameter
    assert layout.shapes[4] == (2, 1, 3, 3)
    assert layout.sizes == (2, 2, 24, 3, 18, 2, 2, 2)
    assert (layout.num_trained_tensors, layout.num_trained, layout.size) == (4, 31, 55)


def test_layout_without_buffers_is_all_trained():
    layout = Layout.of(nn.Linear(4, 2))
    assert layout.size == layout.num_trained == 10
    assert layout.num_trained_tensors == 2


def test_scalars_and_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x)) * self.scale

    module = Tied()
    model = FlatModel(module)
    assert model.layout.names == ("scale", "a.weight")
    x = torch.randn(2, 3)
    params = model.initial()
    torch.testing.assert_close(model(params, x), module(x))
    doubled = params.clone()
    doubled[1:] *= 2  # both uses of the weight see it
    torch.testing.assert_close(model(doubled, x), 4 * module(x))


def test_digest_tells_layouts_apart():
    digests = {
        Layout.of(m).digest
        for m in (
            nn.Linear(4, 2),
            nn.Linear(2, 4),
            nn.Linear(4, 2, bias=False),
            nn.Sequential(nn.Linear(4, 2)),
            network(),
            network(freeze=True),
        )
    }
    assert len(digests) == 6
    assert Layout.of(network()).digest == Layout.of(network()).digest


def test_views_share_the_vector():
    layout = Layout.of(network())
    flat = torch.zeros(layout.size)
    views = layout.views(flat)
    assert list(views) == list(layout.names)
    for i, view in enumerate(views.values(), start=1):
        view.fill_(i)
    expected = [float(i) for i, size in enumerate(layout.sizes, start=1) for _ in range(size)]
    assert flat.tolist() == expected
    flat.zero_()
    assert all(not view.any() for view in views.values())


def test_views_of_the_trained_part():
    layout = Layout.of(network(freeze=True))
    views = layout.views(torch.arange(float(layout.num_trained)))
    assert list(views) == list(layout.names[:4])
    assert views["4.bias"].tolist() == [28, 29, 30]


@pytest.mark.parametrize("length", [0, 30, 32, 54, 56])
def test_a_vector_of_another_length_is_an_error(length):
    layout = Layout.of(network(freeze=True))
    with pytest.raises(StateError, match=f"has {length} elements, expected 55 or 31"):
        layout.views(torch.zeros(length))


def test_flatten_and_views_are_inverse():
    layout = Layout.of(network())
    flat = torch.randn(layout.size)
    again = layout.flatten(layout.views(flat))
    assert torch.equal(again, flat)
    assert again.data_ptr() != flat.data_ptr()
    arrays = {name: view.numpy().copy() for name, view in layout.views(flat).items()}
    assert torch.equal(layout.flatten(arrays), flat)


def test_flatten_makes_float32():
    layout = Layout.of(nn.Linear(2, 1))
    flat = layout.flatten({"bias": np.ones(1), "weight": torch.full((1, 2), 3, dtype=torch.int64)})
    assert flat.dtype == torch.float32
    assert flat.tolist() == [3, 3, 1]


def test_flatten_errors():
    layout = Layout.of(nn.Linear(2, 1))
    weight, bias = torch.zeros(1, 2), torch.zeros(1)
    with pytest.raises(StateError, match="parameters lack bias"):
        layout.flatten({"weight": weight})
    with pytest.raises(StateError, match="unknown names extra"):
        layout.flatten({"weight": weight, "bias": bias, "extra": bias})
    with pytest.raises(StateError, match=r"'weight' has shape \(2,\), expected \(1, 2\)"):
        layout.flatten({"weight": weight[0], "bias": bias})


@pytest.mark.parametrize("freeze", [False, True])
def test_flat_model_is_the_module(freeze):
    module = network(freeze=freeze).eval()
    model = FlatModel(module)
    x = torch.randn(5, 1, 4, 4)
    params = model.initial()
    assert torch.equal(model(params, x), module(x))
    trained = params[: model.layout.num_trained]
    assert torch.equal(model(trained, x), module(x))


def test_initial_is_a_copy():
    module = nn.Linear(2, 1)
    model = FlatModel(module)
    model.initial().zero_()
    assert module.weight.abs().sum() > 0


def test_other_parameters_give_another_function_and_leave_the_module_alone():
    module = network().eval()
    model = FlatModel(module)
    x = torch.randn(5, 1, 4, 4)
    before = model.initial()
    other = before.clone()
    model.layout.views(other)["4.bias"] += 1
    torch.testing.assert_close(model(other, x), module(x) + 1)
    assert torch.equal(model.initial(), before)


@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_with_respect_to_the_vector(freeze):
    module = network(freeze=freeze).eval()
    model = FlatModel(module)
    x, y = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    params = model.initial()[: model.layout.num_trained].requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(params, x), y), params)
    F.cross_entropy(module(x), y).backward()
    assert len(gradient) == model.layout.num_trained
    for name, piece in model.layout.views(gradient).items():
        torch.testing.assert_close(piece, module.get_parameter(name).grad)


def test_carry_sends_batch_statistics_into_the_vector():
    reference = network().train()
    model = FlatModel(network().train())
    x = torch.randn(5, 1, 4, 4)
    params = model.initial()
    model.carry(params)
    trained = params[: model.layout.num_trained].clone().requires_grad_()
    out = model(trained, x)
    torch.testing.assert_close(out, reference(x))
    out.sum().backward()
    views = model.layout.views(params)
    torch.testing.assert_close(views["1.running_mean"], reference[1].running_mean)
    torch.testing.assert_close(views["1.running_var"], reference[1].running_var)


def test_carry_binds_frozen_parameters_by_reference():
    model = FlatModel(network(freeze=True).eval())
    params = model.initial()
    views = model.layout.views(params)
    trained = params[: model.layout.num_trained].clone()
    x = torch.randn(5, 1, 4, 4)
    model.carry(params)
    before = model(trained, x)
    views["0.bias"] += 1
    assert not torch.equal(model(trained, x), before)
    torch.testing.assert_close(model(trained, x), model(params, x))
    assert not model.module[0].bias.requires_grad
    assert Layout.of(model.module) == model.layout


def test_carry_gives_each_device_its_own_statistics():
    model = FlatModel(network().train())
    first, second = model.initial(), model.initial()
    trained = first[: model.layout.num_trained].clone()
    x = torch.randn(5, 1, 4, 4)
    for params in (first, second):
        model.carry(params)
        model(trained, x)
    assert torch.equal(first, second)  # the second did not go on where the first had stopped


def test_carry_without_untrained_tensors_does_nothing():
    module = nn.Linear(2, 1)
    weight = module.weight
    model = FlatModel(module)
    model.carry(torch.zeros(3))
    assert module.weight is weight


def test_the_initial_vector_is_not_that_of_whoever_trained_last():
    model = FlatModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    before = model.initial()
    model.carry(torch.full_like(before, 7.0))
    assert torch.equal(model.initial(), before)


def test_places_are_where_views_lie():
    layout = FlatModel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).layout
    flat = torch.arange(layout.size, dtype=torch.float32)
    for name, view in layout.views(flat).items():
        assert torch.equal(flat[layout.places[name]], view.flatten())
