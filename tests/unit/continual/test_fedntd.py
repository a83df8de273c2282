"""FedNTD: distillation of the global network in the classes that samples are not of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgelearn.continual.fedntd import FedNTD
from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import supervised_loss
from edgelearn.scenario.samples import Batch
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import NUM_CLASSES, toy_devices, toy_learner, toy_model

T = toy_model().layout.num_trained


def batch_of(*, has_tasks: bool = False) -> Batch:
    batch = toy_devices()[0].samples(0).batch()
    if not has_tasks:
        return batch
    mask = torch.zeros(len(batch), NUM_CLASSES, dtype=torch.bool)
    mask[:, :3] = True
    return Batch(batch.x, batch.y, None, mask)


def shifted(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return toy_model().initial() + 0.3 * torch.randn(T, generator=generator)


def loss_of(strategy: FedNTD, params: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    return strategy.loss(toy_model(), params, batch, Memory({"teacher": teacher}))


def by_loop(
    params: Tensor, teacher: Tensor, batch: Batch, temperature: float, classes: range
) -> Tensor:
    """The mean over samples, each with its true class cut out, by torch's own divergence."""
    model, total = toy_model(), torch.zeros(())
    own, given = model(params, batch.x), model(teacher, batch.x)
    for row, label in enumerate(batch.y.tolist()):
        others = [c for c in classes if c != label]
        total = total + nn.functional.kl_div(
            torch.log_softmax(own[row, others] / temperature, 0),
            torch.softmax(given[row, others] / temperature, 0),
            reduction="sum",
        )
    return total / len(batch)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("has_tasks", [False, True])
def test_the_loss_is_that_of_a_loop_over_samples(temperature: float, has_tasks: bool) -> None:
    params, teacher, batch = shifted(1), shifted(2), batch_of(has_tasks=has_tasks)
    classes = range(3 if has_tasks else NUM_CLASSES)
    found = loss_of(FedNTD(beta=0.5, temperature=temperature), params, teacher, batch)
    apart = temperature**2 * by_loop(params, teacher, batch, temperature, classes)
    expected = supervised_loss(toy_model()(params, batch.x), batch) + 0.5 * apart
    torch.testing.assert_close(found, expected)
    assert float(apart) > 0.01


def test_the_true_class_is_free_to_move() -> None:
    """What raises the logits of one class alone costs nothing for samples of that class."""
    batch = batch_of()
    label = int(batch.y[0])
    rows = batch.y == label
    one = Batch(batch.x[rows], batch.y[rows])
    teacher = shifted(1)
    params = teacher.clone()
    params[T - NUM_CLASSES + label] += 2.0  # the last layer's bias
    plain = supervised_loss(toy_model()(params, one.x), one)
    torch.testing.assert_close(loss_of(FedNTD(), params, teacher, one), plain)
    params[T - NUM_CLASSES + (label + 1) % NUM_CLASSES] += 2.0
    assert loss_of(FedNTD(), params, teacher, one) > 0.05 + supervised_loss(
        toy_model()(params, one.x), one
    )


def test_the_teacher_is_the_network_of_the_round() -> None:
    strategy, device = FedNTD(), toy_devices()[0]
    learner = toy_learner(strategy)
    state = learner.initial_state(device.store)
    for server_round, params in enumerate((shifted(1), shifted(2)), 1):
        _, memory = strategy.enter(learner.model, params, state.memory)
        assert torch.equal(memory["teacher"], params[:T])
        fit = learner.fit(state, params, device, position=0, server_round=server_round)
        assert not fit.state.memory["teacher"].any(), "it does not outlive the round"


def test_it_keeps_a_device_closer_to_what_the_others_know() -> None:
    """Classes 2 and 3 are not among the device's samples; the global network knows them."""
    device = toy_devices()[0]
    everything, own = device.samples(1).batch(), []
    naive = toy_learner(FedNTD(beta=0.0))
    params = naive.model.initial()
    for server_round in range(1, 4):  # a network that knows classes 2 and 3
        state = naive.initial_state(device.store)
        fit = naive.fit(state, params, device, position=1, server_round=server_round)
        params = params + naive.layout.flatten(fit.update.arrays)
    for beta in (0.0, 1.0):
        learner = toy_learner(FedNTD(beta=beta), epochs=10)
        state = learner.initial_state(device.store)
        fit = learner.fit(state, params, device, position=0, server_round=1)
        local = params + learner.layout.flatten(fit.update.arrays)
        logits = learner.model(local, everything.x)[:, 2:]
        own.append(float((logits.argmax(1) + 2 == everything.y).float().mean()))
    assert own[1] >= own[0]
    assert own[1] > 0.9


@pytest.mark.parametrize("arguments", [{"beta": 0.0}, {"beta": 0.3, "temperature": 3.0}])
def test_it_keeps_the_contract_with_any_arguments(arguments: dict[str, Any]) -> None:
    findings = check_strategy(FedNTD, **arguments)
    assert [f for f in findings if f.passed is not True] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1.0}, r"beta is -1\.0; at least 0"),
        ({"beta": float("nan")}, "beta is nan; at least 0"),
        ({"temperature": 0.0}, r"temperature is 0\.0; above 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedNTD(**arguments)
