"""Local training beside a plain PyTorch loop, and what happens around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.continual.ewc import EWC
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.naive import Naive
from edgelearn.continual.replay import Replay
from edgelearn.continual.strategy import ClientStrategy, Update
from edgelearn.device.learner import Learner, steps_seed
from edgelearn.device.state import DeviceState
from edgelearn.errors import DivergenceError, StateError, StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import ClientSpec
from edgelearn.seeds import permutation, split
from edgelearn.testing.toy import ToyDevice, toy_devices, toy_facts, toy_learner, toy_samples

ROUND = 3


def batch_norm(momentum: float | None = 0.1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.BatchNorm1d(8, momentum=momentum),
            nn.ReLU(),
            nn.Linear(8, 4),
        )


def learner_of(module: nn.Module, strategy: ClientStrategy, **spec: Any) -> Learner:
    values = {"epochs": 2, "batch_size": 4, "lr": 0.1, **spec}
    return Learner(
        FlatModel(module), strategy, ClientSpec(strategy="test", **values), toy_facts(), seed=0
    )


def fit(
    learner: Learner,
    device: ToyDevice,
    *,
    params: Tensor | None = None,
    position: int = 0,
    **options: Any,
) -> Any:
    state = learner.initial_state(device.store)
    return learner.fit(
        state,
        learner.model.initial() if params is None else params,
        device,
        position=position,
        server_round=ROUND,
        **options,
    )


def plain_loop(
    module: nn.Module, device: ToyDevice, spec: ClientSpec, *, mu: float = 0.0, seed: int = 0
) -> tuple[dict[str, Tensor], float]:
    """What anybody would write in PyTorch; returns local - global by name, and the mean loss."""
    module = copy.deepcopy(module).train()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            module.parameters(), spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
        optimizer = kind(module.parameters(), spec.lr, weight_decay=spec.weight_decay)
    x, y = device.samples(0).batch().x, device.samples(0).labels
    own_seed = steps_seed(seed, ROUND, device.device)
    losses = []
    for epoch in range(spec.epochs):
        order = torch.from_numpy(permutation(split(own_seed, epoch), len(y)))
        for chosen in order.split(spec.batch_size):
            loss = F.cross_entropy(module(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None
                parameter.grad += mu * (parameter.detach() - start[name])
            optimizer.step()
            losses.append(loss.item())
    delta = {
        name: value - start[name]
        for name, value in module.state_dict().items()
        if value.is_floating_point()
    }
    return delta, sum(losses) / len(losses)


def assert_equal(update: Update, expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert set(update.arrays) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(update.arrays[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("spec", "atol"),
    [
        ({}, 1e-7),
        ({"epochs": 1, "batch_size": 100}, 1e-7),
        ({"batch_size": 3}, 1e-7),
        ({"momentum": 0.9}, 3e-7),
        ({"weight_decay": 0.01}, 1e-7),
        ({"momentum": 0.5, "weight_decay": 0.1}, 1e-7),
        ({"optimizer": "adam", "lr": 0.01}, 1e-6),
        ({"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}, 1e-6),
    ],
)
def test_fit_equals_a_plain_pytorch_loop(spec: dict[str, Any], atol: float) -> None:
    device = toy_devices()[1]
    learner = toy_learner(Naive(), **spec)
    found = fit(learner, device)
    expected, loss = plain_loop(learner.model.module, device, learner.spec)
    assert_equal(found.update, expected, atol)
    assert found.update.metrics["loss"] == pytest.approx(loss, abs=1e-6)
    steps = learner.spec.epochs * -(-10 // learner.spec.batch_size)
    assert found.update.metrics["num-steps"] == steps
    assert found.update.metrics["num-examples"] == 10
    assert found.num_samples == 10 * learner.spec.epochs


def test_adam_with_weight_decay_is_not_adamw() -> None:
    device = toy_devices()[1]
    options = {"lr": 0.01, "weight_decay": 0.5}
    one = fit(toy_learner(Naive(), optimizer="adam", **options), device)
    other = fit(toy_learner(Naive(), optimizer="adamw", **options), device)
    assert not torch.allclose(one.update.arrays["1.weight"], other.update.arrays["1.weight"])


def test_fedprox_adds_its_pull_to_the_gradient() -> None:
    device = toy_devices()[0]
    learner = toy_learner(Naive())
    found = fit(learner, device, proximal_mu=0.7)
    expected, _ = plain_loop(learner.model.module, device, learner.spec, mu=0.7)
    assert_equal(found.update, expected, 1e-6)
    free = fit(learner, device)
    assert found.update.arrays["1.weight"].norm() < free.update.arrays["1.weight"].norm()


def test_batch_norm_statistics_travel() -> None:
    device, module = toy_devices()[0], batch_norm()
    learner = learner_of(module, Naive())
    expected, _ = plain_loop(module, device, learner.spec)
    assert "2.running_mean" in expected
    found = fit(learner, device)
    assert_equal(found.update, expected, 1e-6)
    assert found.update.arrays["2.running_var"].abs().sum() > 0


def test_the_global_parameters_are_not_changed() -> None:
    for learner in (toy_learner(Naive()), learner_of(batch_norm(), EWC())):
        device, params = toy_devices()[0], learner.model.initial()
        before = params.clone()
        state = learner.fit(
            learner.initial_state(), params, device, position=0, server_round=1
        ).state
        learner.consolidate(state, params, device, upto=1)
        assert torch.equal(params, before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_a_process_trained_before_leaves_no_trace(momentum: float | None) -> None:
    """Batch norm keeps statistics and a count in the module: neither is the next device's."""
    first, second, _ = toy_devices()
    used = learner_of(batch_norm(momentum), EWC(strength=1.0))
    params = used.model.initial()
    fit(used, first)
    fit(used, first, params=params + 1)
    fresh = learner_of(batch_norm(momentum), EWC(strength=1.0))
    by_used, by_fresh = fit(used, second, params=params), fit(fresh, second, params=params)
    assert_equal(by_used.update, dict(by_fresh.update.arrays))
    fit(used, first, params=params + 1)  # again something else in between
    after_used = used.consolidate(by_used.state, params, second, upto=1)
    after_fresh = learner_of(batch_norm(momentum), EWC(strength=1.0)).consolidate(
        by_fresh.state, params, second, upto=1
    )
    assert float(after_fresh.memory["fisher"].sum()) > 0
    assert torch.equal(after_used.memory["fisher"], after_fresh.memory["fisher"])


