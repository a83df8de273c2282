"""How the hooks of a client strategy are called, recorded, repeated and compared."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from edgelearn.continual.local import LocalTask, Passage, Trained
from edgelearn.continual.memory import Memory, passing
from edgelearn.continual.strategy import STEP_HOOKS, ClientStrategy, Update
from edgelearn.device.learner import Learner
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples, SharedSamples
from edgelearn.seeds import torch_generator
from edgelearn.testing.toy import NUM_EXPERIENCES, ToyDevice

_IN_TRAINING = ("fit", *STEP_HOOKS)
_RETURNS: dict[str, type] = {
    "start": Memory,
    "enter": tuple,
    "is_frozen": bool,
    "fit": Trained,
    "view": FlatModel,
    "extend": Batch,
    "gradient": tuple,
    "loss": Tensor,
    "adjust": Tensor,
    "proximal": Tensor,
    "after_step": Memory,
    "leave": tuple,
    "upload": Update,
    "finish": Memory,
    "serve": Tensor,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a hook, with its inputs as they were before it.

    Attributes:
        hook: Name of the hook.
        inputs: Its arguments by name, in order.
    """

    hook: str
    inputs: Mapping[str, Any]

    def repeat(self, strategy: ClientStrategy, *, seed: int = 0) -> tuple[Any, list[str]]:
        """Call the hook again, on copies of the same inputs.

        Args:
            strategy: The strategy.
            seed: Of the process-wide generators, in case the hook draws from them.

        Returns:
            What the hook returned (for `loss` the value and its gradient), and the names of the
            inputs that it changed.
        """
        inputs = {name: clone(value) for name, value in self.inputs.items()}
        model = _model_in(self.inputs)
        before = model_state(model)
        with global_seed(seed):
            result = call(strategy, self.hook, inputs)
        changed = [
            name
            for name, value in inputs.items()
            if not isinstance(value, Generator) and not same(value, self.inputs[name])
        ]
        if not same(before, model_state(model)):
            changed.append("model")
        return result, changed


def call(strategy: ClientStrategy, hook: str, inputs: Mapping[str, Any]) -> Any:
    """Call a hook as a device does; `loss` gives its value and its gradient."""
    model = _model_in(inputs)
    if model is not None:
        model.module.train(hook in _IN_TRAINING)
    function = getattr(strategy, hook)
    if hook == "loss":
        params = inputs["params"].detach().requires_grad_()
        loss = function(*{**inputs, "params": params}.values())
        _expect(strategy, hook, loss)
        gradients = None
        if loss.requires_grad:
            (gradients,) = torch.autograd.grad(loss, params, allow_unused=True)
        if gradients is None:
            raise StrategyError(
                f"{type(strategy).__name__}.loss does not depend on the `params` that it is "
                "given; evaluate the network with `model(params, batch.x)`"
            )
        return loss.detach(), gradients
    by_name = {name: value for name, value in inputs.items() if name == "lr"}
    by_place = [value for name, value in inputs.items() if name != "lr"]
    with torch.set_grad_enabled(hook not in ("adjust", "proximal", "after_step", "gradient")):
        result = function(*by_place, **by_name)
    _expect(strategy, hook, result)
    return result


def _model_in(inputs: Mapping[str, Any]) -> FlatModel | None:
    """Return the network that a hook is given, in whatever it is given."""
    for value in inputs.values():
        if isinstance(value, FlatModel):
            return value
        if isinstance(value, LocalTask | Passage):
            return value.model
    return None


def _expect(strategy: ClientStrategy, hook: str, result: Any) -> None:
    expected = _RETURNS[hook]
    if not isinstance(result, expected):
        raise StrategyError(
            f"{type(strategy).__name__}.{hook} returned {type(result).__name__}, expected "
            f"a {expected.__name__}"
        )
    if isinstance(result, Tensor) and hook == "loss" and result.shape != ():
        raise StrategyError(
            f"{type(strategy).__name__}.loss returned a tensor of shape {tuple(result.shape)}, "
            "expected a scalar; take its mean or sum"
        )


