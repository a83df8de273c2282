"""Devices that are not told of boundaries: they consolidate when they notice one."""

from __future__ import annotations

import pytest
import torch

import edgelearn
from edgelearn.device.learners import make_learner
from edgelearn.device.state import DETECTOR, FORMER
from edgelearn.errors import RunError, ScenarioError
from edgelearn.federated import egress
from edgelearn.fleet.plan import make_plan
from edgelearn.fleet.simulate import resume
from edgelearn.fleet.workbench import SimulatedData
from edgelearn.report.tables import summary_table
from edgelearn.scenario.world import build

STREAM = {"num_experiences": 3, "rounds_per_experience": 4, "boundaries": "detected"}
FLEET = {"num_devices": 4, "cohort": 4}


@pytest.fixture
def scenario(small):
    def make(**tables):
        merged = {
            "data": {"max_train": 600, "max_test": 120},
            "partition": {"kind": "iid"},
            "client": {"strategy": "replay", "args": {"capacity": 30}, "epochs": 5},
            **tables,
        }
        merged["stream"] = {**STREAM, **merged.get("stream", {})}
        merged["fleet"] = {**FLEET, **merged.get("fleet", {})}
        return small(**merged)

    return make


@pytest.mark.parametrize("detector", ["adwin", "page-hinkley"])
def test_sudden_changes_are_found_at_once(scenario, detector):
    record = edgelearn.simulate(scenario(stream={"detector": detector}))
    found = record.detections()
    assert (found.num_changes, found.num_found, found.num_false) == (8, 8, 0)
    assert found.delay <= 1
    assert found.num_visits == 48
    assert record.run["changes"] == [[1, 2]] * 4
    caption = str(summary_table(record).caption)
    assert "boundaries: 8 of 8 found" in caption
    assert "0 false alarms in 48 visits" in caption
    told = edgelearn.simulate(scenario(stream={"boundaries": "told"}))
    assert told.detections() is None
    assert "boundaries" not in str(summary_table(told).caption)
    assert all("alarms" not in line for line in told.rounds)
    # They consolidate a round later, on parameters that others have moved on; and yet remember.
    naive = edgelearn.simulate(scenario(client={"strategy": "naive", "args": {}, "epochs": 5}))
    scores = [run.scores().average_accuracy for run in (record, told, naive)]
    assert scores[0] > scores[2] + 0.2
    assert scores[1] > scores[2] + 0.2


def test_who_comes_when_others_have_learned_already_notices_it_too(scenario):
    record = edgelearn.simulate(
        scenario(fleet={"cohort": 2}, stream={"detector_args": {"threshold": 6.0}})
    )
    found = record.detections()
    # Two of four in a round: some come first when the global model knows the new classes.
    assert found.num_found >= 0.8 * found.num_changes > 0
    assert found.delay > found.delay_visits


def test_where_nothing_changes_nothing_is_found(scenario):
    record = edgelearn.simulate(scenario(stream={"kind": "new-instances"}))
    found = record.detections()
    assert (found.num_changes, found.num_found, found.num_false) == (0, 0, 0)
    assert record.run["changes"] == [[]] * 4


def test_domains_that_recur_change_each_time(scenario):
    stream = {"kind": "domain-incremental", "num_domains": 2, "num_experiences": 5}
    assert build(scenario(stream={**stream, "drift": "recurring"})).changes() == [[1, 2, 3, 4]] * 4
    assert build(scenario(stream=stream)).changes() == [[3]] * 4
    late = build(scenario(stream=stream, labels={"delay": 1}))
    assert late.changes() == [[4]] * 4


