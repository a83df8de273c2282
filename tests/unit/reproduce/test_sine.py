from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from edgelearn.continual.adapt import descend
from edgelearn.errors import DivergenceError, RunError
from edgelearn.reproduce import sine
from edgelearn.reproduce.sine import FINN, METHODS, Sines, SineSetting, initial, predict, run

SMALL = SineSetting(hidden=24, meta_batch=10, num_test=100, steps=(0, 1, 5, 10))


@pytest.mark.parametrize("setting", [SineSetting(), FINN, SMALL])
def test_networks_in_a_stack_answer_as_modules_do(setting):
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[setting.activation]
    size = setting.hidden
    rows = torch.stack([initial(setting, seed) for seed in (1, 2)])
    x = torch.linspace(-5, 5, 7).expand(2, -1)
    found = predict(setting, rows, x)
    for row, own in zip(rows, found, strict=True):
        layers = [nn.Linear(1, size), activation(), nn.Linear(size, size), activation()]
        module = nn.Sequential(*layers, nn.Linear(size, 1))
        nn.utils.vector_to_parameters(row, module.parameters())
        torch.testing.assert_close(own, module(x[:1].T)[:, 0])


def test_tasks_are_in_their_ranges():
    tasks = Sines.draw(SineSetting(), 2000, torch.Generator().manual_seed(0))
    assert 0.1 <= tasks.amplitude.min() < 0.2
    assert 4.9 < tasks.amplitude.max() <= 5.0
    assert 0.0 <= tasks.phase.min() < 0.1
    assert 2 * math.pi - 0.1 < tasks.phase.max() <= 2 * math.pi
    one = Sines(torch.tensor([[2.0]]), torch.tensor([[math.pi / 2]]))
    torch.testing.assert_close(one(torch.zeros(1, 1)), torch.tensor([[2.0]]))


def test_the_error_is_taken_on_new_sines_after_each_number_of_steps():
    params = initial(SMALL, 0)
    setting = replace(SMALL, num_test=3, steps=(0, 2, 5))
    found = sine.measure(setting, params, lr=0.02, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    tasks = Sines.draw(setting, 3, generator)
    x = torch.linspace(-5, 5, 50)
    order = torch.rand(3, 50, generator=generator).argsort(1)[:, :10]
    for steps in setting.steps:
        errors = []
        for k in range(3):
            own = Sines(tasks.amplitude[k : k + 1], tasks.phase[k : k + 1])
            given = x[order[k]][None]

            def loss(theta, own=own, given=given):
                return (predict(setting, theta[None], given) - own(given)).square().mean()

            theta = descend(loss, params, steps=steps, lr=0.02)
            whole = predict(setting, theta[None], x[None]) - own(x[None])
            errors.append(float(whole.square().mean()))
        assert found[f"mse@{steps}"] == pytest.approx(sum(errors) / 3, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(method):
    first = run(3, method, 5, setting=SMALL)
    assert list(first) == ["mse@0", "mse@1", "mse@5", "mse@10"]
    torch.manual_seed(99)  # not this one
    assert run(3, method, 5, setting=SMALL) == first
    assert run(4, method, 5, setting=SMALL) != first


def test_reptile_moves_towards_where_the_inner_steps_lead():
    setting = replace(SMALL, reptile_batch=3, reptile_epsilon=0.25, grid=20)
    start = initial(setting, 0)
    found = METHODS["reptile"](setting, start, 1, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    tasks = Sines.draw(setting, 3, generator)
    x = torch.linspace(-5, 5, 20).expand(3, -1)
    x = x.gather(1, torch.rand(3, 20, generator=generator).argsort(1))
    ends = []
    for k in range(3):
        theta = start
        for points in (x[k, :10], x[k, 10:]):
            y = tasks.amplitude[k] * torch.sin(points + tasks.phase[k])

            def loss(theta, points=points, y=y):
                return (predict(setting, theta[None], points[None])[0] - y).square().mean()

            theta = descend(loss, theta, steps=1, lr=0.02)
        ends.append(theta)
    torch.testing.assert_close(found, start + 0.25 * (torch.stack(ends).mean(0) - start))


def test_an_unknown_method():
    with pytest.raises(RunError, match=r"no method 'mamal' \(did you mean 'maml'\?\)"):
        run(0, "mamal", 1)


def test_divergence_has_a_name():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(DivergenceError, match=r"steps of size 100\.0 on a new sine have the error"):
        sine.measure(SMALL, initial(SMALL, 0), lr=100.0, generator=generator)


@pytest.mark.slow
def test_meta_learning_adapts_where_joint_training_does_not():
    quick = replace(
        SMALL, hidden=64, meta_batch=10, outer_lr=3e-3, reptile_epsilon=1.0, reptile_batch=10
    )
    errors = {method: run(0, method, 600, setting=quick) for method in METHODS}
    joint = errors.pop("joint")
    assert joint["mse@5"] > 3
    for method, found in errors.items():
        assert found["mse@10"] < 0.5 * joint["mse@10"], method
        assert found["mse@10"] < found["mse@5"] < found["mse@0"], method
