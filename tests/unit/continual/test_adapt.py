from __future__ import annotations

import pytest
import torch
from torch import nn

from edgelearn.continual.adapt import (
    adapted,
    batch_loss,
    check_descent,
    descend,
    halves,
    meta_gradient,
)
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Encoding, Samples, SharedSamples

STIFF = torch.tensor([1.0, 2.0, 5.0])
CENTRE = torch.tensor([1.0, -1.0, 0.5])
START = torch.tensor([3.0, 0.0, -2.0])


def support(params):
    return 0.5 * (STIFF * (params - CENTRE).square()).sum()


def query(params):
    return 0.5 * (params.flip(-1).square() * STIFF).sum()


def query_gradient(params):
    return params * STIFF.flip(0)


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_descent_on_a_quadratic(steps):
    before = START.clone()
    with torch.no_grad():  # as hooks may be called
        found = descend(support, START, steps=steps, lr=0.1)
    expected = CENTRE + (1 - 0.1 * STIFF) ** steps * (START - CENTRE)
    torch.testing.assert_close(found, expected)
    assert torch.equal(START, before)
    assert not found.requires_grad


def test_a_part_moves_alone():
    found = descend(support, START, steps=3, lr=0.1, part=slice(1, 2))
    whole = descend(support, START, steps=3, lr=0.1)
    torch.testing.assert_close(found, torch.stack([START[0], whole[1], START[2]]))


def test_a_part_is_all_that_is_differentiated():
    seen = []

    def loss(params):
        seen.append(params)
        body = (params[:2] * 2).square().sum()
        assert not body.requires_grad or params.grad_fn is not None
        return body + params[2].square()

    descend(loss, START, steps=1, lr=0.1, part=slice(2, 3))
    (cat,) = seen
    # What was put together has one part with a gradient, the head.
    needed = [f for f, _ in cat.grad_fn.next_functions if f is not None]
    assert len(needed) == 1


def test_a_stack_descends_row_by_row():
    rows = torch.stack([START, -START, 2 * START])

    def loss(params):
        return params.pow(4).sum() + (params * CENTRE).sum()

    for part in (slice(None), slice(0, 2)):
        whole = descend(loss, rows, steps=3, lr=0.001, part=part)
        each = [descend(loss, row, steps=3, lr=0.001, part=part) for row in rows]
        torch.testing.assert_close(whole, torch.stack(each))


# -- the gradient through them ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_takes_the_gradient_where_it_arrives(steps):
    loss, gradient = meta_gradient(support, query, START, steps=steps, lr=0.1)
    arrived = descend(support, START, steps=steps, lr=0.1)
    torch.testing.assert_close(loss, query(arrived))
    torch.testing.assert_close(gradient, query_gradient(arrived))
    assert not loss.requires_grad
    assert not gradient.requires_grad


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_has_the_factors_of_the_hessian(steps):
    with torch.no_grad():
        loss, gradient = meta_gradient(
            support, query, START, steps=steps, lr=0.1, is_second_order=True
        )
    arrived = descend(support, START, steps=steps, lr=0.1)
    torch.testing.assert_close(loss, query(arrived))
    torch.testing.assert_close(gradient, (1 - 0.1 * STIFF) ** steps * query_gradient(arrived))


def test_second_order_of_a_part_has_the_factor_there_alone():
    _, gradient = meta_gradient(
        support, query, START, steps=1, lr=0.1, part=slice(2, 3), is_second_order=True
    )
    arrived = descend(support, START, steps=1, lr=0.1, part=slice(2, 3))
    factor = torch.tensor([1.0, 1.0, 1 - 0.1 * 5.0])
    torch.testing.assert_close(gradient, factor * query_gradient(arrived))


def test_second_order_of_a_network_equals_finite_differences():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = FlatModel(module)
    params = torch.cat([p.detach().flatten() for p in module.parameters()])
    batches = [Batch(torch.randn(5, 3).double(), torch.randint(0, 2, (5,))) for _ in range(2)]
    first, second = (batch_loss(model, batch) for batch in batches)

    def after(theta):
        return float(second(descend(first, theta, steps=2, lr=0.5)).detach())

    _, gradient = meta_gradient(first, second, params, steps=2, lr=0.5, is_second_order=True)
    for place in range(0, len(params), 5):
        step = torch.zeros_like(params)
        step[place] = 1e-5
        slope = (after(params + step) - after(params - step)) / 2e-5
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    _, plain = meta_gradient(first, second, params, steps=2, lr=0.5)
    assert not torch.allclose(plain, gradient, rtol=1e-2)


# -- batches ---------------------------------------------------------------------------------------


def test_halves_take_every_other_sample():
    x, y = torch.arange(5.0)[:, None], torch.arange(5)
    mask = torch.eye(5, dtype=torch.bool)
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    first, second = halves(Batch(x, y, weight, mask, torch.tensor([7, 8])))
    assert first.y.tolist() == [0, 2, 4]
    assert second.y.tolist() == [1, 3]
    assert first.x.flatten().tolist() == [0, 2, 4]
    torch.testing.assert_close(first.weight, torch.tensor([0.25, 0.75, 0.0]))
    torch.testing.assert_close(second.weight, torch.tensor([1 / 3, 2 / 3]))
    assert torch.equal(second.mask, mask[1::2])
    assert first.places is None


def test_halves_without_weights_masks_or_a_second_sample():
    batch = Batch(torch.zeros(2, 1), torch.tensor([1, 2]))
    first, second = halves(batch)
    assert (first.weight, first.mask) == (second.weight, second.mask) == (None, None)
    single = Batch(torch.zeros(1, 1), torch.tensor([1]))
    assert halves(single) == (single, single)


def test_a_half_that_counts_for_nothing_has_no_loss():
    _, second = halves(Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([1.0, 0.0])))
    assert second.weight.tolist() == [0.0]


# -- what a device answers with --------------------------------------------------------------------


def samples(num=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (num, 4), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 3, (num,), generator=generator)
    return Samples(SharedSamples(x, y, Encoding(1 / 255)), torch.arange(num, dtype=torch.int32))


def test_adapting_is_gradient_descent_on_all_samples():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model = FlatModel(module, {"control": (2,)})
    params = model.initial()
    params[-2:] = torch.tensor([5.0, 6.0])
    model.carry(params.clone())
    module.eval()
    data = samples()
    found = adapted(model, params, data, steps=3, lr=0.1)

    batch = data.batch()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch.x), batch.y).backward()
        optimizer.step()
    count = model.layout.num_trained
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(found[:count], expected)
    assert torch.equal(found[count:], params[count:])
    assert not torch.allclose(found[:count], params[:count])


def test_nothing_to_adapt():
    model, data = FlatModel(nn.Linear(4, 3)), samples()
    params = model.initial()
    assert adapted(model, params, data, steps=0, lr=0.1) is params
    assert adapted(model, params, Samples(data.store, data.ids[:0]), steps=3, lr=0.1) is params


def test_arguments_are_checked():
    check_descent("inner", 0, 0.1, fewest=0)
    with pytest.raises(ValueError, match="inner_steps is 0; at least 1"):
        check_descent("inner", 0, 0.1, fewest=1)
    for lr in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"adapt_lr is {lr}; it must be above 0"):
            check_descent("adapt", 1, lr, fewest=0)
