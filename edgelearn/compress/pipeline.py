"""Stages of compression, one after the other, from a network to a smaller one.

The stages are declared as data (`edgelearn.scenario.stages`) and run here. Each gives a new
network and leaves the last one as it is:

    from edgelearn.compress.pipeline import run_stages
    from edgelearn.compress.tune import samples_of
    from edgelearn.scenario.stages import parse

    stages = parse("train(5) | prune_channels(0.5) | distill(epochs=5) | quantize")
    for stage, state in run_stages(module, stages, samples_of(x, y), seed=0):
        print(stage.verb, state.module)

What it costs at each stage, and how well it answers by a runtime, is measured by
`edgelearn.compressing`, which is also what `edgelearn compress` runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgelearn.compress.fake_quantized import on_grid
from edgelearn.compress.prune import cubic_sparsity, largest
from edgelearn.compress.stored import read, store
from edgelearn.compress.structured import prune_channels
from edgelearn.compress.tune import Teaching, Training, loaded, tune
from edgelearn.errors import RunError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import plain
from edgelearn.scenario.stages import (
    Distill,
    Pack,
    Prune,
    PruneChannels,
    Quantize,
    Stage,
    Train,
    Tuned,
)
from edgelearn.seeds import derive

Factory = Callable[[str, Mapping[str, Any]], nn.Module]


@dataclass(frozen=True, slots=True)
class State:
    """A network on its way.

    Attributes:
        module: The network, in eval mode. Once quantized to 4 bits or packed, its weights are what
            codes and scales stand for.
        teacher: What `distill` asks: what the last `train` gave, else the network given.
        stays: Mask over the trained parameters [T], once weights are pruned: False is 0.
        bits: Of a weight, once quantized.
        packed: The file of the packed network.
        facts: What files say about the network: as given, but for the `model` and `args` of a new
            one that `distill` made.
    """

    module: nn.Module
    teacher: nn.Module
    stays: Tensor | None = None
    bits: int | None = None
    packed: bytes | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def run_stages(
    module: nn.Module,
    stages: Sequence[Stage],
    data: Samples,
    *,
    seed: int,
    factory: Factory | None = None,
    facts: Mapping[str, str] | None = None,
) -> Iterator[tuple[Stage, State]]:
    """Run stages, and give the network after each.

    Args:
        module: The network to begin with; it stays as it is.
        stages: What to do, in this order; see `edgelearn.scenario.stages.parse`.
        data: Training samples; quantization-aware training and channels' examples are from them.
        seed: Of everything random; stages differ in what they draw.
        factory: Makes a network of a name and arguments, for `distill`; the name is the `model` of
            the present network's facts, and "" where these have none, if the stage names none.
        facts: What files say about the network given.

    Raises:
        ValueError: If there are no samples.
        RunError: If a stage can't be done with this network; it is named.
        ExtraMissingError: If a stage needs a package that is not installed.
        DivergenceError: If a loss is not finite.
    """
    given = loaded(module, {})
    state = State(given, given, facts=dict(facts or {}))
    for place, stage in enumerate(stages):
        own = derive(seed, "compress-stage", place)
        match stage:
            case Train():
                tuned = tune(state.module, data, _training(stage), seed=own, stays=state.stays)
                state = replace(state, module=tuned, teacher=tuned)
            case Distill():
                state = _distilled(state, stage, data, own, factory)
            case Prune():
                state = _pruned(state, stage, data, own)
            case PruneChannels():
                smaller = prune_channels(
                    state.module,
                    data.batch(slice(0, 2)).x,
                    ratio=stage.ratio,
                    round_to=stage.round_to,
                )
                state = replace(state, module=_tuned(smaller, stage, data, own))
            case Quantize():
                state = _quantized(state, stage, data, own)
            case Pack():
                state = _packed(state)
        yield stage, state


def _distilled(
    state: State, stage: Distill, data: Samples, seed: int, factory: Factory | None
) -> State:
    pupil = state.module
    if stage.makes_network:
        if factory is None:
            raise RunError("distill: a new network needs a factory, and none was given")
        name = stage.model or state.facts.get("model", "")  # that of an earlier `distill`, too
        pupil = factory(name, stage.args)
        facts = {**state.facts, "args": json.dumps(plain(stage.args))}
        state = replace(state, facts=facts | ({"model": stage.model} if stage.model else {}))
    teaching = Teaching(
        teacher=state.teacher, alpha=stage.alpha, temperature=stage.temperature, kind=stage.kind
    )
    how = _training(stage)
    taught = tune(pupil, data, how, seed=seed, teaching=teaching, stays=state.stays)
    return replace(state, module=taught)


def _pruned(state: State, stage: Prune, data: Samples, seed: int) -> State:
    """Prune on the cubic schedule; each mask is within the last one."""
    module, stays = state.module, state.stays
    for pruning in range(stage.num_prunings):
        model = FlatModel(module)
        layout = model.layout
        share = cubic_sparsity(
            pruning + 1, begin=0, num_steps=stage.num_prunings, final=stage.sparsity
        )
        trained = model.initial()[: layout.num_trained]
        mask = largest(trained, layout, share, scope=stage.scope)
        stays = mask if stays is None else mask & stays
        module = loaded(module, layout.views(torch.where(stays, trained, torch.zeros(()))))
        own = derive(seed, "compress-pruning", pruning)
        module = _tuned(module, stage, data, own, stays=stays)
    return replace(state, module=module, stays=stays)


def _quantized(state: State, stage: Quantize, data: Samples, seed: int) -> State:
    module = _tuned(state.module, stage, data, seed, stays=state.stays, bits=stage.bits)
    if stage.bits < 8:  # 8 bits are the runtime's own
        model = FlatModel(module)
        module = loaded(
            module, model.layout.views(on_grid(model, model.initial(), bits=stage.bits))
        )
    return replace(state, module=module, bits=stage.bits)


def _packed(state: State) -> State:
    data = store(state.module, bits=state.bits, is_packed=True, facts=state.facts)
    tensors = read(data, source="pack").tensors
    return replace(state, module=loaded(state.module, tensors), packed=data)


def _tuned(
    module: nn.Module,
    stage: Tuned,
    data: Samples,
    seed: int,
    *,
    stays: Tensor | None = None,
    bits: int | None = None,
) -> nn.Module:
    """Train where a stage says so."""
    if not (stage.epochs or stage.steps):
        return loaded(module, {})
    return tune(module, data, _training(stage), seed=seed, stays=stays, bits=bits)


def _training(stage: Tuned) -> Training:
    return Training(
        epochs=stage.epochs,
        steps=stage.steps,
        batch_size=stage.batch_size,
        optimizer=stage.optimizer,
        lr=stage.lr,
        schedule=stage.schedule,
        momentum=stage.momentum,
        weight_decay=stage.weight_decay,
    )
