"""Reptile, MAML, ANIL and Per-FedAvg: what each makes of a batch, a round and its answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgelearn
from edgelearn.continual.anil import ANIL
from edgelearn.continual.local import Passage
from edgelearn.continual.maml import MAML
from edgelearn.continual.memory import Memory
from edgelearn.continual.naive import Naive
from edgelearn.continual.per_fedavg import PerFedAvg
from edgelearn.continual.reptile import Reptile
from edgelearn.continual.strategy import make_strategy
from edgelearn.device.learner import Learner
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch
from edgelearn.testing.toy import toy_devices, toy_facts, toy_learner, toy_model, toy_scenario

NONE = Memory({})


def batch(num=7):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, 1, 4, 4, generator=generator)
    return Batch(x, torch.randint(0, 4, (num,), generator=generator))


def by_modules(batch, *, steps, lr, names, is_second_order=False):
    """MAML with torch.func.functional_call, tensor by tensor: loss and gradient [T]."""
    module = toy_model().module
    theta = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    now = dict(theta)
    for _ in range(steps):
        logits = torch.func.functional_call(module, now, (batch.x[0::2],))
        loss = F.cross_entropy(logits, batch.y[0::2])
        gradients = torch.autograd.grad(
            loss, [now[name] for name in names], create_graph=is_second_order
        )
        for name, gradient in zip(names, gradients, strict=True):
            now[name] = now[name] - lr * gradient
    logits = torch.func.functional_call(module, now, (batch.x[1::2],))
    loss = F.cross_entropy(logits, batch.y[1::2])
    if is_second_order:
        gradients = torch.autograd.grad(loss, list(theta.values()))
    else:
        gradients = torch.autograd.grad(loss, list(now.values()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


NAMES = [name for name, _ in toy_model().module.named_parameters()]


@pytest.mark.parametrize("is_second_order", [False, True])
@pytest.mark.parametrize(("kind", "names"), [(MAML, NAMES), (ANIL, NAMES[-2:])])
def test_gradients_equal_those_written_tensor_by_tensor(kind, names, is_second_order):
    strategy = kind(inner_steps=3, inner_lr=0.3, is_second_order=is_second_order)
    model = toy_model()
    loss, gradient = strategy.gradient(model, model.initial(), batch(), NONE)
    expected_loss, expected = by_modules(
        batch(), steps=3, lr=0.3, names=names, is_second_order=is_second_order
    )
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected)


def test_the_four_variants_differ():
    found = []
    for kind in (MAML, ANIL):
        for is_second_order in (False, True):
            strategy = kind(inner_steps=3, inner_lr=0.3, is_second_order=is_second_order)
            model = toy_model()
            found.append(strategy.gradient(model, model.initial(), batch(), NONE)[1])
    for k, one in enumerate(found):
        assert all(not torch.allclose(one, other, rtol=1e-3) for other in found[k + 1 :])


def test_per_fedavg_is_first_order_maml_with_one_step():
    model = toy_model()
    ours = PerFedAvg(alpha=0.2).gradient(model, model.initial(), batch(), NONE)
    maml = MAML(inner_steps=1, inner_lr=0.2).gradient(model, model.initial(), batch(), NONE)
    torch.testing.assert_close(ours, maml, rtol=0, atol=0)
    expected_loss, expected = by_modules(batch(), steps=1, lr=0.2, names=NAMES)
    torch.testing.assert_close(ours, (expected_loss, expected))


@pytest.mark.parametrize("kind", [MAML, ANIL, PerFedAvg])
def test_a_batch_of_one_sample_is_support_and_query(kind):
    model = toy_model()
    one = batch(1)
    loss, gradient = kind().gradient(model, model.initial(), one, NONE)
    twice = Batch(one.x.repeat(2, 1, 1, 1), one.y.repeat(2))
    expected = kind().gradient(model, model.initial(), twice, NONE)
    torch.testing.assert_close((loss, gradient), expected)


# -- in training -----------------------------------------------------------------------------------


def fit(strategy, model=None, **spec):
    learner = toy_learner(strategy, **spec)
    if model is not None:
        learner = Learner(model, strategy, learner.spec, toy_facts(), 0)
    device, params = toy_devices()[0], learner.model.initial()
    state = learner.initial_state(device.store)
    update = learner.fit(state, params, device, position=0, server_round=1).update
    return params, learner.model.layout.flatten(update.arrays), update


def test_local_steps_follow_the_meta_gradient():
    _, delta, update = fit(MAML(inner_lr=0.3), epochs=1, batch_size=10, lr=0.1)
    assert update.metrics["num-steps"] == 1
    device = toy_devices()[0]
    order = torch.from_numpy(_order(len(device.ids[0])))
    loss, gradient = by_modules(device.samples(0).batch(order), steps=1, lr=0.3, names=NAMES)
    torch.testing.assert_close(delta, -0.1 * gradient)
    assert update.metrics["loss"] == pytest.approx(float(loss))


def _order(count):
    from edgelearn.device.learner import steps_seed
    from edgelearn.seeds import permutation, split

    return permutation(split(steps_seed(0, 1, 0), 0), count)


@pytest.mark.parametrize("kind", [MAML, ANIL, PerFedAvg])
def test_networks_with_batch_norm_are_trained(kind):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)]
    model = FlatModel(nn.Sequential(*layers))
    _, delta, _ = fit(kind(), model=model, batch_size=5)  # two batches, no half of one sample
    assert torch.isfinite(delta).all()
    means = model.layout.views(delta)["2.running_mean"]
    assert means.abs().max() > 0.01


@pytest.mark.parametrize("epsilon", [0.25, 0.5, 1.0])
def test_reptile_goes_a_part_of_the_way(epsilon):
    _, whole, _ = fit(Naive())
    _, part, _ = fit(Reptile(epsilon=epsilon))
    torch.testing.assert_close(part, epsilon * whole, rtol=1e-4, atol=1e-6)


def test_reptile_leaves_what_is_shared_beside_the_network():
    model = FlatModel(nn.Linear(1, 1), {"control": (1,)})
    given, local = torch.zeros(3), torch.tensor([1.0, 2.0, 8.0])
    passage = Passage(model, given, local, toy_devices()[0].samples(0), 1, 0.1)
    found, memory = Reptile(epsilon=0.5).leave(passage, NONE)
    assert found.tolist() == [0.5, 1.0, 8.0]
    assert memory is NONE


def test_reptile_with_epsilon_1_is_fedavg():
    def results(strategy, args):
        scenario = toy_scenario(client={"strategy": strategy, "args": args})
        rounds = edgelearn.simulate(scenario, engine="reference").rounds
        return [(line["loss"], line["accuracy"]) for line in rounds]

    assert results("reptile", {"epsilon": 1.0, "adapt_steps": 0}) == results("naive", {})


# -- the answer ------------------------------------------------------------------------------------


STRATEGIES = [
    Reptile(adapt_steps=3, adapt_lr=0.5),
    MAML(adapt_steps=3, adapt_lr=0.5),
    MAML(inner_lr=0.5, adapt_steps=3),
    PerFedAvg(alpha=0.5, adapt_steps=3),
    ANIL(inner_lr=0.5, adapt_steps=3),
    ANIL(adapt_steps=3, adapt_lr=0.5),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_device_answers_with_adapted_parameters(strategy):
    model, device = toy_model(), toy_devices()[0]
    data, params = device.samples(0), model.initial()
    found = strategy.serve(model, params, NONE, data, torch.Generator())
    module = toy_model().module
    moved = NAMES[-2:] if isinstance(strategy, ANIL) else NAMES
    optimizer = torch.optim.SGD([module.get_parameter(name) for name in moved], lr=0.5)
    for _ in range(3):
        module.zero_grad()
        F.cross_entropy(module(data.batch().x), data.batch().y).backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [Reptile, MAML, ANIL, PerFedAvg])
def test_without_steps_the_answer_is_the_global_one(kind):
    model, params = toy_model(), toy_model().initial()
    data = toy_devices()[0].samples(0)
    assert kind(adapt_steps=0).serve(model, params, NONE, data, torch.Generator()) is params


def test_the_int8_model_in_service_is_the_adapted_one():
    def served(steps):
        args = {"adapt_steps": steps, "adapt_lr": 0.5}
        client = {"strategy": "reptile", "args": args, "lr": 0.001}  # it hardly learns
        record = edgelearn.simulate(toy_scenario(client=client))
        last = record.rounds[-1]["accuracy"]
        return last["served"][1], last["float"][1]  # of the current experience

    (before, before_float), (after, after_float) = served(0), served(20)
    assert after > before
    assert after_float > before_float


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Reptile, {"epsilon": 0.0}, "epsilon is 0.0; allowed: above 0, to 1"),
        (Reptile, {"epsilon": 1.5}, "epsilon is 1.5"),
        (Reptile, {"adapt_steps": -1}, "adapt_steps is -1; at least 0"),
        (Reptile, {"adapt_lr": 0.0}, "adapt_lr is 0.0"),
        (MAML, {"inner_steps": 0}, "inner_steps is 0; at least 1"),
        (MAML, {"inner_lr": 0.0}, "inner_lr is 0.0"),
        (MAML, {"adapt_lr": -0.1}, "adapt_lr is -0.1"),
        (MAML, {"adapt_steps": -2}, "adapt_steps is -2"),
        (ANIL, {"inner_steps": 0}, "inner_steps is 0"),
        (ANIL, {"inner_lr": -1.0}, "inner_lr is -1.0"),
        (ANIL, {"adapt_steps": -2}, "adapt_steps is -2"),
        (PerFedAvg, {"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        (PerFedAvg, {"adapt_steps": -2}, "adapt_steps is -2"),
    ],
)
def test_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("reptile", Reptile), ("maml", MAML), ("anil", ANIL), ("per-fedavg", PerFedAvg)],
)
def test_names(name, kind):
    assert type(make_strategy(name, {})) is kind
    with pytest.raises(ScenarioError, match="adapt_steps is -1"):
        make_strategy(name, {"adapt_steps": -1})


def test_replay_joins_both_halves():
    strategy = make_strategy("maml+replay", {"replay": {"capacity": 4}})
    joined = batch(4).join(batch(4))
    plain = MAML().gradient(toy_model(), toy_model().initial(), joined, NONE)
    learner = toy_learner(strategy)
    memory = learner.initial_state(toy_devices()[0].store).memory
    model = learner.model
    torch.testing.assert_close(strategy.gradient(model, model.initial(), joined, memory), plain)