def test_hooks_see_the_model_in_eval_mode_with_the_devices_own_statistics() -> None:
    class Looks(ClientStrategy):
        def declare(self, model: FlatModel, facts: Any) -> Declaration:
            return {"seen": TensorSpec((2, 8))}

        def _look(self, model: FlatModel, memory: Memory, row: int) -> Memory:
            assert not model.module.training
            seen = memory["seen"].clone()
            seen[row] = model.module[2].running_mean  # type: ignore[index]
            return memory.replace(seen=seen)

        def start(self, model: Any, params: Any, memory: Memory, experience: Any) -> Memory:
            return self._look(model, memory, 0)

        def finish(self, model: Any, params: Any, data: Any, memory: Memory, gen: Any) -> Memory:
            return self._look(model, memory, 1)

    learner = learner_of(batch_norm(), Looks())
    device, params = toy_devices()[0], learner.model.initial()
    fit(learner, device)
    for offset in (3.0, 4.0):
        moved = params.clone()
        learner.model.layout.views(moved)["2.running_mean"].fill_(offset)
        state = learner.fit(
            learner.initial_state(), moved, device, position=0, server_round=1
        ).state
        moved = moved + 1
        state = learner.consolidate(state, moved, device, upto=1)
        assert state.memory["seen"][:, 0].tolist() == [offset, offset + 1]


def test_shuffles_differ_by_round_and_device_and_by_nothing_else() -> None:
    learner, device = toy_learner(Naive()), toy_devices()[0]
    state, params = learner.initial_state(), learner.model.initial()

    def weight(server_round: int, number: int = 0) -> Tensor:
        who = ToyDevice(number, device.store, device.ids)
        done = learner.fit(state, params, who, position=0, server_round=server_round)
        return done.update.arrays["1.weight"]

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    assert not torch.equal(weight(1), weight(1, number=1))