def walk(
    learner: Learner,
    device: ToyDevice,
    params: Tensor,
    *,
    steps: int = 3,
    after: Callable[[Call, Any], None] = lambda _call, _result: None,
) -> list[Call]:
    """Lead a device through all experiences by hand, calling every hook in its place.

    Args:
        learner: Holds the strategy.
        device: The device.
        params: Parameters [P] to begin with; the model has nothing but trained ones.
        steps: Training steps in an experience.
        after: Called after every hook, with the call and what came of it.

    Returns:
        The calls, each with a copy of its inputs.
    """
    strategy, model, spec = learner.strategy, learner.model, learner.spec
    lr, num_trained = spec.lr, model.layout.num_trained
    calls: list[Call] = []

    def do(hook: str, **inputs: Any) -> Any:
        calls.append(Call(hook, {name: clone(value) for name, value in inputs.items()}))
        result = call(strategy, hook, inputs)
        after(calls[-1], result)
        return result

    memory = learner.initial_state(device.store, device.public).memory
    for position in range(NUM_EXPERIENCES):
        experience, data = device.experience(position), device.samples(position)
        trained = params[:num_trained]
        memory = do("start", model=model, params=trained, memory=memory, experience=experience)
        generator = torch_generator(0, "walk", device.device, position)
        local, memory = do("enter", model=model, params=params, memory=memory)
        if do("is_frozen", memory=memory):
            pass
        elif strategy.overrides("fit"):
            seed = 7 * device.device + position
            done = do("fit", task=LocalTask(model, local, memory, data, spec, seed))
            local, memory = done.params, done.memory
        else:
            current, seen = local[:num_trained], do("view", model=model)
            for step in range(steps):
                size = spec.batch_size
                batch = data.batch(slice(step * size % len(data), step * size % len(data) + size))
                batch = do("extend", batch=batch, memory=memory, generator=generator)
                hook = "gradient" if strategy.overrides("gradient") else "loss"
                _, gradients = do(hook, model=seen, params=current, batch=batch, memory=memory)
                gradients = do("adjust", gradients=gradients, params=current, memory=memory)
                before, current = current, current - lr * gradients
                current = do("proximal", params=current, memory=memory, lr=lr)
                memory = do(
                    "after_step", before=before, after=current, gradients=gradients, memory=memory
                )
            local = torch.cat([current, local[num_trained:]])
        passage = Passage(model, params, local, data, steps, lr)
        local, memory = do("leave", passage=passage, memory=memory)
        metrics = {"num-examples": len(data), "loss": 1.0, "num-steps": steps}
        update = Update(model.layout.views(local - params), metrics)
        do("upload", update=update, data=data, memory=memory)
        memory = memory.replace(**passing(learner.declaration))
        params = local
        trained = params[:num_trained]
        memory = do(
            "finish", model=model, params=trained, data=data, memory=memory, generator=generator
        )
        do("serve", model=model, params=params, memory=memory, data=data, generator=generator)
    return calls


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the process-wide generators of torch, NumPy and Python; restore them after."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def global_states() -> dict[str, Any]:
    """Return the states of the process-wide generators, by the name of what draws from them."""
    return {
        "torch": torch.get_rng_state(),
        "NumPy": np.random.get_state(),  # noqa: NPY002
        "Python's random": random.getstate(),
    }


# -- copies and comparison -------------------------------------------------------------------------


def clone(value: Any) -> Any:
    """Return a copy that shares no tensor with the original; the model is not copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Generator):
        return value.clone_state()
    if isinstance(value, Memory):
        return Memory({name: clone(tensor) for name, tensor in value.items()}, clone(value.store))
    if isinstance(value, SharedSamples):
        return SharedSamples(clone(value.x), clone(value.y), value.encoding, value.domains)
    if isinstance(value, Batch | Samples | LocalTask | Passage):
        fields = (clone(getattr(value, f.name)) for f in dataclasses.fields(value))
        return type(value)(*fields)
    if isinstance(value, Update):
        arrays = {name: clone(array) for name, array in value.arrays.items()}
        return Update(arrays, dict(value.metrics))
    return value


def snapshot(value: Any) -> Any:
    """Return a deep copy, or the value itself where it can't be copied."""
    if isinstance(value, Generator):
        return value.clone_state()
    try:
        return copy.deepcopy(value)
    except Exception:  # anything may be kept in an attribute
        return value


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors bit by bit (NaN equals NaN)."""
    return _same(one, other, set())


def _same(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    if one is other or (id(one), id(other)) in seen:
        return True
    seen.add((id(one), id(other)))
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Generator):
        return bool(torch.equal(one.get_state(), other.get_state()))
    if isinstance(one, Memory) and not _same(one.store, other.store, seen):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k], seen) for k in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(a, b, seen) for a, b in pairs)
    parts = _parts(one)
    if parts is not None:
        return _same(parts, _parts(other), seen)
    return _same_other(one, other)


def _parts(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, or None if it has no such things."""
    if isinstance(value, type) or inspect.isroutine(value):
        return None
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _same_other(one: Any, other: Any) -> bool:
    with contextlib.suppress(Exception):  # a comparison of somebody else's type
        if bool(one == other):
            return True
    try:
        return pickle.dumps(one) == pickle.dumps(other)
    except Exception:  # nor can it be copied, so there is nothing to compare it with
        return True


def model_state(model: Any) -> dict[str, Tensor] | None:
    """Return copies of what a model holds; None for anything else."""
    if not isinstance(model, FlatModel):
        return None
    return {name: value.clone() for name, value in model.module.state_dict().items()}
