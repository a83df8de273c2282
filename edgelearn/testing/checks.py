"""What the contract of a client strategy asks for: one function for each check.

A check returns what it saw in plain words, raises `Broken` where the contract is broken (saying
what was expected, what happened and what to do), or `Skipped` where there is nothing to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgelearn.continual import memory as memories
from edgelearn.continual.memory import Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, supervised_loss
from edgelearn.device.state import DeviceState, Fit
from edgelearn.errors import EgressError, StrategyError
from edgelearn.federated import egress
from edgelearn.seeds import torch_generator
from edgelearn.testing.calls import (
    Call,
    call,
    clone,
    global_seed,
    global_states,
    model_state,
    same,
    snapshot,
    walk,
)
from edgelearn.testing.durable import expect_durable
from edgelearn.testing.stacked import compare_stacked
from edgelearn.testing.subject import ANYTHING, Broken, Skipped, Subject
from edgelearn.testing.toy import NUM_EXPERIENCES, toy_facts, toy_model

_ADVICE = (
    "Expected all inputs to stay as they are: compute new tensors (`x = x + 1`, `x.clone()`) "
    "instead of writing into given ones (`x += 1`, `x[0] = 1`, `x.add_(1)`)"
)


def builds(subject: Subject) -> str:
    """It can be built, and says what it remembers."""
    given = ", ".join(f"{name}={value!r}" for name, value in subject.arguments.items())
    made = subject.make(**subject.arguments)
    if not isinstance(made, ClientStrategy):
        raise Broken(
            f"expected a subclass of edgelearn.ClientStrategy, got {type(made).__name__}; "
            "write `class Name(ClientStrategy):`"
        )
    model = toy_model()
    declaration = made.declare(model, toy_facts())
    _check_declaration(declaration)
    _check_vectors(made, declaration, model.layout.num_trained)
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
        walk(subject.learner, subject.new_device(), subject.learner.model.initial(), after=after)
    except Broken:
        raise
    except ANYTHING as error:
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
        if made.hook in ("enter", "leave"):
            given = made.inputs["passage"].given if made.hook == "leave" else made.inputs["params"]
            _expect_passage(made.hook, given, result)
        if made.hook == "serve" and result.shape != made.inputs["params"].shape:
            raise Broken(
                f"`serve` returned {_kind(result)}, expected {_kind(made.inputs['params'])}"
            )
        if made.hook in ("loss", "gradient") and not _is_finite(result):
            raise Broken(
                f"`{made.hook}` gave {float(result[0])}, or a gradient that is not finite, on "
                "ordinary data; look for a division by zero or the logarithm or root of it"
            )

    params = subject.learner.model.initial()
    calls = walk(subject.learner, subject.new_device(), params, after=after)
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
    walk(learner, subject.new_device(), learner.model.initial())
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
    learner, device, untouched = subject.new_learner(), subject.new_device(), subject.new_device()
    at_first = model_state(learner.model)

    def after(made: Call, _result: Any) -> None:
        if not same(model_state(learner.model), at_first):
            raise Broken(f"`{made.hook}` changed its input model. {_ADVICE}")
        if not same(device.store, untouched.store):
            raise Broken(f"`{made.hook}` changed the samples of the device. {_ADVICE}")

    walk(learner, device, learner.model.initial(), after=after)
    for made in _own_calls(subject):
        one, changed = made.repeat(subject.strategy)
        if changed:
            raise Broken(f"`{made.hook}` changed its input {changed[0]}. {_ADVICE}")
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
    drawing = ["loss", "gradient", "fit"]
    if any(_overrides(subject, hook) for hook in ("view", "gradient")):
        drawing.append("proximal")  # then devices are trained one by one, each step seeded
    for made in _own_calls(subject):
        with global_seed(1):
            before = global_states()
            one = call(subject.strategy, made.hook, _copies(made))
            after = global_states()
        drawn = [name for name in before if not same(before[name], after[name])]
        if made.hook in drawing and drawn == ["torch"]:
            continue  # the learner seeds torch's generator for the steps, as dropout needs it
        takes = any(name == "generator" for name in made.inputs)
        advice = (
            "pass `generator=generator` to torch.rand, torch.randperm, ..."
            if takes
            else "only `extend`, `finish` and `serve` may draw, from the generator they are given"
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
    for hook in ("fit", "view", "gradient"):
        if _overrides(subject, hook):
            raise Skipped(f"it runs device by device, since it has a `{hook}` of its own")
    start, devices = subject.learner.model.initial(), subject.new_devices()
    lives = []
    for device in devices:
        generator = torch_generator(0, "stacked", device.device)
        params = start + 0.1 * torch.randn(start.shape, generator=generator)
        lives.append(walk(subject.learner, device, params))
    tried = []
    for hook in ("loss", "adjust", "proximal", "after_step"):
        if not _overrides(subject, hook) and hook != "loss":
            continue
        calls = [[made for made in life if made.hook == hook] for life in lives]
        if not all(calls):
            raise Skipped("it takes no steps, since the network is frozen")
        compare_stacked(subject.strategy, hook, [made[-1] for made in calls])
        tried.append(hook)
    return f"{', '.join(tried)} of {len(lives)} devices at once equal those one by one"


def durable(subject: Subject) -> str:
    """Memory survives being stored, and training goes on with the same bits."""
    expect_durable(subject)
    return "restored from disk, training goes on with the same bits"


def upload(subject: Subject) -> str:
    """Nothing but the model's update and the listed numbers is sent."""
    schema = egress.fit_schema(subject.learner.layout)
    for device in (subject.new_device(), *subject.odd_devices().values()):
        state, params = subject.at_start(device)
        try:
            update = subject.fit(state, params, device, 0).update
        except ANYTHING:
            continue  # other checks tell
        try:
            schema.admit(update.arrays, update.metrics)
        except EgressError as error:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
            raise Broken(
                f"`upload` would not get past the guard: {error}{notes}. A device sends its update "
                "and the listed numbers; what is to stay on it belongs into the memory"
            ) from None
    return f"{len(schema.arrays)} tensors and {len(schema.scalars)} numbers, as declared"