def test_the_buffer_takes_in_what_came_before_the_alarm(scenario):
    world = build(scenario())
    learner = make_learner(world)
    data, params = SimulatedData(world, 0), learner.model.initial()
    state = learner.initial_state(world.train)

    def life(state, params, position, rounds):
        alarms = []
        for k in range(rounds):
            fit = learner.fit(state, params, data, position=position, server_round=1 + k)
            params = params + learner.model.layout.flatten(fit.update.arrays)
            state = fit.state
            alarms.append(fit.update.metrics["num-alarms"])
        return state, params, alarms

    state, params, alarms = life(state, params, 0, 3)
    assert alarms == [0, 0, 0]
    state, params, alarms = life(state, params, 0, 3)
    assert (state.begun, state.consolidated) == (1, 0)
    assert int(state.memory["seen"].sum()) == 0
    state, params, alarms = life(state, params, 1, 1)
    assert alarms == [1]
    assert (state.begun, state.consolidated) == (2, 1)
    counts = torch.bincount(data.samples(0).labels, minlength=10)
    assert torch.equal(state.memory["seen"], counts)
    # Two positions without a change between them end as one.
    same = SimulatedData(world, 0)
    state, params, _ = life(state, params, 1, 4)
    assert state.consolidated == 1
    state, params, alarms = life(state, params, 2, 1)
    assert alarms == [1]
    counts += torch.bincount(same.samples(1).labels, minlength=10)
    assert torch.equal(state.memory["seen"], counts)


def test_what_was_not_noticed_is_consolidated_with_what_follows(scenario):
    # A threshold that no three rounds reach: all that came is one experience.
    deaf = {"detector": "page-hinkley", "detector_args": {"threshold": 1e6}}
    record = edgelearn.simulate(scenario(stream=deaf))
    found = record.detections()
    assert (found.num_changes, found.num_found) == (8, 0)
    naive = edgelearn.simulate(
        scenario(stream=deaf, client={"strategy": "naive", "args": {}, "epochs": 5})
    )
    assert record.scores() == naive.scores()  # nothing was ever taken into the buffer


def test_both_federations_and_more_workers_agree(scenario):
    small = scenario(stream={"num_experiences": 2, "rounds_per_experience": 2})
    faithful = edgelearn.simulate(small, federation="faithful")
    fused = edgelearn.simulate(small, federation="fused")
    pool = edgelearn.simulate(small, engine="pool", num_workers=2)
    assert faithful.run["engine"]["tier"] == "reference"
    alarms = [[line["alarms"] for line in r.rounds] for r in (faithful, fused, pool)]
    assert alarms[0] == alarms[1] == alarms[2]
    assert any(alarms[0])
    assert [line["accuracy"] for line in fused.rounds] == [line["accuracy"] for line in pool.rounds]


def test_a_resumed_run_notices_the_same(scenario, tmp_path):
    small = scenario()
    whole = edgelearn.simulate(small)

    def stop(progress):
        if progress.server_round == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        edgelearn.simulate(small, out=tmp_path / "part", checkpoint_every_s=0, on_round=stop)
    resumed = resume(tmp_path / "part")
    for key in ("alarms", "loss", "accuracy"):
        assert [line[key] for line in resumed.rounds] == [line[key] for line in whole.rounds]


@pytest.mark.parametrize("engine", ["native", "batched"])
def test_engines_that_know_no_detectors_refuse(scenario, engine):
    world = build(scenario())
    with pytest.raises(RunError, match=r"look for boundaries of experiences themselves|installed"):
        make_plan(world, make_learner(world), engine=engine)


def test_a_detector_costs_memory_and_is_declared(scenario):
    world = build(scenario())
    told = make_learner(build(scenario(stream={"boundaries": "told"})))
    learner = make_learner(world)
    layout = learner.model.layout
    assert set(learner.declaration) - set(told.declaration) == {DETECTOR, FORMER}
    more = 8 * learner.detector.size + 4 * layout.size
    assert learner.memory_bytes - told.memory_bytes == more
    assert "num-alarms" not in egress.fit_schema(layout).scalars
    assert egress.fit_schema(layout, detects=True).scalars["num-alarms"] is int


def test_wrong_arguments_are_faults(scenario):
    with pytest.raises(ScenarioError, match=r"stream.detector_args.*\n*.*threshold.*adwin takes"):
        edgelearn.simulate(
            scenario(stream={"detector": "adwin", "detector_args": {"threshold": 1.0}})
        )
