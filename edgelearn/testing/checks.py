"""What the contract of a client strategy asks for: one function for each check.

A check returns what it saw in plain words, raises `Broken` where the contract is broken (saying what
was expected, what happened and what to do), or `Skipped` where there is nothing to say.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from edgelearn.continual import memory as memories
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Update, supervised_loss
from edgelearn.device.fleet_store import RecordFile, RecordLayout
from edgelearn.device.learner import DeviceState, Fit, Learner
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.errors import EgressError, StrategyError
from edgelearn.federated import egress
from edgelearn.scenario.samples import Batch, OwnedSamples
from edgelearn.seeds import torch_generator
from edgelearn.testing.calls import (
    Call,
    call,
    clone,
    global_seed,
    global_states,
    same,
    snapshot,
    walk,
)
from edgelearn.testing.toy import (
    ENCODING,
    NUM_EXPERIENCES,
    ToyDevice,
    toy_devices,
    toy_learner,
    toy_owned,
    toy_store,
)

_RTOL = 1e-4


class Broken(Exception):  # noqa: N818 - a verdict, not an error
    """The contract is broken; the message says how."""


class Skipped(Exception):  # noqa: N818 - a verdict, not an error
    """Neither kept nor broken; the message says why."""


@dataclass(frozen=True)
class Subject:
    """The strategy under check, and what the checks share.

    Attributes:
        make: Builds the strategy.
        arguments: What it is built with.
    """

    make: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def learner(self) -> Learner:
        """A learner of the toy with the strategy."""
        return self.new_learner()

    def new_learner(self) -> Learner:
        """Build the strategy anew, with a learner of its own."""
        return toy_learner(self.make(**self.arguments))

    @cached_property
    def strategy(self) -> ClientStrategy:
        """The strategy."""
        return self.learner.strategy

    @cached_property
    def devices(self) -> list[ToyDevice]:
        """Three devices with different samples."""
        return toy_devices()

    @cached_property
    def calls(self) -> list[Call]:
        """Every call of a hook in the life of the first device."""
        return walk(self.learner, self.devices[0], self.learner.model.initial())

    def state_after_one(self, device: ToyDevice) -> tuple[DeviceState, Tensor]:
        """Return a device's state after its first experience, and the parameters [P] then."""
        params = self.learner.model.initial()
        fit = self.fit(self.learner.initial_state(device.store), params, device, 0)
        params = params + self.learner.model.layout.flatten(fit.update.arrays)
        return self.learner.consolidate(fit.state, params, device, upto=1), params

    def fit(
        self, state: DeviceState, params: Tensor, device: ToyDevice, position: int, turn: int = 0
    ) -> Fit:
        """Train a device for a round; it may have been away before."""
        server_round = 2 * position + turn + 1
        return self.learner.fit(
            state, params, device, position=position, server_round=server_round
        )


# -- one function for each check -------------------------------------------------------------------


def builds(subject: Subject) -> str:
    """It can be built, and says what it remembers."""
    given = ", ".join(f"{name}={value!r}" for name, value in subject.arguments.items())
    made = subject.make(**subject.arguments)
    if not isinstance(made, ClientStrategy):
        raise Broken(
            f"expected a subclass of edgelearn.ClientStrategy, got {type(made).__name__}; "
            "write `class Name(ClientStrategy):`"
        )
    declaration = made.declare(subject_model(subject), _facts(subject))
    _check_declaration(declaration)
    return f"{type(made).__name__}({given})"


def memory(subject: Subject) -> str:
    """Every hook returns the memory that was declared."""
    declaration = subject.learner.declaration

    def after(made: Call, result: Any) -> None:
        if isinstance(result, Memory):
            try:
                memories.check(result, declaration)
            except StrategyError as error:
                raise Broken(
                    f"after `{made.hook}`, {error}. A device has room for what is declared and no "
                    "more: name it in `declare`, with its shape and dtype, or do not return it"
                ) from None

    try:
        walk(subject.learner, subject.devices[0], subject.learner.model.initial(), after=after)
    except Broken:
        raise
    except Exception as error:
        if not _is_undeclared(error):
            raise Skipped("not seen to its end, since a hook fails") from None
        raise Broken(
            f"{error}. Name what the strategy remembers in `declare`, with its shape and dtype"
        ) from None
    if not declaration:
        return "nothing is remembered"
    return f"{', '.join(declaration)}: {subject.learner.memory_bytes:,} bytes on a device"