def odd_data(subject: Subject) -> str:
    """A device without samples, and one with a single sample, can take part."""
    for what, device in subject.odd_devices().items():
        state, params = subject.at_start(device)
        try:
            for position in range(NUM_EXPERIENCES):
                fit = subject.fit(state, params, device, position)
                state = subject.learner.consolidate(fit.state, params, device, upto=position + 1)
                _expect_finite(fit, state, f"on a device with {what}")
        except Broken:
            raise
        except ANYTHING as error:
            error.add_note(
                f"on a device with {what}; in `finish` and `upload`, begin with "
                "`if len(data) == 0: return ...`"
            )
            raise
    return "no samples and a single sample are handled"


def learns(subject: Subject) -> str:
    """Training lowers the loss of the toy."""
    device, learner, model = subject.new_device(), subject.learner, subject.learner.model
    state, params = subject.at_start(device)
    batch = device.samples(0).batch()
    first = float(supervised_loss(model(learner.whole(state, params), batch.x), batch))
    for turn in range(3):
        fit = subject.fit(state, params, device, 0, turn)
        _expect_finite(fit, fit.state, "in training")
        state, params = fit.state, params + learner.layout.flatten(fit.update.arrays)
    last = float(supervised_loss(model(learner.whole(state, params), batch.x), batch))
    text = f"cross-entropy of the toy went from {first:.3f} to {last:.3f} in 3 rounds"
    if not last < first:
        raise Skipped(f"{text}; if that is not meant, look at the loss and its sign")
    return text


def whole_run(subject: Subject) -> str:
    """A fleet learns both experiences; a device that was away makes up for it."""
    params, states = subject.run(inspect=_expect_finite)
    again, states_again = subject.run()
    if not (same(params, again) and same(states, states_again)):
        raise Broken("two runs with the same seed differ; expected the same bits")
    learner, devices = subject.learner, subject.new_devices()
    own = [learner.whole(state, params) for state in states]
    shares = []
    for position in range(NUM_EXPERIENCES):
        batches = [device.samples(position).batch() for device in devices]
        answers = [learner.model(p, b.x).argmax(1) for p, b in zip(own, batches, strict=True)]
        hits = [(a == b.y).float().mean() for a, b in zip(answers, batches, strict=True)]
        shares.append(f"{float(torch.stack(hits).mean()):.0%}")
    return (
        f"{len(devices)} devices, {NUM_EXPERIENCES} experiences, one device away in the "
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
    Check("upload", upload, _RUNS),
    Check("stacked", stacked, (*_RUNS, "stateless", "pure", "seeded")),
    Check("durable", durable, (*_RUNS, "stateless", "pure", "seeded", "upload")),
    Check("odd data", odd_data, (*_RUNS, "upload")),
    Check("learns", learns, (*_RUNS, "upload")),
    Check("whole run", whole_run, (*_RUNS, "stateless", "pure", "seeded", "upload")),
)


