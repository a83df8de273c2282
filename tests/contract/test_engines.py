"""The contract of engines: every tier trains a device as the reference tier does.

Updates within 1e-4 of the reference (relative, Euclidean norm), the same counts, and failures that
stay with their device and are reported in the same words.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgelearn.continual.memory import Memory
from edgelearn.device.fleet_store import UNWRITTEN, FleetStore, RecordFile, RecordLayout
from edgelearn.device.learners import make_learner
from edgelearn.device.vmapped import train_vmapped
from edgelearn.errors import RunError
from edgelearn.fleet import batched, native, ray, together
from edgelearn.fleet.batched import BatchedEngine
from edgelearn.fleet.jobs import CohortDone, CohortFit, Engine, Job, Phase
from edgelearn.fleet.native import NativeEngine
from edgelearn.fleet.plan import make_plan
from edgelearn.fleet.pool import PoolEngine
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_scenario

NUM_DEVICES = 7
EMPTY_DEVICE, SINGLE_DEVICE, SICK_DEVICE = 4, 5, 2
HAS_KERNELS = importlib.util.find_spec("edgelearn_native") is not None
HERE = f"{Path(__file__)}"
HOOKS = f"{Path(__file__).with_name('hooks.py')}"

Open = Callable[[World, Path], Engine]
TIERS: dict[str, Open] = {
    "pool-2": lambda world, path: PoolEngine(
        world,
        path,
        num_workers=2,
        cohort=NUM_DEVICES,
        num_params=make_learner(world).model.layout.size,
    ),
    "batched": BatchedEngine,
    "native-1": lambda world, path: NativeEngine(world, path, num_threads=1),
    "native-2": lambda world, path: NativeEngine(world, path, num_threads=2),
    "native-3": lambda world, path: NativeEngine(world, path, num_threads=3),
    "native-8": lambda world, path: NativeEngine(world, path, num_threads=8),
}
COVERS = {"batched": batched.why_not, "native": native.why_not}


# -- what is trained -------------------------------------------------------------------------------


def uneven(_spec: Any = None, *, is_sick: bool = False) -> Dataset:
    """6x6 images of four classes; users own unequal shares, some nothing at times."""
    generator = np.random.default_rng(0)
    counts = [23, 8, 12, 31, 2, 1, 17]
    users = np.repeat(np.arange(NUM_DEVICES), counts)
    y = np.concatenate([np.arange(count) % 4 for count in counts]).astype(np.int64)
    y[users == EMPTY_DEVICE] = 2  # nothing in the first experience
    x = generator.normal(size=(len(y), 1, 6, 6)).astype(np.float32)
    x[:, 0, 0, :4] += 3 * np.eye(4, dtype=np.float32)[y]
    if is_sick:
        x[users == SICK_DEVICE] = np.inf
    keep = np.repeat(np.arange(NUM_DEVICES), 4)
    return Dataset(
        name="uneven",
        scale=1.0,
        x_train=x,
        y_train=y,
        x_test=generator.normal(size=(28, 1, 6, 6)).astype(np.float32),
        y_test=(np.arange(28) % 4).astype(np.int64),
        num_classes=4,
        users_train=users,
        users_test=keep,
    )


def even(_spec: Any) -> Dataset:
    """Users own equally many images, but for one that owns more."""
    found, counts = uneven(), [18] + [12] * (NUM_DEVICES - 1)
    y = np.concatenate([np.arange(count) % 4 for count in counts])
    users = np.repeat(np.arange(NUM_DEVICES), counts)
    return dataclasses.replace(found, x_train=found.x_train[: len(y)], y_train=y, users_train=users)


def sick(_spec: Any) -> Dataset:
    """One device's samples are infinite."""
    return uneven(is_sick=True)


class Curved(nn.Module):
    """No plain stack."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x.flatten(1))))
        return out


def curved(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build it."""
    return Curved()