def hooks(subject: Subject) -> str:
    """Every hook runs, and returns what it should."""

    def after(made: Call, result: Any) -> None:
        if made.hook in ("adjust", "proximal"):
            params = made.inputs["params"]
            if result.shape != params.shape or result.dtype != params.dtype:
                raise Broken(
                    f"`{made.hook}` returned {_kind(result)}, expected {_kind(params)}, as many "
                    "numbers as the network has trained parameters"
                )
        if made.hook == "loss" and not _is_finite(result):
            raise Broken(
                f"`loss` gave {float(result[0])}, or a gradient that is not finite, on ordinary "
                "data; look for a division by zero or the logarithm or root of it"
            )

    params = subject.learner.model.initial()
    calls = walk(subject.learner, subject.devices[0], params, after=after)
    own = [hook for hook in dict.fromkeys(c.hook for c in calls) if _overrides(subject, hook)]
    return f"own hooks: {', '.join(own) or 'none'}; {len(calls)} calls"


def stateless(subject: Subject) -> str:
    """Nothing is kept on the strategy or its class."""
    learner = subject.new_learner()
    places = {"self": learner.strategy} | {
        kind.__name__: kind
        for kind in type(learner.strategy).__mro__
        if issubclass(kind, ClientStrategy) and kind is not ClientStrategy
    }
    before = {name: _attributes(place) for name, place in places.items()}
    walk(learner, subject.devices[0], learner.model.initial())
    for name, place in places.items():
        now = _attributes(place, copy=False)
        changed = [k for k in {**before[name], **now} if not _same_attribute(before[name], now, k)]
        if changed:
            raise Broken(
                f"{name}.{changed[0]} changed while a device learned. One strategy serves all "
                "devices, in several processes, and is built anew when a run is resumed: declare "
                f"a tensor for it and return `memory.replace({changed[0]}=...)`"
            )
    return "attributes are as they were"


def pure(subject: Subject) -> str:
    """The same inputs give the same bits, and are not changed."""
    for made in _own_calls(subject):
        one, changed = made.repeat(subject.strategy)
        if changed:
            raise Broken(
                f"`{made.hook}` changed its input {changed[0]}; expected all inputs to stay as "
                "they are. Compute new tensors (`x = x + 1`, `x.clone()`) instead of writing into "
                "given ones (`x += 1`, `x[0] = 1`, `x.add_(1)`)"
            )
        other, _ = made.repeat(subject.strategy)
        if not same(one, other):
            raise Broken(
                f"`{made.hook}`, called twice with the same inputs, gave two results; expected "
                "equal bits. Use nothing but the inputs: no counter, clock or global, and only "
                "the `generator` for randomness"
            )
    return "equal bits from equal inputs, which stay as they are"


def seeded(subject: Subject) -> str:
    """Randomness comes from the given generator alone."""
    for made in _own_calls(subject):
        with global_seed(1):
            before = global_states()
            one = call(subject.strategy, made.hook, _copies(made))
            after = global_states()
        drawn = [name for name in before if not same(before[name], after[name])]
        if made.hook == "loss" and drawn == ["torch"]:
            continue  # the learner seeds torch's generator for the steps, as dropout needs it
        takes = any(name == "generator" for name in made.inputs)
        advice = (
            "pass `generator=generator` to torch.rand, torch.randperm, ..."
            if takes
            else "only `extend` and `finish` may draw, from the generator that they are given"
        )
        if drawn:
            raise Broken(
                f"`{made.hook}` drew from the process-wide generator of {drawn[0]}: the result "
                f"would depend on what ran before; {advice}"
            )
        with global_seed(2):
            other = call(subject.strategy, made.hook, _copies(made))
        if not same(one, other) and made.hook != "loss":
            raise Broken(
                f"`{made.hook}` gave two results from one seed; expected equal bits; {advice}"
            )
    return "the same seed gives the same bits"


def stacked(subject: Subject) -> str:
    """Devices can be trained as one stack."""
    params = [
        clone(subject.learner.model.initial())
        + 0.1 * torch.randn(subject.learner.model.layout.size, generator=torch_generator(0, "k", k))
        for k in range(len(subject.devices))
    ]
    lives = [
        walk(subject.learner, device, start)
        for device, start in zip(subject.devices, params, strict=True)
    ]
    tried = []
    for hook in ("loss", "adjust", "proximal", "after_step"):
        if not _overrides(subject, hook) and hook != "loss":
            continue
        last = [[made for made in life if made.hook == hook][-1] for life in lives]
        _compare_stacked(subject.strategy, hook, last)
        tried.append(hook)
    return f"{', '.join(tried)} of {len(lives)} devices at once equal those one by one"


