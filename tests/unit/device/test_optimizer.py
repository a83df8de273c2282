"""What becomes of a gradient: declared penalties and paths beside the hooks that define them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgelearn.continual.combined import Combined
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.naive import Naive
from edgelearn.continual.path import PathIntegral
from edgelearn.continual.strategy import ClientStrategy, Pull
from edgelearn.device.optimizer import Mover
from edgelearn.device.state import DeviceState
from edgelearn.scenario.spec import ClientSpec
from edgelearn.testing.toy import toy_devices, toy_learner

SIZE = 300


class Declares(ClientStrategy):
    """A pull and a path, declared."""

    def __init__(self, *, is_explicit: bool = False) -> None:
        self.is_explicit = is_explicit

    def declare(self, model: Any, facts: Any) -> Declaration:
        vector = TensorSpec((model.layout.num_trained,))
        return dict.fromkeys(("curvature", "anchor", "charge", "moved"), vector)

    def pull(self) -> Pull:
        return Pull("curvature", "anchor", 2.0, is_explicit=self.is_explicit)

    def path(self) -> PathIntegral:
        return PathIntegral("charge", "moved")


class Clips(Declares):
    """And changes the gradient."""

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return 0.5 * super().adjust(gradients, params, memory)


class ByHook(ClientStrategy):
    """The same as another, but an engine has to call each hook."""

    def __init__(self, inner: ClientStrategy) -> None:
        self.inner = inner

    def declare(self, model: Any, facts: Any) -> Declaration:
        return self.inner.declare(model, facts)

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return self.inner.adjust(gradients, params, memory)

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        return self.inner.proximal(params, memory, lr=lr)

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        return self.inner.after_step(before, after, gradients, memory)


def remembered(size: int, *, is_pulled: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {n: torch.rand(size, generator=generator) for n in ("curvature", "anchor", "charge")}
    found["moved"] = torch.rand(size, generator=generator)
    if not is_pulled:
        found["curvature"] = torch.zeros(size)
    return found


SPECS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
}


@pytest.mark.parametrize("kind", [Declares, Clips])
@pytest.mark.parametrize("is_explicit", [False, True])
@pytest.mark.parametrize("is_pulled", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_declared_is_what_hooks_compute(
    kind: type[Declares], is_explicit: bool, is_pulled: bool, mu: float, spec: str
) -> None:
    """Whatever the optimizer is, and whether or not a penalty is at work."""
    strategy = kind(is_explicit=is_explicit)
    found = []
    for one in (strategy, ByHook(strategy)):
        generator = torch.Generator().manual_seed(0)
        current = torch.randn(SIZE, generator=generator)
        memory = Memory(remembered(SIZE, is_pulled=is_pulled))
        before = {name: tensor.clone() for name, tensor in memory.items()}
        with torch.no_grad():
            mover = Mover(
                one, ClientSpec(strategy="naive", lr=0.1, **SPECS[spec]), current, memory, mu
            )
            now = memory
            for _ in range(5):
                gradients = torch.randn(SIZE, generator=generator)
                given = gradients.clone()
                now = mover.move(gradients, now)
                assert torch.equal(gradients, given)
            now = mover.kept(now)
        assert all(torch.equal(memory[name], before[name]) for name in memory)
        found.append((current, now))
    (current, memory), (other, expected) = found
    torch.testing.assert_close(current, other, rtol=1e-6, atol=1e-6)
    assert not torch.equal(expected["charge"], before["charge"])
    for name in memory:
        torch.testing.assert_close(memory[name], expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("is_explicit", [False, True])
def test_a_penalty_that_is_zero_everywhere_leaves_training_plain(is_explicit: bool) -> None:
    """So the first experience of EWC costs what naive training does, to the same bits."""
    runs = []
    for strategy in (Naive(), Declares(is_explicit=is_explicit)):
        learner = toy_learner(strategy, epochs=2)
        (device, *_) = toy_devices()
        memory = learner.initial_state(device.store).memory
        if "anchor" in memory:
            memory = memory.replace(anchor=memory["anchor"] + 5)
        mover = Mover(strategy, learner.spec, learner.model.initial(), memory, 0.0)
        assert mover.sees_gradient == (strategy.path() is not None)
        state = DeviceState(memory)
        fit = learner.fit(state, learner.model.initial(), device, position=0, server_round=1)
        runs.append(learner.model.layout.flatten(fit.update.arrays))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


class OnlyPath(ClientStrategy):
    """A path without a pull of its own."""

    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"charge": TensorSpec((model.layout.num_trained,))}

    def path(self) -> PathIntegral:
        return PathIntegral("charge")


class OnlyPull(Declares):
    """A pull without a path."""

    path = ClientStrategy.path


@pytest.mark.parametrize("is_explicit", [False, True])
def test_a_path_leaves_out_the_explicit_penalty_of_its_own_part_alone(is_explicit: bool) -> None:
    both = Combined({"a": OnlyPath(), "b": OnlyPull(is_explicit=is_explicit)})
    assert both.path() == PathIntegral("a.charge")
    assert both.is_declared == (not is_explicit)  # else each part is asked by itself
    learner, charges = toy_learner(both, epochs=2), []
    (device, *_) = toy_devices()
    memory = learner.initial_state(device.store).memory
    size = learner.model.layout.num_trained
    own = {f"b.{name}": tensor for name, tensor in remembered(size).items()}
    memory = memory.replace(**{"b.curvature": own["b.curvature"], "b.anchor": own["b.anchor"]})
    for strategy in (both, ByHook(both)):
        learner = toy_learner(strategy, epochs=2)
        params = learner.model.initial()
        fit = learner.fit(DeviceState(memory), params, device, position=0, server_round=1)
        charges.append(fit.state.memory["a.charge"])
    torch.testing.assert_close(charges[0], charges[1], rtol=1e-4, atol=1e-7)
    assert charges[0].any()


def test_only_one_part_may_keep_a_path() -> None:
    with pytest.raises(ValueError, match="keeps a path integral: a and b both do"):
        Combined({"a": OnlyPath(), "b": OnlyPath()})
    assert Combined({"a": OnlyPath(), "b": Naive()}).is_declared