def noisy(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a network that draws from torch's generator."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.Dropout(), nn.Linear(9, 4))


def normed(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a network with statistics that forward passes write."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))


def deep(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a deep stack, partly without biases."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 11, bias=False),
        nn.ReLU(),
        nn.Linear(11, 7),
        nn.Linear(7, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "mlp", "args": {"hidden": []}},
    "mlp": {"name": "mlp", "args": {"hidden": [10]}},
    "deep": {"name": f"{HERE}:deep"},
    "cnn": {"name": "cnn", "args": {"channels": [3, 5], "hidden": 8, "kernel_size": 3}},
    "tanh": {"name": f"{HERE}:curved"},
    "dropout": {"name": f"{HERE}:noisy"},
    "batch-norm": {"name": f"{HERE}:normed"},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "naive": {"strategy": "naive"},
    "replay": {"strategy": "replay", "args": {"capacity": 9}},
    "replay-share": {
        "strategy": "replay",
        "args": {"capacity": 6, "share": 0.3, "replay_batch": 4, "policy": "reservoir"},
    },
    "ewc": {"strategy": "ewc", "args": {"strength": 30.0}},
    "ewc-separate": {"strategy": "ewc", "args": {"strength": 5.0, "mode": "separate"}},
    "ewc-explicit": {"strategy": "ewc", "args": {"strength": 1.0, "step": "explicit"}},
    "si": {"strategy": "si", "args": {"c": 30.0, "xi": 0.01}},
    "si-explicit": {"strategy": "si", "args": {"c": 0.5, "xi": 0.01, "step": "explicit"}},
    **{kind: {"strategy": f"{HOOKS}:{kind}"} for kind in ("Functional", "Noisy", "Looks", "Fails")},
}
BUILT_IN = [name for name in STRATEGIES if name[0].islower()]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "epochs": {"epochs": 3, "batch_size": 4},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "decay": {"weight_decay": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.01},
}


def world_of(
    model: str = "mlp", strategy: str = "naive", option: str = "plain", data: str = "uneven"
) -> World:
    client = {"epochs": 1, "batch_size": 5, "lr": 0.05}
    raw: dict[str, Any] = {
        "name": "contract",
        "seed": 3,
        "data": {"dataset": f"{HERE}:{data}"},
        "model": MODELS[model],
        "fleet": {"num_devices": NUM_DEVICES, "cohort": NUM_DEVICES},
        "partition": {"kind": "user"},
        "stream": {"kind": "class-incremental", "num_experiences": 2, "rounds_per_experience": 2},
        "client": {**client, **STRATEGIES[strategy], **OPTIONS[option]},
        "server": {"strategy": "FedAvg"},
        "runtime": {"name": "int8"},
    }
    return build(from_dict(raw))


# -- how it is asked -------------------------------------------------------------------------------


class Fleet:
    """A store and an engine over it, led through two experiences."""

    def __init__(self, world: World, folder: Path, open_engine: Open) -> None:
        self.world = world
        declaration = make_learner(world).declaration
        self.store = FleetStore(folder / "devices.bin", declaration, NUM_DEVICES)
        self.engine = open_engine(world, self.store.path)

    def fit(self, params: Tensor, position: int, *, mu: float = 0.0) -> tuple[CohortDone, Tensor]:
        devices = np.array([3, 0, 4, 5, 1, 6, 2])  # the order of a cohort is not that of devices
        begun, consolidated = self.store.progress[devices].T.astype(np.int64)
        read, write = self.store.slots_of(devices)
        cohort = CohortFit(
            devices, position * 2 + 1, position, begun, consolidated, read, write, position, mu
        )
        updates = torch.full((NUM_DEVICES, len(params)), 7.0)
        done = self.engine.fit(cohort, params, updates)
        for row, device in enumerate(devices.tolist()):
            if row not in done.errors:
                self.store.progress[device] = done.progress[row]
            if row in done.checksums:
                self.store.written(device, done.checksums[row])
        self.store.commit()
        return done, updates

    @staticmethod
    def memories(world: World, folder: Path) -> list[Memory]:
        """Return what both generations of each device's state hold."""
        layout = RecordLayout.of(make_learner(world).declaration)
        file = RecordFile(folder / "devices.bin", layout, NUM_DEVICES)
        return [file.read(d, slot, None) for d in range(NUM_DEVICES) for slot in (0, 1)]

    def consolidate(self, params: Tensor, *, but: int | None = None) -> None:
        """Consolidate the first experience; `but` was away, and has to catch up."""
        jobs = []
        for row, device in enumerate(d for d in range(NUM_DEVICES) if d != but):
            read, write = self.store.slots(device)
            begun, consolidated = self.store.progress[device].tolist()
            jobs.append(
                Job(row, device, Phase.CONSOLIDATE, 2, 0, begun, consolidated, read, write, 1, 9)
            )
        for job, done in zip(jobs, self.engine.run(jobs, params, torch.empty(7, 0)), strict=True):
            assert done.error is None
            self.store.progress[job.device] = done.progress
            if done.checksum is not None:
                self.store.written(job.device, done.checksum)
        self.store.commit()


def life(world: World, folder: Path, open_engine: Open, *, mu: float = 0.0) -> Iterator[Any]:
    """Train, consolidate without one device, train again on the next experience."""
    folder.mkdir()
    fleet = Fleet(world, folder, open_engine)
    with closing(fleet.engine):
        params = fleet.world.model().initial()
        yield fleet.fit(params, 0, mu=mu)
        shifted = params + 0.01 * torch.randn(
            len(params), generator=torch.Generator().manual_seed(1)
        )
        fleet.consolidate(shifted, but=6)
        yield fleet.fit(shifted, 1, mu=mu)


def assert_alike(found: tuple[CohortDone, Tensor], expected: tuple[CohortDone, Tensor]) -> None:
    done, updates = found
    other, other_updates = expected
    for name in ("num_examples", "num_steps", "num_samples", "progress"):
        assert np.array_equal(getattr(done, name), getattr(other, name)), name
    assert (done.errors, done.died) == (other.errors, other.died)
    assert np.allclose(done.loss, other.loss, rtol=1e-4)
    assert np.allclose(done.norms, other.norms, rtol=1e-4)
    for row in range(NUM_DEVICES):
        error = (updates[row] - other_updates[row]).norm()
        assert error <= 1e-4 * other_updates[row].norm(), (row, float(error))
        assert (other_updates[row].norm() > 0) == (
            other.num_steps[row] > 0 and row not in done.errors
        )


def covered(tier: str, world: World) -> None:
    name = tier.partition("-")[0]
    if name == "native" and not HAS_KERNELS:
        pytest.skip("edgelearn-native is not installed")
    reason = COVERS[name](world, make_learner(world)) if name in COVERS else None
    if reason is not None:
        pytest.skip(reason)


CASES = [
    *(("mlp", strategy, option) for strategy in BUILT_IN for option in OPTIONS),
    *((model, strategy, "momentum") for model in ("cnn", "deep") for strategy in BUILT_IN),
    *((model, strategy, "plain") for model in MODELS for strategy in ("naive", "replay", "ewc")),
]


@pytest.mark.parametrize("tier", ["batched", "native-2"])
@pytest.mark.parametrize(("model", "strategy", "option"), dict.fromkeys(CASES))
def test_a_tier_equals_the_reference(
    tmp_path: Path, tier: str, model: str, strategy: str, option: str
) -> None:
    world = world_of(model, strategy, option)
    covered(tier, world)
    mu = 0.3 if option in ("decay", "momentum") else 0.0
    expected = life(world, tmp_path / "reference", ReferenceEngine, mu=mu)
    found = life(world, tmp_path / tier, TIERS[tier], mu=mu)
    for one, other in zip(found, expected, strict=True):
        assert_alike(one, other)
    memories = [Fleet.memories(world, tmp_path / name) for name in (tier, "reference")]
    for one, other in zip(*memories, strict=True):
        for name in one:
            if strategy.startswith("si"):  # what each engine added up along its own steps
                error = (one[name] - other[name]).norm()
                assert error <= 1e-4 * other[name].norm(), name
            else:
                assert torch.equal(one[name], other[name]), name


STACKED_BY_AUTOGRAD = [
    *(("tanh", strategy, "momentum") for strategy in STRATEGIES),
    *(("tanh", "naive", option) for option in OPTIONS),
    *(("mlp", strategy, "adam") for strategy in STRATEGIES),
]


@pytest.mark.parametrize(("model", "strategy", "option"), dict.fromkeys(STACKED_BY_AUTOGRAD))
def test_stacks_by_autograd_equal_the_reference(
    tmp_path: Path, model: str, strategy: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(model, strategy, option, "even")
    mu = 0.3 if option in ("decay", "momentum") else 0.0
    expected = [*life(world, tmp_path / "reference", ReferenceEngine, mu=mu)]
    stacks = []

    def counted(*arguments: Any, **named: Any) -> Any:
        found = train_vmapped(*arguments, **named)
        stacks.append(len(found[0].loss))
        return found

    monkeypatch.setattr(batched, "train_vmapped", counted)
    reason = batched.why_not(world, make_learner(world), tries_hooks=True)
    assert (reason is None) == (strategy not in ("Looks", "Fails"))
    stacks.clear()
    found = [*life(world, tmp_path / "batched", BatchedEngine, mu=mu)]
    for one, other in zip(found, expected, strict=True):
        assert_alike(one, other)
    # One device has no like, and in the second experience another has to catch up.
    assert stacks == ([] if reason else [6, 5])
    memories = [Fleet.memories(world, tmp_path / tier) for tier in ("batched", "reference")]
    for one, other in zip(*memories, strict=True):
        for name in one:
            assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("strategy", ["replay", "ewc"])
def test_written_out_training_equals_autograd(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("deep", strategy, "momentum")
    found = [*life(world, tmp_path / "written", ReferenceEngine, mu=0.2)]
    for module in ("edgelearn.device.training", "edgelearn.continual.fisher"):
        monkeypatch.setattr(f"{module}.stack_of", lambda _model, _shape: None)
    for one, other in zip(
        found, life(world, tmp_path / "auto", ReferenceEngine, mu=0.2), strict=True
    ):
        assert_alike(one, other)


@pytest.mark.parametrize("strategy", ["naive", "replay", "ewc"])
def test_any_number_of_threads_gives_the_same_bits(tmp_path: Path, strategy: str) -> None:
    world = world_of("cnn", strategy)
    covered("native-1", world)
    runs = [
        [*life(world, tmp_path / tier, TIERS[tier])]
        for tier in ("native-1", "native-2", "native-3", "native-8")
    ]
    for run in runs[1:]:
        for (_, updates), (_, others) in zip(run, runs[0], strict=True):
            assert torch.equal(updates, others)


@pytest.mark.parametrize("tier", ["pool-2", "batched", "native-2"])
def test_what_is_not_finite_stays_with_its_device(tmp_path: Path, tier: str) -> None:
    world, well = world_of("mlp", data="sick"), world_of("mlp")
    covered(tier, world)
    done, updates = next(life(world, tmp_path / "sick", TIERS[tier]))
    healthy, expected = next(life(well, tmp_path / "well", TIERS[tier]))
    reference, _ = next(life(world, tmp_path / "reference", ReferenceEngine))
    row = 6  # of the sick device
    assert done.errors == reference.errors == {row: done.errors[row]}
    assert done.errors[row] == "DivergenceError: training diverged on device 2 in round 1: loss nan"
    assert healthy.errors == {}
    others = [r for r in range(NUM_DEVICES) if r != row]
    assert torch.equal(updates[others], expected[others])
    assert not updates[row].any()
    assert (done.num_examples[row], done.loss[row], done.norms[row]) == (0, 0, 0)
    assert done.progress[row].tolist() == [0, 0]


def test_a_tier_that_does_not_cover_a_scenario_says_why() -> None:
    def reasons(model: str, strategy: str = "naive", option: str = "plain") -> list[str | None]:
        world = world_of(model, strategy, option)
        learner = make_learner(world)
        return [batched.why_not(world, learner), native.why_not(world, learner)]

    assert reasons("cnn")[0] == "the network has convolutions, which are slower in a stack"
    stacked, compiled = reasons("tanh")
    layers = "Linear, Conv2d, ReLU, MaxPool2d nor Flatten"
    assert stacked == f"the network is no plain stack: Curved is neither {layers}"
    assert reasons("mlp")[0] is None
    if HAS_KERNELS:
        assert compiled == stacked
        assert reasons("mlp")[1] is None
        assert reasons("mlp", "ewc-explicit")[1] == "EWC takes its penalty as a gradient"
        assert reasons("mlp", option="adam") == ["the optimizer is adam"] * 2
    else:
        assert compiled == native.MISSING


@pytest.mark.skipif(not HAS_KERNELS, reason="edgelearn-native is not installed")
def test_kernels_that_keep_no_path_integral_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgelearn_native

    world = world_of("mlp", "si")
    monkeypatch.setattr(edgelearn_native, "__version__", "0.1.0")
    reason = native.why_not(world, make_learner(world))
    assert reason == "edgelearn-native is too old to keep a path integral; from 0.1.1 on it does"
    monkeypatch.setattr(edgelearn_native, "__version__", "0.2.0rc1")
    assert native.why_not(world, make_learner(world)) is None
    explicit = world_of("mlp", "si-explicit")
    assert native.why_not(explicit, make_learner(explicit)) == "SI takes its penalty as a gradient"


def test_a_number_of_steps_is_left_to_the_tiers_that_count_them() -> None:
    world = world_of("mlp")
    learner = make_learner(world)
    spec = dataclasses.replace(learner.spec, steps=7)
    learner = dataclasses.replace(learner, spec=spec)
    assert together.not_declared(learner) == "a round has 7 steps instead of whole epochs"
    assert batched.why_not(world, learner) == together.not_declared(learner)
    if HAS_KERNELS:
        assert native.why_not(world, learner) == together.not_declared(learner)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": "last:1"}, "devices train only a part of the network"),
        ({"accumulate": 2}, "a batch passes in 2 parts"),
        ({"checkpoint": True}, "activations are computed again in the backward pass"),
    ],
)
def test_less_memory_is_left_to_the_tiers_that_take_steps_device_by_device(
    changes: dict[str, Any], reason: str
) -> None:
    world = world_of("mlp")
    client = dataclasses.replace(world.scenario.client, **changes)
    world = dataclasses.replace(world, scenario=dataclasses.replace(world.scenario, client=client))
    learner = make_learner(world)
    assert batched.why_not(world, learner, tries_hooks=True) == reason
    assert native.why_not(world, learner) == (reason if HAS_KERNELS else native.MISSING)
    assert make_plan(world, learner).tier in ("reference", "pool")
    with pytest.raises(RunError, match=reason):
        make_plan(world, learner, engine="batched")


@pytest.mark.parametrize(
    ("model", "strategy", "reason"),
    [
        ("tanh", "naive", None),
        ("cnn", "Functional", "the network has convolutions, which are slower in a stack"),
        ("batch-norm", "naive", "some of the network's tensors are not trained by gradient"),
        ("dropout", "naive", "devices can't be stacked: RuntimeError: vmap"),
        ("mlp", "Looks", "devices can't be stacked: RuntimeError: vmap"),
        ("mlp", "Fails", "devices can't be stacked: ValueError: no batch today"),
    ],
)
def test_hooks_are_tried_out_where_they_may_run(
    model: str, strategy: str, reason: str | None
) -> None:
    world = world_of(model, strategy)
    learner = make_learner(world)
    found = batched.why_not(world, learner, tries_hooks=True)
    assert found == reason or (found or "").startswith(reason or "-")
    plan = make_plan(world, learner)
    if model != "cnn":
        assert plan.tier == ("batched" if reason is None else "reference")
    # In other processes they may do what they like.
    for engine, inner in (("pool", ""), ("ray", "reference")):
        if engine == "pool" or ray.is_installed():
            assert make_plan(world, learner, engine=engine).inner == inner


PUBLIC = """
import torch
from edgelearn.continual.memory import SampleSpec
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.scenario.samples import Batch

class Rehearse(ClientStrategy):
    def declare(self, model, facts):
        return {"public": SampleSpec(facts.num_public, is_public=True)}

    def extend(self, batch, memory, generator):
        more = memory.store.batch(memory["public"])
        return Batch(torch.cat([batch.x, more.x]), torch.cat([batch.y, more.y]), None, None)
"""


def test_public_samples_are_left_to_the_tiers_that_give_them_to_a_device(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PUBLIC)
    scenario = toy_scenario(
        data={"public": 8},
        fleet={"num_devices": 12, "cohort": 12},
        client={"strategy": f"{tmp_path / 'own.py'}:Rehearse"},
    )
    world = build(scenario)
    learner, reason = make_learner(world), "Rehearse begins with the public samples in memory"
    assert batched.why_not(world, learner, tries_hooks=True) == reason
    assert native.why_not(world, learner) == (reason if HAS_KERNELS else native.MISSING)
    found, expected = simulate(scenario), simulate(scenario, engine="reference")
    assert found.rounds[-1]["loss"] == expected.rounds[-1]["loss"]


def test_new_devices_have_nothing_to_read(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "devices.bin", make_learner(world_of()).declaration, NUM_DEVICES)
    assert (store.slots_of(np.arange(NUM_DEVICES))[0] == UNWRITTEN).all()
