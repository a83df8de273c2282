"""Engines: the same bits from any number of processes, and failures that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.learners import make_learner
from edgelearn.errors import RunError
from edgelearn.fleet.jobs import Done, Engine, Job, Phase
from edgelearn.fleet.pool import PoolEngine
from edgelearn.fleet.reference import ReferenceEngine
from edgelearn.fleet.simulate import simulate
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_scenario

PLUGINS = Path(__file__).with_name("mortal.py")
NUM_DEVICES = 6
VICTIM = 2  # the device to which something happens


def world_of(strategy: str, **arguments: Any) -> World:
    return build(
        toy_scenario(
            fleet={"num_devices": NUM_DEVICES, "cohort": NUM_DEVICES},
            client={"strategy": strategy, "args": arguments, "epochs": 2},
        )
    )


def victims_sample() -> int:
    """Return a sample that the victim, and nobody else, has in its first experience."""
    return int(world_of("naive").train_samples(VICTIM, 0).ids[0])


def mortal(kind: str, *, victim: int | None = None) -> World:
    sample = victims_sample() if victim is None else victim
    return world_of(f"{PLUGINS}:{kind}", victim=sample)


@dataclass
class Bench:
    """An engine with its store, asked as a round loop would ask it."""

    world: World
    store: FleetStore
    engine: Engine
    serial: int = 0

    @classmethod
    def reference(cls, world: World, folder: Path) -> Bench:
        store = cls._store(world, folder / "reference.bin")
        return cls(world, store, ReferenceEngine(world, store.path))

    @classmethod
    def pool(
        cls, world: World, folder: Path, *, workers: int, capacity: int = NUM_DEVICES
    ) -> Bench:
        store = cls._store(world, folder / f"pool-{workers}-{capacity}.bin")
        size = make_learner(world).model.layout.size
        engine = PoolEngine(
            world, store.path, num_workers=workers, cohort=capacity, num_params=size
        )
        return cls(world, store, engine)

    @staticmethod
    def _store(world: World, path: Path) -> FleetStore:
        declaration = make_learner(world).declaration
        return FleetStore(path, declaration, world.scenario.fleet.num_devices)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.close()

    def ask(
        self, phase: Phase, params: Tensor, *, position: int, devices: Sequence[int] | None = None
    ) -> tuple[list[Done], Tensor]:
        self.serial += 1
        chosen = range(NUM_DEVICES) if devices is None else devices
        jobs = []
        for row, device in enumerate(chosen):
            read_slot, write_slot = self.store.slots(device)
            begun, consolidated = self.store.progress[device].tolist()
            jobs.append(
                Job(
                    row=row,
                    device=device,
                    phase=phase,
                    server_round=position + 1,
                    position=position,
                    begun=begun,
                    consolidated=consolidated,
                    read_slot=read_slot,
                    write_slot=write_slot,
                    cost=10 * (device % 3),
                    serial=self.serial,
                )
            )
        updates = torch.zeros(len(jobs), len(params) if phase is Phase.FIT else 0)
        results = self.engine.run(jobs, params, updates)
        for job, done in zip(jobs, results, strict=True):
            if done.checksum is not None:
                self.store.written(job.device, done.checksum)
            if done.progress is not None:
                self.store.progress[job.device] = done.progress
        self.store.commit()
        return results, updates

    def live(self) -> list[tuple[list[Done], Tensor]]:
        """Let the whole fleet live through both experiences, and evaluate."""
        params = self.world.model().initial()
        answers = []
        for position in (0, 1):
            fits = self.ask(Phase.FIT, params, position=position)
            params = params + torch.nan_to_num(fits[1]).mean(0)
            answers += [
                fits,
                self.ask(Phase.CONSOLIDATE, params, position=position),
                self.ask(Phase.EVALUATE, params, position=position),
            ]
        return answers


def assert_same(one: list[tuple[list[Done], Tensor]], other: list[Any]) -> None:
    for (results, updates), (other_results, other_updates) in zip(one, other, strict=True):
        assert results == other_results
        assert torch.equal(updates, other_updates)


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "counts"), [("replay", (1, 2, 3)), ("ewc", (2,))])
def test_all_engines_give_the_same_bits(
    tmp_path: Path, strategy: str, counts: tuple[int, ...]
) -> None:
    world = world_of(strategy)
    with Bench.reference(world, tmp_path) as bench:
        expected = bench.live()
        state = bench.store.path.read_bytes()
        assert (bench.engine.name, bench.engine.num_workers) == ("reference", 1)
    assert all(done.error is None for results, _ in expected for done in results)
    assert all(updates.abs().sum() > 0 for updates in (expected[0][1], expected[3][1]))
    correct = expected[-1][0][0].metrics
    assert sum(correct["float"]) > 0
    for count in counts:
        with Bench.pool(world, tmp_path, workers=count) as bench:
            assert_same(bench.live(), expected)
            assert bench.store.path.read_bytes() == state
            assert (bench.engine.name, bench.engine.num_workers) == ("pool", count)


def test_more_jobs_than_the_shared_memory_holds_are_done_in_waves(tmp_path: Path) -> None:
    world = world_of("replay")
    with Bench.reference(world, tmp_path) as bench:
        expected = bench.live()
    with Bench.pool(world, tmp_path, workers=2, capacity=4) as bench:
        assert_same(bench.live(), expected)


def test_the_order_of_a_cohort_decides_rows_and_nothing_else(tmp_path: Path) -> None:
    world = world_of("naive")
    params, backwards = world.model().initial(), [5, 3, 1]
    with Bench.reference(world, tmp_path) as bench:
        _, all_rows = bench.ask(Phase.FIT, params, position=0)
        results, rows = bench.ask(Phase.FIT, params, position=0, devices=backwards)
    assert [done.row for done in results] == [0, 1, 2]
    assert torch.equal(rows, all_rows[backwards])


def test_the_reference_engine_leaves_the_number_of_threads_alone(tmp_path: Path) -> None:
    world, threads = world_of("naive"), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Bench.reference(world, tmp_path) as bench:
            bench.ask(Phase.FIT, world.model().initial(), position=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# -- failures stay where they are ------------------------------------------------------------------


def assert_only_the_victim_differs(
    found: tuple[list[Done], Tensor], expected: tuple[list[Done], Tensor], error: str
) -> None:
    for row in range(NUM_DEVICES):
        if row == VICTIM:
            assert error in (found[0][row].error or "")
            assert found[0][row].checksum is None
            assert found[0][row].progress is None
            assert found[0][row].metrics == {}
            if found[1].numel():
                assert not found[1][row].any()
        else:
            assert found[0][row] == expected[0][row]
            if found[1].numel():
                assert torch.equal(found[1][row], expected[1][row])


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("Killed", "its worker process died (exit code -9)"),
        ("Exits", "its worker process died (exit code 7)"),
        ("Raises", "ValueError at "),
    ],
)
def test_a_worker_that_dies_takes_its_own_device_along_and_no_other(
    tmp_path: Path, kind: str, error: str
) -> None:
    params = world_of("naive").model().initial()
    with Bench.reference(mortal(kind, victim=-1), tmp_path) as bench:
        expected = bench.ask(Phase.FIT, params, position=0)
        consolidated = bench.ask(Phase.CONSOLIDATE, params, position=0)
        evaluated = bench.ask(Phase.EVALUATE, params, position=0)
        again = bench.ask(Phase.FIT, params, position=1)
    with Bench.pool(mortal(kind), tmp_path, workers=2) as bench:
        assert isinstance(bench.engine, PoolEngine)
        before = bench.engine.process_ids
        found = bench.ask(Phase.FIT, params, position=0)
        assert_only_the_victim_differs(found, expected, error)
        assert bench.store.slots(VICTIM)[0] == 255  # its state was not written
        # The run goes on, with as many workers as before; the device can take part again.
        after = bench.engine.process_ids
        assert len(after) == bench.engine.num_workers == 2
        assert (set(after) == set(before)) == (kind == "Raises")
        assert bench.ask(Phase.CONSOLIDATE, params, position=0)[0] == consolidated[0]
        assert bench.ask(Phase.EVALUATE, params, position=0)[0] == evaluated[0]
        second = bench.ask(Phase.FIT, params, position=1)
        assert second[0] == again[0]
        assert torch.equal(second[1], again[1])


def test_the_only_worker_can_die_too(tmp_path: Path) -> None:
    params = world_of("naive").model().initial()
    with Bench.pool(mortal("Killed"), tmp_path, workers=1) as bench:
        found, _ = bench.ask(Phase.FIT, params, position=0, devices=[VICTIM, 4, 5])
    assert [done.error is None for done in found] == [False, True, True]


@pytest.mark.parametrize("engine", ["reference", "pool"])
def test_nan_in_one_device_stays_there(tmp_path: Path, engine: str) -> None:
    def bench(world: World) -> Bench:
        if engine == "reference":
            return Bench.reference(world, tmp_path)
        return Bench.pool(world, tmp_path, workers=2)

    with Bench.reference(mortal("FallsIll", victim=-1), tmp_path) as healthy:
        expected = healthy.live()
    params = world_of("naive").model().initial()
    with bench(mortal("FallsIll")) as ill:
        first = ill.ask(Phase.FIT, params, position=0)
        assert_same([first], [expected[0]])
        params = params + first[1].mean(0)
        ill.ask(Phase.CONSOLIDATE, params, position=0)
        ill.ask(Phase.EVALUATE, params, position=0)
        second = ill.ask(Phase.FIT, params, position=1)
    error = f"DivergenceError: training diverged on device {VICTIM} in round 2"
    assert_only_the_victim_differs(second, expected[3], error)
    assert bool(torch.isfinite(second[1]).all())


def test_an_update_of_nan_is_in_its_own_row_and_the_server_rejects_it(tmp_path: Path) -> None:
    world = mortal("SendsNaN")
    with Bench.reference(world, tmp_path) as bench:
        _, updates = bench.ask(Phase.FIT, world.model().initial(), position=0)
    assert torch.isnan(updates[VICTIM]).all()
    others = [row for row in range(NUM_DEVICES) if row != VICTIM]
    assert torch.isfinite(updates[others]).all()
    record = simulate(world.scenario)
    assert [line["outcomes"]["rejected"] for line in record.rounds] == [1, 1, 0, 0]
    (problem,) = record.rounds[0]["problems"]
    assert (problem["device"], problem["outcome"]) == (VICTIM, "rejected")
    assert "the update is not finite" in problem["reason"]


def test_a_run_goes_on_when_workers_are_killed(tmp_path: Path) -> None:
    world = mortal("Killed")
    record = simulate(world.scenario, engine="pool", num_workers=2)
    assert record.is_complete
    for line in record.rounds:
        hit = line["position"] == 0
        assert line["outcomes"]["failed"] == (1 if hit else 0)
        assert line["outcomes"]["ok"] == NUM_DEVICES - (1 if hit else 0)
        if hit:
            (problem,) = line["problems"]
            assert problem["device"] == VICTIM
            assert "exit code -9" in problem["reason"]
    # The same device failing in another way, in this process, gives the same model.
    other = simulate(mortal("Raises").scenario, engine="reference")
    assert [line["accuracy"] for line in record.rounds] == [
        line["accuracy"] for line in other.rounds
    ]
    assert [line["loss"] for line in record.rounds] == [line["loss"] for line in other.rounds]


def test_a_death_takes_no_other_device_along_however_many_jobs_were_handed_out_at_once() -> None:
    fleet = {"num_devices": 24, "cohort": 24}
    client = {"strategy": f"{PLUGINS}:Killed", "lr": 0.1}
    world = build(toy_scenario(fleet=fleet))
    victim = int(world.train_samples(VICTIM, 0).ids[0])
    scenario = toy_scenario(fleet=fleet, client={**client, "args": {"victim": victim}})
    records = [simulate(scenario, engine="pool", num_workers=n) for n in (1, 3)]
    for record in records:
        assert [p["device"] for line in record.rounds for p in line["problems"]] == [VICTIM] * 2
    first, second = ([line["loss"] for line in record.rounds] for record in records)
    assert first == second


def deadly(*, kills: bool, victim: int = VICTIM) -> World:
    """A world in which calibrating one device kills the process, or raises."""
    world = world_of("naive")
    mine = world.train_samples(victim, 0).batch().x[:1] if victim >= 0 else torch.zeros(1, 1)
    pixels = float(mine.double().sum()) if victim >= 0 else -1.0
    runtime = {"name": f"{PLUGINS}:DeadlyRuntime", "args": {"pixels": pixels, "kills": kills}}
    fleet = {"num_devices": NUM_DEVICES, "cohort": NUM_DEVICES}
    return build(toy_scenario(fleet=fleet, runtime=runtime, client={"strategy": "naive"}))


@pytest.mark.parametrize("kills", [True, False])
def test_a_device_that_fails_in_a_group_fails_alone(tmp_path: Path, kills: bool) -> None:
    params = world_of("naive").model().initial()
    with Bench.reference(deadly(kills=kills, victim=-1), tmp_path) as bench:
        expected = bench.ask(Phase.EVALUATE, params, position=0)
    error = "its worker process died (exit code -9)" if kills else "ValueError at mortal.py"
    for workers in (1, 2):
        with Bench.pool(deadly(kills=kills), tmp_path, workers=workers) as bench:
            found = bench.ask(Phase.EVALUATE, params, position=0)
            assert_only_the_victim_differs(found, expected, error)
            assert [done.died for done in found[0]].count(True) == int(kills)
            # The run goes on.
            again = bench.ask(Phase.EVALUATE, params, position=0)
            assert_only_the_victim_differs(again, expected, error)
    if not kills:
        with Bench.reference(deadly(kills=False), tmp_path) as bench:
            found = bench.ask(Phase.EVALUATE, params, position=0)
            assert_only_the_victim_differs(found, expected, error)


@pytest.mark.parametrize("engine", ["reference", "pool"])
def test_a_device_whose_memory_is_damaged_fails_alone_in_its_group(
    tmp_path: Path, engine: str
) -> None:
    world = world_of("replay")
    params = world.model().initial()
    make = {
        "reference": lambda: Bench.reference(world, tmp_path),
        "pool": lambda: Bench.pool(world, tmp_path, workers=2),
    }[engine]
    with make() as bench:
        bench.ask(Phase.CONSOLIDATE, params, position=0)
        expected = bench.ask(Phase.EVALUATE, params, position=1)
        slots = bench.store.slots

        def damaged(device: int) -> tuple[int, int]:
            read_slot, write_slot = slots(device)
            beyond_the_file = 2 * NUM_DEVICES
            return (beyond_the_file, write_slot) if device == VICTIM else (read_slot, write_slot)

        bench.store.slots = damaged  # type: ignore[method-assign]
        found = bench.ask(Phase.EVALUATE, params, position=1)
    assert expected[0][VICTIM].error is None
    assert_only_the_victim_differs(found, expected, "ValueError at ")


def test_who_evaluates_a_group_has_no_effect(tmp_path: Path) -> None:
    fleet = {"num_devices": 20, "cohort": 20}
    world = build(toy_scenario(fleet=fleet, client={"strategy": "naive"}))
    params, devices = world.model().initial(), [*range(20), *reversed(range(20))]
    with Bench.reference(world, tmp_path) as bench:
        expected = bench.ask(Phase.EVALUATE, params, position=0, devices=devices)
        alone = [
            bench.ask(Phase.EVALUATE, params, position=0, devices=[device])[0][0].metrics
            for device in devices
        ]
    assert [done.metrics for done in expected[0]] == alone
    for workers in (1, 2, 3):
        with Bench.pool(world, tmp_path, workers=workers) as bench:
            found = bench.ask(Phase.EVALUATE, params, position=0, devices=devices)
            assert_same([found], [expected])


def test_workers_that_cannot_start_say_why(tmp_path: Path) -> None:
    world = replace(
        world_of("naive"),
        scenario=toy_scenario(client={"strategy": f"{PLUGINS}:CannotBeBuilt"}),
    )
    path = Bench._store(world_of("naive"), tmp_path / "devices.bin").path
    with pytest.raises(RunError, match=r"could not start: RuntimeError: no strategy today"):
        PoolEngine(world, path, num_workers=1, cohort=2, num_params=172)


def test_closing_ends_all_workers(tmp_path: Path) -> None:
    bench = Bench.pool(world_of("naive"), tmp_path, workers=2)
    assert isinstance(bench.engine, PoolEngine)
    processes = [worker.process for worker in bench.engine._workers]
    bench.engine.close()
    assert all(not process.is_alive() for process in processes)
    assert bench.engine.num_workers == 0