def test_dropout_is_seeded_and_the_process_wide_generator_is_left_alone() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))
    device = toy_devices()[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fit(learner_of(module, Naive()), device)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = fit(learner_of(module, Naive()), device)
    assert_equal(one.update, dict(other.update.arrays))


# -- the place of each hook ------------------------------------------------------------------------


class AllHooks(ClientStrategy):
    """Halves the gradient, shrinks parameters after the step, counts steps and their length."""

    def declare(self, model: FlatModel, facts: Any) -> Declaration:
        return {"steps": TensorSpec((1,)), "path": TensorSpec((1,)), "last": TensorSpec((172,))}

    def extend(self, batch: Any, memory: Memory, generator: torch.Generator) -> Any:
        return batch.join(batch)  # counts each sample twice: the mean stays

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients / 2

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        return params * (1 - lr)

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        return memory.replace(
            steps=memory["steps"] + 1,
            path=memory["path"] + (after - before).norm() + 0 * gradients.norm(),
            last=after,
        )


def test_hooks_are_called_in_their_documented_places() -> None:
    learner, device = toy_learner(AllHooks(), epochs=1), toy_devices()[0]
    found = fit(learner, device)
    params = learner.model.initial()
    order = torch.from_numpy(permutation(split(steps_seed(0, ROUND, 0), 0), 10))
    samples, path, steps = device.samples(0), 0.0, 0
    for chosen in order.split(4):
        batch = samples.batch(chosen)
        leaf = params.clone().requires_grad_()
        F.cross_entropy(learner.model(leaf, batch.x), batch.y).backward()
        assert leaf.grad is not None
        after = (params - 0.1 * leaf.grad / 2) * (1 - 0.1)
        path, steps, params = path + float((after - params).norm()), steps + 1, after
    memory = found.state.memory
    assert memory["steps"].item() == steps
    assert memory["path"].item() == pytest.approx(path, rel=1e-5)
    torch.testing.assert_close(memory["last"], params, rtol=0, atol=1e-6)
    local = learner.model.initial() + learner.model.layout.flatten(found.update.arrays)
    torch.testing.assert_close(local, params, rtol=0, atol=1e-6)


def test_memory_may_keep_what_a_step_gave_without_copying_it() -> None:
    class KeepsTheFirst(AllHooks):
        def after_step(self, before: Any, after: Any, gradients: Any, memory: Memory) -> Memory:
            first = memory["steps"].item() == 0
            return memory.replace(
                steps=memory["steps"] + 1, last=after if first else memory["last"]
            )

    class CopiesTheFirst(KeepsTheFirst):
        def after_step(self, before: Any, after: Any, gradients: Any, memory: Memory) -> Memory:
            return super().after_step(before, after.clone(), gradients, memory)

    device = toy_devices()[0]
    kept = fit(toy_learner(KeepsTheFirst()), device).state.memory["last"]
    copied = fit(toy_learner(CopiesTheFirst()), device).state.memory["last"]
    assert torch.equal(kept, copied)
    assert not kept.requires_grad


# -- what goes wrong -------------------------------------------------------------------------------


def test_divergence_names_the_device_and_the_round() -> None:
    learner, device = toy_learner(Naive(), lr=1e30), toy_devices()[2]
    with pytest.raises(DivergenceError, match=r"device 2 in round 3: loss (nan|inf)"):
        fit(learner, device)


def test_divergence_in_the_last_step_is_noticed() -> None:
    class Breaks(ClientStrategy):
        def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
            return params / 0

    learner, device = toy_learner(Breaks(), epochs=1, batch_size=100), toy_devices()[0]
    with pytest.raises(DivergenceError, match="device 0 in round 3"):
        fit(learner, device)


def test_a_state_of_another_run_is_refused() -> None:
    learner, device = toy_learner(Naive()), toy_devices()[0]
    state = DeviceState(Memory({}), begun=2, consolidated=1)
    with pytest.raises(StateError, match="has begun 2 experiences but was asked for position 0"):
        learner.fit(state, learner.model.initial(), device, position=0, server_round=1)


@pytest.mark.parametrize("hook", ["start", "after_step", "finish"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda memory: None, "returned NoneType where its memory was expected"),
        (lambda memory: Memory({}), "lacks the declared anchor"),
        (lambda memory: Memory({**memory, "more": torch.ones(1)}), "more, which is not declared"),
        (lambda memory: memory.replace(anchor=torch.ones(3).double()), "declared"),
    ],
)
def test_a_memory_other_than_declared_is_refused(hook: str, wrong: Any, message: str) -> None:
    class Wrong(ClientStrategy):
        def declare(self, model: FlatModel, facts: Any) -> Declaration:
            return {"anchor": TensorSpec((3,))}

    place = {"start": 2, "after_step": 3, "finish": 3}[hook]
    setattr(Wrong, hook, lambda self, *inputs: wrong(inputs[place]))
    learner, device = toy_learner(Wrong(), epochs=1, batch_size=100), toy_devices()[0]
    with pytest.raises(StrategyError, match=message):
        learner.consolidate(fit(learner, device).state, learner.model.initial(), device, upto=1)