def _check_declaration(declaration: Any) -> None:
    if not isinstance(declaration, Mapping):
        raise Broken(
            f"`declare` returned {type(declaration).__name__}, expected a dictionary such as "
            '{"anchor": TensorSpec((model.layout.num_trained,))}; return {} to remember nothing'
        )
    for name, spec in declaration.items():
        if not isinstance(name, str) or not isinstance(spec, TensorSpec | SampleSpec):
            raise Broken(
                f"`declare` has {name!r}: {spec!r}, expected a name with a TensorSpec or SampleSpec"
            )
        if not all(type(size) is int and size >= 0 for size in spec.shape):
            raise Broken(
                f"`declare` gives {name!r} the shape {spec.shape!r}, expected whole numbers from 0"
            )


def _check_vectors(
    strategy: ClientStrategy, declaration: Mapping[str, TensorSpec | SampleSpec], size: int
) -> None:
    """Check that what `pull` and `path` name is there: engines read and write it by name."""
    pull, path = strategy.pull(), strategy.path()
    named = [("pull", name) for name in (pull.curvature, pull.anchor)] if pull else []
    named += [("path", name) for name in (path.charge, path.moved) if name] if path else []
    wanted = TensorSpec((size,))
    for hook, name in named:
        spec = declaration.get(name)
        is_vector = isinstance(spec, TensorSpec) and spec.dtype == wanted.dtype
        if spec is None or not is_vector or tuple(spec.shape) != wanted.shape:
            raise Broken(
                f"`{hook}` names {name!r}, which `declare` has as {spec!r}; expected "
                f"TensorSpec((model.layout.num_trained,)), of dtype {wanted.dtype}"
            )


def _expect_passage(hook: str, given: Tensor, result: Any) -> None:
    """Check what `enter` and `leave` return: parameters like those given, and the memory."""
    good = (
        len(result) == 2
        and isinstance(result[0], Tensor)
        and result[0].shape == given.shape
        and isinstance(result[1], Memory)
    )
    if not good:
        raise Broken(
            f"`{hook}` must return parameters {_kind(given)} and the memory; end it with "
            "`return params, memory`"
        )


def _is_undeclared(error: BaseException) -> bool:
    """Whether `Memory.replace` refused a name."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code is Memory.replace.__code__


def _overrides(subject: Subject, hook: str) -> bool:
    return subject.strategy.overrides(hook)


def _own_calls(subject: Subject) -> Iterator[Call]:
    return (made for made in subject.calls if _overrides(subject, made.hook))


def _copies(made: Call) -> dict[str, Any]:
    return {name: clone(value) for name, value in made.inputs.items()}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, tuple) else math.isfinite(value)


def _expect_finite(fit: Fit, state: DeviceState, where: str = "in a whole run") -> None:
    for what, values in (
        ("an update", fit.update.arrays),
        ("metrics", fit.update.metrics),
        ("a memory", state.memory),
    ):
        if not _is_finite(values):
            raise Broken(f"{what} with numbers that are not finite {where}; expected finite ones")


def _attributes(place: object, *, copy: bool = True) -> dict[str, Any]:
    """Return what may be state on an object or a class: no methods, no private names of Python."""
    found = {
        name: value
        for name, value in vars(place).items()
        if not name.startswith("__")
        and not (isinstance(place, type) and (callable(value) or hasattr(value, "__get__")))
    }
    return {name: snapshot(value) for name, value in found.items()} if copy else found


def _same_attribute(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return name in before and name in now and same(before[name], now[name])
