"""A group of devices measures what each of its devices would measure alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgelearn.device.evaluate import Counts, Trial, evaluate, evaluate_group
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Prepared, Int8Runtime
from edgelearn.runtime.protocol import GroupPrepared, Observed, Prepared, RangedPrepared, Rows
from edgelearn.runtime.ranges import Kept, Places
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_scenario

NUM_CLASSES, SHAPE = 4, (1, 4, 4)


class Tokens(nn.Module):
    """Each row of an image is a token; one layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.third = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again, self.fourth = self.first, self.third
        self.last = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.third(self.again(torch.relu(self.first(x.squeeze(1)))))
        return self.last(tokens.flatten(1))  # type: ignore[no-any-return]


class Folded(Tokens):
    """The same numbers, but a layer can't tell whose tokens it has."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.third(self.again(torch.relu(self.first(x.reshape(-1, 4)))))
        return self.last(tokens.reshape(len(x), -1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(input_shape=SHAPE, num_classes=NUM_CLASSES, hidden=(8,)),
    "cnn": lambda: cnn(input_shape=SHAPE, num_classes=NUM_CLASSES, channels=(4, 8), hidden=8),
    "tokens, tied": Tokens,
    "folded": Folded,
}
STREAMS = ["class-incremental", "task-incremental", "domain-incremental"]


def made(name: str) -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return FlatModel(NETWORKS[name]())


def world_of(kind: str) -> World:
    return build(toy_scenario(stream={"kind": kind}, fleet={"num_devices": 6, "cohort": 6}))


def trials_of(world: World) -> list[Trial]:
    """All devices; the second has no calibration samples, the third no tests, the last neither."""
    none = torch.empty(0, dtype=torch.int32)
    trials = []
    for device in range(6):
        ids = none if device in (1, 5) else world.train_samples(device, 0).ids[: 3 + device]
        tests = [world.test_samples(device, e) for e in range(2)]
        if device in (2, 5):
            tests = [Samples(world.test, none) for _ in tests]
        trials.append(Trial(Samples(world.train, ids), tests))
    return trials


def one_by_one(
    model: FlatModel, params: Tensor, prepared: Prepared, trials: list[Trial]
) -> list[Counts]:
    return [evaluate(model, params, prepared, t.calibration.batch().x, t.tests) for t in trials]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("runtime", [Int8Runtime(), FloatRuntime()], ids=["int8", "float"])
def test_counts_of_a_group_are_those_of_its_devices(kind: str, name: str, runtime: Any) -> None:
    world, model = world_of(kind), made(name)
    params = model.initial()  # right about some answers, wrong about others
    prepared, trials = runtime.prepare(model, params), trials_of(world)
    expected = one_by_one(model, params, prepared, trials)
    model.module.train()
    assert evaluate_group(model, params, prepared, trials) == expected
    assert 0 < sum(sum(c.served) for c in expected) < sum(sum(c.count) for c in expected)
    assert expected[2].count == expected[5].served == (0, 0)


class Watched:
    """A runtime's own prepared model, without the ability to serve groups."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.asked = prepared, 0

    def calibrated(self, calibration: Tensor) -> Any:
        self.asked += 1
        return self.prepared.calibrated(calibration)


def test_a_runtime_that_serves_no_groups_is_asked_for_each_device() -> None:
    world, model = world_of("class-incremental"), made("mlp")
    params, trials = model.initial(), trials_of(world)
    prepared = Int8Runtime().prepare(model, params)
    watched = Watched(prepared)
    found = evaluate_group(model, params, watched, trials)
    assert found == evaluate_group(model, params, prepared, trials)
    assert watched.asked == 6


@pytest.mark.parametrize(("name", "runs_whole"), [("tokens, tied", True), ("folded", False)])
def test_networks_that_mix_rows_go_one_by_one(
    monkeypatch: pytest.MonkeyPatch, name: str, runs_whole: bool
) -> None:
    world, model = world_of("class-incremental"), made(name)
    trials = trials_of(world)
    asked = []
    prepared = Int8Runtime().prepare(model, model.initial())
    original = type(prepared).calibrated_group
    monkeypatch.setattr(
        type(prepared),
        "calibrated_group",
        lambda *a, **k: asked.append(1) or original(*a, **k),
    )
    evaluate_group(model, model.initial(), prepared, trials)
    assert bool(asked) == runs_whole