def test_an_upload_that_is_no_update_is_refused() -> None:
    class Wrong(ClientStrategy):
        def upload(self, update: Update, data: Any, memory: Memory) -> Any:
            return update.arrays

    with pytest.raises(StrategyError, match=r"Wrong\.upload returned dict, not an Update"):
        fit(toy_learner(Wrong()), toy_devices()[0])


def test_an_update_is_read_once_so_that_what_is_checked_is_what_is_sent() -> None:
    class TwoFaced(Mapping[str, Any]):
        def __init__(self, honest: Mapping[str, Any]) -> None:
            self.honest, self.reads = honest, 0

        def __iter__(self) -> Iterator[str]:
            return iter(self.honest)

        def __len__(self) -> int:
            return len(self.honest)

        def __getitem__(self, name: str) -> Any:
            self.reads += 1
            return self.honest[name] if self.reads <= len(self.honest) else "secret"

    class Sly(ClientStrategy):
        def upload(self, update: Update, data: Any, memory: Memory) -> Update:
            return Update(update.arrays, TwoFaced(update.metrics))

    metrics = fit(toy_learner(Sly()), toy_devices()[0]).update.metrics
    for _ in range(3):
        assert metrics["num-examples"] == 10
        assert "secret" not in metrics.values()


# -- accounts --------------------------------------------------------------------------------------


def test_memory_bytes_count_samples_as_a_real_device_stores_them() -> None:
    learner = toy_learner(Replay(capacity=10))
    assert learner.memory_bytes == 10 * (4 + 17) + 4 * 8
    assert toy_learner(EWC()).memory_bytes == 4 * (172 + 172 + 1)


def test_held_ids_are_the_current_samples_and_the_kept_ones() -> None:
    learner, device = toy_learner(Replay(capacity=12)), toy_devices()[0]
    state = learner.consolidate(fit(learner, device).state, learner.model.initial(), device, upto=1)
    kept = state.memory["buffer"]
    assert int((kept >= 0).sum()) == 10
    held = learner.held_ids(state, device.samples(1))
    expected = torch.cat([device.ids[1], kept[kept >= 0]])
    assert torch.equal(held, expected)


def test_calibration_is_spread_over_present_and_remembered_samples() -> None:
    learner, store = toy_learner(Replay(capacity=8)), toy_samples()
    buffer = torch.arange(40, 48, dtype=torch.int32)
    memory = learner.initial_state(store).memory.replace(buffer=buffer)
    state = DeviceState(memory, 1, 1)
    present = Samples(store, torch.arange(24, dtype=torch.int32))
    assert learner.calibration_ids(state, present, most=64).tolist() == [*range(24), *range(40, 48)]
    some = learner.calibration_ids(state, present, most=8).tolist()
    assert some == [0, 4, 8, 12, 16, 20, 40, 44]
