"""Whole runs of every kind of stream: all engines and both federations agree, resumed or not."""

from __future__ import annotations

import numpy as np
import pytest

import edgelearn
from edgelearn.fleet import native
from edgelearn.fleet.simulate import resume
from edgelearn.report.tables import summary_table
from edgelearn.scenario.world import build

DOMAINS = {"kind": "domain-incremental", "num_experiences": 3, "rounds_per_experience": 1}
STREAMS = {
    "new-instances": {"stream": {"kind": "new-instances", "num_experiences": 3}},
    "cumulative": {"stream": {"num_experiences": 3, "cumulative": True}},
    "online": {"stream": {"num_experiences": 3, "online": True, "blur": 0.3}},
    "gradual": {"stream": {**DOMAINS, "drift": "gradual", "num_domains": 2}},
    "recurring": {"stream": {**DOMAINS, "drift": "recurring", "num_domains": 2}},
    "relabel": {"stream": {**DOMAINS, "transform": "relabel"}},
    "labels": {"labels": {"noise": 0.2, "missing": 0.3, "per_class": 4, "delay": 1}},
    "staggered": {"stream": {"num_experiences": 3, "order": "staggered"}},
    "comers-and-goers": {
        "stream": {"num_experiences": 3},
        "fleet": {"late_share": 0.3, "leaving_share": 0.3, "num_devices": 10},
    },
}


def signature(record):
    lines = [line for line in record.lines if line["kind"] in ("start", "round", "devices")]
    keys = ("round", "cohort", "outcomes", "loss", "accuracy", "served", "devices", "offline")
    return [{key: line[key] for key in keys if key in line} for line in lines]


@pytest.mark.parametrize("name", STREAMS)
def test_engines_and_federations_agree(small, name):
    scenario = small(**STREAMS[name])
    truth = edgelearn.simulate(scenario, engine="reference", federation="faithful")
    other = edgelearn.simulate(scenario)
    if native.is_installed():
        assert other.run["engine"]["tier"] == ("batched" if name == "relabel" else "native")
    assert other.run["engine"]["federation"] == "fused"
    for one, two in zip(truth.rounds, other.rounds, strict=True):
        assert one["cohort"] == two["cohort"]
        assert one["outcomes"] == two["outcomes"]
        if one["loss"] is None:
            assert two["loss"] is None
        else:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    # A test sample on the edge between two classes may fall either way.
    final = [record.final_by_device() for record in (truth, other)]
    assert np.nanmean(final[0]) == pytest.approx(np.nanmean(final[1]), abs=0.03)


@pytest.mark.parametrize("name", ["online", "comers-and-goers", "labels"])
def test_a_resumed_run_has_the_same_bits(small, name, tmp_path):
    scenario = small(**STREAMS[name])
    whole = edgelearn.simulate(scenario, out=tmp_path / "whole", checkpoint_every_s=0)

    def stop(progress):
        if progress.server_round == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        edgelearn.simulate(scenario, out=tmp_path / "part", checkpoint_every_s=0, on_round=stop)
    resumed = resume(tmp_path / "part")
    assert signature(resumed) == signature(whole)


def test_who_is_away_is_named_and_not_asked(small):
    scenario = small(**STREAMS["comers-and-goers"])
    presence = build(scenario).presence
    record = edgelearn.simulate(scenario)
    for line in record.rounds:
        there = presence.at(line["position"])
        assert there[line["cohort"]].all()
    for line in record.device_rows:
        there = presence.at(line["position"])
        assert line["devices"] == np.flatnonzero(there).tolist()
        assert line["offline"] == np.flatnonzero(~there).tolist() != []


def test_a_fleet_that_is_always_there_has_nobody_offline(small):
    record = edgelearn.simulate(small())
    assert [line["offline"] for line in record.device_rows] == [[], []]
    assert record.run["first_met"] is None
    assert record.exposure() == ()
    assert "has met" not in str(summary_table(record).caption)


def test_labels_that_come_late_leave_devices_idle_first(small):
    record = edgelearn.simulate(
        small(
            labels={"delay": 1},
            client={"epochs": 10},
            stream={"num_experiences": 3, "rounds_per_experience": 4},
        )
    )
    idle = [line["outcomes"]["idle"] for line in record.rounds]
    assert idle[:4] == [3, 3, 3, 3]
    assert record.rounds[0]["loss"] is None
    assert max(idle[4:]) < 3
    # At the end of the second position the first experience is known, the second not yet.
    after = record.matrix()[1]
    assert after[0] > 0.8 > 0.3 > after[1]


def test_what_devices_know_of_what_others_have_met(small):
    record = edgelearn.simulate(
        small(
            client={"epochs": 10},
            data={"max_train": 600},
            fleet={"cohort": 6},
            stream={"num_experiences": 3, "order": "staggered", "rounds_per_experience": 8},
        )
    )
    found = record.exposure()
    assert len(found) == 3
    assert all(0 <= value <= 1 for value in (found[0].own, found[0].fleet, found[0].others))
    assert np.isnan(found[-1].others)  # each device has met all by then
    # Nobody has seen more than a third of the classes, and the mean knows the rest.
    assert found[0].gain > 0.1
    assert record.run["first_met"][1] == [2, 0, 1]
    caption = str(summary_table(record).caption)
    assert f"devices {100 * found[-1].own:.1f}% on what each has met" in caption
    assert "on what only others have met" in caption