@pytest.mark.parametrize("name", ["mlp", "folded"])
def test_devices_that_keep_ranges_are_evaluated_as_alone(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In a group by one pass over the probes and one over samples of those that drifted."""
    world, model = world_of("class-incremental"), made(name)
    params, runtime = model.initial(), Int8Runtime()
    prepared, none = runtime.prepare(model, params), Kept.none(Places.of(runtime, model, SHAPE))
    trials = [replace(trial, kept=none) for trial in trials_of(world)]
    passes: list[int] = []
    original = Int8Prepared.observed_group

    def watched(self: Int8Prepared, rows: Iterable[Rows], **options: int) -> Observed:
        found = list(rows)
        passes.append(sum(len(part.x) for part in found))
        return original(self, found, **options)

    monkeypatch.setattr(Int8Prepared, "observed_group", watched)
    expected = [
        evaluate(model, params, prepared, t.calibration.batch().x, t.tests, kept=t.kept)
        for t in trials
    ]
    first = evaluate_group(model, params, prepared, trials)
    assert first == expected == evaluate_group(model, params, prepared, trials_of(world))
    sizes = [len(trial.calibration) for trial in trials]
    probes = sum(min(size, 8) for size in sizes)
    assert [c.kept is not None for c in first] == [size > 0 for size in sizes]
    if name == "mlp":
        assert passes[:2] == [probes, sum(sizes)]
    for found, alone in zip(first, expected, strict=True):
        assert found.kept is None or torch.allclose(found.kept.table, alone.kept.table)
    passes.clear()
    again = [replace(t, kept=c.kept or t.kept) for t, c in zip(trials, first, strict=True)]
    second = evaluate_group(model, params, prepared, again)
    assert second == first
    assert [c.kept for c in second] == [None] * 6
    assert passes == ([probes] if name == "mlp" else [])


def test_a_runtime_that_knows_ranges_of_one_device_only_is_asked_for_each() -> None:
    world, model = world_of("class-incremental"), made("mlp")
    params, runtime = model.initial(), Int8Runtime()
    none = Kept.none(Places.of(runtime, model, SHAPE))
    trials = [replace(trial, kept=none) for trial in trials_of(world)]

    class Single(GroupPrepared, RangedPrepared):
        def __init__(self) -> None:
            self.prepared, self.asked = runtime.prepare(model, params), 0

        def calibrated(self, calibration: Tensor) -> Any:
            return self.prepared.calibrated(calibration)

        def calibrated_group(self, calibration: Any, *, num_devices: int) -> Any:
            return self.prepared.calibrated_group(calibration, num_devices=num_devices)

        def observed(self, x: Tensor) -> Observed:
            self.asked += 1
            return self.prepared.observed(x)

        def within(self, observed: Observed) -> Any:
            return self.prepared.within(observed)

    single = Single()
    found = evaluate_group(model, params, single, trials)
    assert found == evaluate_group(model, params, single.prepared, trials)
    assert single.asked == 2 * 4  # a probe and all samples of each device that has some
    assert [c.kept is None for c in found] == [len(t.calibration) == 0 for t in trials]


@pytest.mark.parametrize("which", [[], [5], [2, 5], [5, 5]])
def test_groups_with_next_to_nothing_in_them(which: list[int]) -> None:
    world, model = world_of("domain-incremental"), made("mlp")
    prepared = Int8Runtime().prepare(model, model.initial())
    trials = [trials_of(world)[i] for i in which]
    found = evaluate_group(model, model.initial(), prepared, trials)
    assert [c.count for c in found] == [(0, 0)] * len(which)
    assert {c.model_bytes for c in found} <= {
        prepared.calibrated(torch.empty(0, *world.sample_shape)).model_bytes
    }


def test_the_float_runtime_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world, model = world_of("class-incremental"), made("mlp")
    params, trials = model.initial(), trials_of(world)
    prepared = FloatRuntime().prepare(model, params)
    expected = evaluate_group(model, params, prepared, trials)
    calls = []
    original = FlatModel.__call__
    monkeypatch.setattr(FlatModel, "__call__", lambda *a: calls.append(1) or original(*a))
    assert evaluate_group(model, params, prepared, trials) == expected
    assert len(calls) == 1
    assert all(c.served == c.float_ for c in expected)