def durable(subject: Subject) -> str:
    """Memory survives being stored, and training goes on with the same bits."""
    device = subject.devices[0]
    state, params = subject.state_after_one(device)
    expected = subject.fit(state, params, device, 1)
    with tempfile.TemporaryDirectory(prefix="edgelearn-check-") as folder:
        restored = _through_fleet_store(Path(folder), subject, state, device)
        _expect_same_future(subject, state, restored, params, device, expected, "a fleet's file")
        _through_device_store(Path(folder), subject, device, expected)
    return f"restored from disk it goes on with the same bits ({subject.learner.memory_bytes:,} B)"


def declared_upload(subject: Subject) -> str:
    """Nothing but the model's update and the listed metrics is sent."""
    schema = egress.fit_schema(subject.learner.model.layout)
    for device in (subject.devices[0], *_odd_devices(subject)):
        state, params = subject.learner.initial_state(device.store), subject.learner.model.initial()
        update = subject.fit(state, params, device, 0).update
        try:
            schema.admit(update.arrays, update.metrics)
        except EgressError as error:
            notes = "; ".join(getattr(error, "__notes__", []))
            raise Broken(
                f"`upload` would not get past the guard: {error}{f' ({notes})' if notes else ''}. "
                "A device sends its update and three numbers; what is to stay on it belongs "
                "into the memory"
            ) from None
    return f"{len(schema.arrays)} tensors and {len(schema.scalars)} numbers, as declared"


def odd_data(subject: Subject) -> str:
    """A device without samples, and one with a single sample, can take part."""
    for device, what in zip(_odd_devices(subject), ("no samples", "one sample"), strict=True):
        state, params = subject.learner.initial_state(device.store), subject.learner.model.initial()
        try:
            for position in range(NUM_EXPERIENCES):
                fit = subject.fit(state, params, device, position)
                state = subject.learner.consolidate(fit.state, params, device, upto=position + 1)
                _expect_finite(fit, state, f"on a device with {what}")
        except (Broken, Skipped):
            raise
        except Exception as error:
            error.add_note(
                f"on a device with {what} in an experience; in `finish`, start with "
                "`if len(data) == 0: return memory`"
            )
            raise
    return "no samples and a single sample are handled"


def learns(subject: Subject) -> str:
    """Training lowers the loss of the toy."""
    device, model = subject.devices[0], subject.learner.model
    state, params = subject.learner.initial_state(device.store), model.initial()
    batch = device.samples(0).batch()
    first = float(supervised_loss(model(params, batch.x), batch))
    for turn in range(3):
        fit = subject.fit(state, params, device, 0, turn)
        _expect_finite(fit, fit.state, "in training")
        state, params = fit.state, params + model.layout.flatten(fit.update.arrays)
    last = float(supervised_loss(model(params, batch.x), batch))
    text = f"cross-entropy of the toy went from {first:.3f} to {last:.3f} in 3 rounds"
    if not last < first:
        raise Skipped(f"{text}; if that is not meant, look at the loss and its sign")
    return text


def whole_run(subject: Subject) -> str:
    """A fleet learns both experiences; a device that was away makes up for it."""
    params, states = _run(subject)
    again, states_again = _run(subject)
    if not (same(params, again) and same(states, states_again)):
        raise Broken("two runs with the same seed differ; expected the same bits")
    model = subject.learner.model
    shares = []
    for position in range(NUM_EXPERIENCES):
        batches = [device.samples(position).batch() for device in subject.devices]
        hits = [(model(params, b.x).argmax(1) == b.y).float().mean() for b in batches]
        shares.append(f"{float(torch.stack(hits).mean()):.0%}")
    return (
        f"{len(subject.devices)} devices, {NUM_EXPERIENCES} experiences, one device away in the "
        f"first; accuracy at the end: {', '.join(shares)}"
    )


@dataclass(frozen=True, slots=True)
class Check:
    """A check and those that have to pass before it can say anything."""

    name: str
    run: Callable[[Subject], str]
    needs: tuple[str, ...] = ()


_RUNS = ("builds", "memory", "hooks")
CHECKS = (
    Check("builds", builds),
    Check("memory", memory, ("builds",)),
    Check("hooks", hooks, ("builds", "memory")),
    Check("stateless", stateless, _RUNS),
    Check("pure", pure, (*_RUNS, "stateless")),
    Check("seeded", seeded, (*_RUNS, "stateless", "pure")),
    Check("stacked", stacked, (*_RUNS, "stateless", "pure", "seeded")),
    Check("durable", durable, (*_RUNS, "stateless", "pure", "seeded")),
    Check("upload", declared_upload, _RUNS),
    Check("odd data", odd_data, _RUNS),
    Check("learns", learns, _RUNS),
    Check("whole run", whole_run, (*_RUNS, "stateless", "pure", "seeded")),
)


# -- parts -----------------------------------------------------------------------------------------
