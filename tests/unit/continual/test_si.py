from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from edgelearn.continual.memory import Memory, check
from edgelearn.continual.path import PathIntegral
from edgelearn.continual.si import SI
from edgelearn.continual.strategy import Pull
from edgelearn.scenario.samples import Samples
from edgelearn.testing.toy import toy_devices, toy_facts, toy_learner, toy_model

XI = 0.05


def initial(strategy):
    return Memory.initial(strategy.declare(toy_model(), toy_facts()))


def slow_path(params, batches, *, lr, pull=None):
    """The path integral over autograd's own parameters, step by step."""
    model = toy_model()
    theta, path, moved = params.clone(), torch.zeros_like(params), torch.zeros_like(params)
    for batch in batches:
        leaf = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(leaf, batch.x), batch.y), leaf)
        step = -lr * (g if pull is None else g + pull(theta))
        path, moved, theta = path - g * step, moved + step, theta + step
    return theta, path, moved


def one_epoch(device, position=0):
    """Steps of one sample each: their order is the learner's, so a single batch serves the loop."""
    return [device.samples(position).batch()]


@pytest.mark.parametrize("step", ["proximal", "explicit"])
def test_the_path_is_that_of_the_devices_own_steps(step):
    learner = toy_learner(SI(step=step, xi=XI), epochs=4, batch_size=100)
    device = toy_devices()[0]
    params = learner.model.initial()
    state = learner.initial_state(device.store)
    fit = learner.fit(state, params, device, position=0, server_round=1)
    _, path, moved = slow_path(params, one_epoch(device) * 4, lr=0.1)
    torch.testing.assert_close(fit.state.memory["path"], path, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(fit.state.memory["moved"], moved, rtol=1e-4, atol=1e-7)
    assert path.sum() > 0.1  # the loss has fallen by about that


def test_the_path_sums_to_the_fall_of_the_loss():
    learner = toy_learner(SI(), epochs=400, batch_size=100, lr=0.002)
    device = toy_devices()[0]
    params, model = learner.model.initial(), learner.model
    fit = learner.fit(
        learner.initial_state(device.store), params, device, position=0, server_round=1
    )
    batch = device.samples(0).batch()
    end = params + model.layout.flatten(fit.update.arrays)
    fall = F.cross_entropy(model(params, batch.x), batch.y) - F.cross_entropy(
        model(end, batch.x), batch.y
    )
    assert float(fit.state.memory["path"].sum()) == pytest.approx(float(fall), rel=0.01)


def test_the_path_goes_on_in_the_next_round_without_the_servers_jump():
    learner = toy_learner(SI(), epochs=2, batch_size=100)
    device = toy_devices()[0]
    first = learner.model.initial()
    second = first + 0.3  # what aggregation made of it
    state = learner.initial_state(device.store)
    path, moved = torch.zeros_like(first), torch.zeros_like(first)
    for server_round, params in enumerate((first, second), start=1):
        fit = learner.fit(state, params, device, position=0, server_round=server_round)
        _, more, further = slow_path(params, one_epoch(device) * 2, lr=0.1)
        state, path, moved = fit.state, path + more, moved + further
    torch.testing.assert_close(state.memory["path"], path, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(state.memory["moved"], moved, rtol=1e-4, atol=1e-6)


def test_importance_grows_when_the_experience_has_ended():
    strategy, model = SI(xi=XI), toy_model()
    data = toy_devices()[0].samples(0)
    size = model.layout.num_trained
    generator = torch.Generator().manual_seed(0)
    path, moved = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    old = torch.rand(size, generator=generator)
    memory = initial(strategy).replace(path=path, moved=moved, importance=old)
    params = model.initial() + 1
    after = strategy.finish(model, params, data, memory, generator)
    check(after, strategy.declare(model, toy_facts()))
    expected = torch.tensor(
        [
            max(0.0, o + p / (m * m + XI))
            for o, p, m in zip(old.tolist(), path.tolist(), moved.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(after["importance"], expected)
    assert (after["importance"] == 0).any()
    assert torch.equal(after["anchor"], params)
    assert not after["path"].any()
    assert not after["moved"].any()
    assert torch.equal(memory["path"], path)
    # A device that took part in no round of it keeps its importance and moves its anchor.
    again = strategy.finish(model, params + 1, data, after, generator)
    assert torch.equal(again["importance"], after["importance"])
    assert torch.equal(again["anchor"], params + 1)
    nothing = Samples(data.store, data.ids[:0])
    assert strategy.finish(model, params, nothing, after, generator) is after


def test_the_penalty_is_declared_and_has_the_papers_strength():
    assert SI(c=0.7).pull() == Pull("importance", "anchor", 1.4)
    assert SI().path() == PathIntegral("path", "moved")
    assert SI().is_declared
    assert not SI(storage="int8").is_declared  # a round begins with decoding
    pull = SI(c=0.7, step="explicit").pull()
    assert pull.is_explicit
    memory = Memory({"importance": torch.tensor([2.0, 0.0]), "anchor": torch.tensor([1.0, 1.0])})
    theta = torch.tensor([4.0, 4.0], requires_grad=True)
    (0.7 * (memory["importance"] * (theta - memory["anchor"]) ** 2).sum()).backward()
    torch.testing.assert_close(pull.gradient(theta.detach(), memory), theta.grad)


@pytest.mark.parametrize("step", ["proximal", "explicit"])
def test_the_penalty_is_no_part_of_the_gradient_but_of_the_step(step):
    strategy = SI(c=0.5, step=step)
    learner = toy_learner(strategy, epochs=3, batch_size=100)
    device = toy_devices()[0]
    params = learner.model.initial()
    state = learner.initial_state(device.store)
    importance = torch.rand(len(params), generator=torch.Generator().manual_seed(1))
    held = state.memory.replace(importance=importance, anchor=params + 0.5)
    fit = learner.fit(type(state)(held), params, device, position=0, server_round=1)
    if step == "explicit":
        _, path, moved = slow_path(
            params,
            one_epoch(device) * 3,
            lr=0.1,
            pull=lambda theta: 2 * 0.5 * importance * (theta - (params + 0.5)),
        )
        torch.testing.assert_close(fit.state.memory["path"], path, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fit.state.memory["moved"], moved, rtol=1e-4, atol=1e-6)
    delta = learner.model.layout.flatten(fit.update.arrays)
    torch.testing.assert_close(fit.state.memory["moved"], delta, rtol=1e-4, atol=1e-6)
    plain = learner.fit(state, params, device, position=0, server_round=1)
    assert not torch.allclose(delta, learner.model.layout.flatten(plain.update.arrays))


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_cheap_storage_pulls_nearly_as_much(storage):
    device = toy_devices()[0]
    updates = []
    for kind in ("float32", storage):
        learner = toy_learner(SI(c=5.0, storage=kind))
        params = learner.model.initial()
        state = learner.initial_state(device.store)
        fit = learner.fit(state, params, device, position=0, server_round=1)
        params = params + learner.model.layout.flatten(fit.update.arrays)
        state = learner.consolidate(fit.state, params, device, upto=1)
        fit = learner.fit(state, params, device, position=1, server_round=2)
        updates.append(learner.model.layout.flatten(fit.update.arrays))
    plain = toy_learner(SI(c=0.0))
    free = plain.fit(plain.initial_state(device.store), params, device, position=1, server_round=2)
    pulled = (plain.model.layout.flatten(free.update.arrays) - updates[0]).norm()
    assert 0 < (updates[1] - updates[0]).norm() < 0.2 * pulled


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"c": -1.0}, "c is -1.0; at least 0"),
        ({"xi": 0.0}, "xi is 0.0; above 0"),
        ({"xi": float("nan")}, "xi is nan"),
        ({"step": "big"}, "step is 'big'; allowed: proximal, explicit"),
        ({"storage": "int4"}, "storage is 'int4'; allowed: float32, float16, int8"),
    ],
)
def test_bad_arguments(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        SI(**kwargs)


@pytest.mark.slow
def test_importance_and_penalty_equal_avalanches():
    """Where the two agree: without its ceiling, and where ours is not below zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dependencies that it imports
        training = pytest.importorskip("avalanche.training.plugins")
    plugin = training.SynapticIntelligencePlugin
    model, strategy, lr = toy_model(), SI(c=1.5, xi=XI, step="explicit"), 0.1
    module, memory = model.module, initial(strategy)
    anchors, trajectories = (
        ({}, {}),
        {k: {} for k in ("old_theta", "new_theta", "grad", "trajectory", "cum_trajectory")},
    )
    for position in range(2):
        data = toy_devices()[0].samples(position)
        batch = data.batch()
        plugin.create_syn_data(module, anchors, trajectories, set())
        plugin.init_batch(module, anchors, trajectories, set())
        for _ in range(5):
            plugin.pre_update(module, trajectories, set())
            before = model.initial()
            module.zero_grad()
            F.cross_entropy(module(batch.x), batch.y).backward()
            gradients = model.layout.flatten({n: p.grad for n, p in module.named_parameters()})
            with torch.no_grad():
                for parameter in module.parameters():
                    # Not in place: what it takes down of a parameter's value is a view of it.
                    parameter.data = parameter.data - lr * parameter.grad
            plugin.post_update(module, trajectories, set())
            explicit = strategy.pull().gradient(before, memory)
            memory = strategy.after_step(before, model.initial(), gradients + explicit, memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of its np.square of a tensor
            plugin.update_ewc_data(module, anchors, trajectories, float("inf"), set(), 1, eps=XI)
        memory = strategy.finish(model, model.initial(), data, memory, torch.Generator())
    theirs = torch.cat([anchors[1][n].data for n in model.layout.names])
    assert (theirs > 1e-3).any()
    torch.testing.assert_close(memory["importance"], theirs.clamp(min=0), rtol=1e-3, atol=1e-6)
    module.zero_grad()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    plugin.compute_ewc_loss(module, anchors, set(), "cpu", lambd=2 * 1.5).backward()
    expected = model.layout.flatten({n: p.grad for n, p in module.named_parameters()})
    found = strategy.pull().gradient(model.initial(), memory)
    same = theirs >= 0
    assert expected[same].abs().max() > 0.01
    torch.testing.assert_close(found[same], expected[same], rtol=1e-3, atol=1e-6)
