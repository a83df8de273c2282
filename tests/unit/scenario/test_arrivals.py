"""Who has which samples when: each once, unless the scenario says otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelearn.scenario.load import from_dict
from edgelearn.scenario.world import build

T, NUM_DEVICES = 5, 6
EVERYONE = np.arange(NUM_DEVICES)


def made(raw, **stream):
    labels, fleet = stream.pop("labels", {}), stream.pop("fleet", {})
    raw = {**raw, "labels": labels, "fleet": {**raw["fleet"], **fleet}}
    return build(from_dict({**raw, "stream": {**raw["stream"], **stream}}))


def ids_of(world, device, position, **kwargs):
    return world.train_samples(device, position, **kwargs).ids.tolist()


def all_ids(world):
    return [i for p in range(T) for d in EVERYONE for i in ids_of(world, d, p)]


OPTIONS = {
    "plain": {},
    "per-device": {"order": "per-device"},
    "staggered": {"order": "staggered", "max_shift": 2},
    "new-instances": {"kind": "new-instances"},
    "cumulative": {"cumulative": True, "order": "per-device"},
    "cumulative-domains": {"kind": "domain-incremental", "cumulative": True},
    "blur": {"blur": 0.4},
    "blur-all": {"blur": 0.4, "blur_reach": "all", "disjoint_share": 0.5, "order": "per-device"},
    "blurred-domains": {"kind": "domain-incremental", "blur": 0.4},
    "online": {"online": True, "blur": 0.3},
    "gradual": {"kind": "domain-incremental", "drift": "gradual", "num_domains": 2},
    "recurring": {"kind": "domain-incremental", "drift": "recurring", "num_domains": 2},
    "sudden": {"kind": "domain-incremental", "num_domains": 2, "order": "staggered"},
    "relabel": {"kind": "domain-incremental", "transform": "relabel"},
    "late": {"fleet": {"late_share": 0.3, "leaving_share": 0.3, "cohort": 1}, "cumulative": True},
    "delay": {"labels": {"delay": 2, "per_class": 3, "missing": 0.2}, "order": "per-device"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("server_round", [None, 1, 4])
def test_many_devices_at_once_have_what_each_has_alone(raw, name, server_round):
    world = made(raw, **OPTIONS[name])
    devices = np.array([4, 0, 4, 2])
    for position in range(T):
        ids, starts = world.train_ids(devices, position, server_round=server_round)
        sizes = world.train_sizes(devices, position, server_round=server_round)
        assert ids.dtype == np.int32
        assert np.diff(starts).tolist() == sizes.tolist()
        for k, device in enumerate(devices.tolist()):
            alone = world.train_samples(device, position, server_round=server_round)
            assert alone.ids.dtype == torch.int32
            assert ids[starts[k] : starts[k + 1]].tolist() == alone.ids.tolist()


@pytest.mark.parametrize("name", OPTIONS)
def test_labels_are_among_the_classes_that_can_occur(raw, name):
    world = made(raw, **OPTIONS[name])
    for device in EVERYONE:
        for position in range(T):
            classes = world.stream.experience(device, position).classes
            assert set(world.train_samples(device, position).labels.tolist()) <= set(classes)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_scenario_has_the_same_stream(raw, name):
    first, again, other = (made({**raw, "seed": s}, **OPTIONS[name]) for s in (0, 0, 1))
    assert all_ids(first) == all_ids(again) != all_ids(other)


@pytest.mark.parametrize("name", OPTIONS)
def test_who_has_met_what(raw, name):
    options = {**OPTIONS[name], "labels": {}}
    world = made(raw, **options)
    met = world.first_met
    if world.stream.spec.cumulative:
        options["cumulative"] = False
        world = made(raw, **options)
    table = world.stream.experience_of_label() if world.stream.splits_classes else None
    want = np.full((NUM_DEVICES, T), -1)
    for device in EVERYONE:
        order = world.stream.order(device)
        for position in reversed(range(T)):
            found = world.train_samples(device, position)
            if table is not None:
                want[device, table[found.labels.numpy()]] = position
            elif len(found) and world.stream.spec.blur == 0:
                want[device, order[position]] = position
    if table is not None or world.stream.spec.blur == 0:
        assert met.tolist() == want.tolist()
    else:  # with 40 %, something of each domain comes a position early
        assert met[0].tolist() == [0, 0, 1, 2, 3]


ONCE = ["plain", "per-device", "staggered", "new-instances", "blur", "blur-all"]


@pytest.mark.parametrize("name", ONCE)
def test_each_sample_arrives_once(raw, name):
    world = made(raw, **OPTIONS[name])
    assert sorted(all_ids(world)) == list(range(len(world.train.y)))


def test_each_sample_arrives_once_in_each_domain(raw):
    world = made(raw, **OPTIONS["blurred-domains"])
    assert sorted(all_ids(world)) == list(range(T * len(world.train.y)))


# -- new instances and cumulative streams ----------------------------------------------------------


def test_new_instances_are_equal_parts_with_all_classes(raw):
    world = made(raw, kind="new-instances")
    sizes = np.array([world.train_sizes(EVERYONE, p) for p in range(T)])
    assert (np.ptp(sizes, axis=0) <= 1).all()
    for position in range(T):
        labels = torch.cat([world.train_samples(d, position).labels for d in EVERYONE])
        seen = set(labels.tolist())
        assert seen == set(range(10)) == set(world.stream.experience(0, position).classes)


def test_test_samples_of_new_instances_are_parts_with_all_classes(raw):
    world = made(raw, kind="new-instances")
    parts = [[*world.test_samples(d, e).ids.tolist()] for d in EVERYONE for e in range(T)]
    assert sorted(i for part in parts for i in part) == list(range(len(world.test.y)))
    for e in range(T):
        labels = torch.cat([world.test_samples(d, e).labels for d in EVERYONE])
        assert torch.bincount(labels, minlength=10).min() > 0
    assert world.num_test_samples(2) == len(world.test_parts[2])


@pytest.mark.parametrize("kind", ["class-incremental", "domain-incremental", "new-instances"])
@pytest.mark.parametrize("order", ["shared", "per-device", "staggered"])
def test_a_cumulative_stream_holds_all_that_came_before(raw, kind, order):
    one, all_ = (made(raw, kind=kind, order=order, cumulative=c) for c in (False, True))
    for device in EVERYONE:
        before: list[int] = []
        for position in range(T):
            before += ids_of(one, device, position)
            assert sorted(ids_of(all_, device, position)) == sorted(before)
    assert len(ids_of(all_, 0, T - 1)) > 0


# -- boundaries ------------------------------------------------------------------------------------


def homes(world, position):
    """Experience of each sample that arrives at a position, in the order of arrival, pooled."""
    table = world.stream.experience_of_label()
    return np.concatenate([table[world.train_samples(d, position).labels] for d in EVERYONE])


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_neighbours_overlap_by_the_share(raw, share):
    world = made(raw, blur=share)
    for position in range(1, T - 1):
        found = homes(world, position)
        assert set(found) <= {position - 1, position, position + 1}
        foreign = np.mean(found != position)
        assert foreign == pytest.approx(share, abs=0.08)
    # At the ends half of it stays, and half as much comes.
    assert np.mean(homes(world, 0) != 0) == pytest.approx(share / 2, abs=0.08)
    assert np.mean(homes(world, T - 1) != T - 1) == pytest.approx(share / 2, abs=0.08)


def test_blur_reaches_all_but_disjoint_classes_stay(raw):
    world = made(raw, blur=0.5, blur_reach="all", disjoint_share=0.3)
    table = world.stream.experience_of_label()
    moved = np.zeros(10)
    reached = np.zeros((10, T))
    for position in range(T):
        for device in EVERYONE:
            labels = world.train_samples(device, position).labels.numpy()
            np.add.at(reached[:, position], labels, 1)
    for label in range(10):
        moved[label] = 1 - reached[label, table[label]] / reached[label].sum()
    assert (moved == 0).sum() == 3
    blurry = moved > 0
    assert moved[blurry].mean() == pytest.approx(0.5, abs=0.06)
    assert (reached[blurry] > 0).all()


def test_online_rounds_share_out_an_experience(raw):
    raw["stream"]["rounds_per_experience"] = 4
    world = made(raw, online=True, blur=0.3)
    for device in EVERYONE:
        for position in (0, 3):
            rounds = range(4 * position + 1, 4 * position + 5)
            parts = [ids_of(world, device, position, server_round=r) for r in rounds]
            assert [i for part in parts for i in part] == ids_of(world, device, position)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    whole = made(raw, online=False)
    assert ids_of(whole, 0, 0, server_round=1) == ids_of(whole, 0, 0)


def test_more_rounds_than_samples_leave_rounds_without(raw):
    raw["stream"]["rounds_per_experience"] = 1000
    world = made(raw, online=True)
    sizes = [world.train_sizes(EVERYONE, 1, server_round=1000 + r)[0] for r in range(1, 1001)]
    assert set(sizes) == {0, 1}
    assert sum(sizes) == world.train_sizes(EVERYONE, 1)[0]


def test_the_past_decays_and_the_future_grows_within_an_experience(raw):
    world = made(raw, blur=0.6)
    past, future = np.zeros(4), np.zeros(4)
    for position in range(1, T - 1):
        for device in EVERYONE:
            table = world.stream.experience_of_label()
            found = table[world.train_samples(device, position).labels]
            for k, quarter in enumerate(np.array_split(found, 4)):
                past[k] += (quarter < position).sum()
                future[k] += (quarter > position).sum()
    assert past[0] > past[1] > past[2] > past[3] < past[0] / 3
    assert future[3] > future[2] > future[1] > future[0] < future[3] / 3


# -- drift -----------------------------------------------------------------------------------------


def domains(world, position):
    ids = np.concatenate([ids_of(world, d, position) for d in EVERYONE])
    return ids // len(world.train.y)


def test_sudden_drift_holds_a_domain_for_its_share_of_the_stream(raw):
    world = made(raw, kind="domain-incremental", num_domains=2)
    assert [set(domains(world, p)) for p in range(T)] == [{0}, {0}, {0}, {1}, {1}]
    assert len(world.train.domains.index) == 2
    tested = [set((world.test_samples(0, e).ids // len(world.test.y)).tolist()) for e in range(T)]
    assert tested == [{0}, {0}, {0}, {1}, {1}]


def test_recurring_drift_comes_back(raw):
    world = made(raw, kind="domain-incremental", num_domains=2, drift="recurring")
    assert [set(domains(world, p)) for p in range(T)] == [{0}, {1}, {0}, {1}, {0}]
    assert ids_of(world, 3, 0) == ids_of(world, 3, 4)


def test_gradual_drift_mixes_ever_more_of_the_next(raw):
    world = made(raw, kind="domain-incremental", num_domains=2, drift="gradual")
    shares = [np.mean(domains(world, p)) for p in range(T)]
    # Pure up to a quarter of the stream and from three quarters on, in between linear.
    want = [0.0, np.mean(np.clip(np.linspace(1, 2, 99) / 2.5 - 0.5, 0, 1)), 0.5]
    want += [1 - want[1], 1.0]
    assert shares == pytest.approx(want, abs=0.03)
    tests = []
    for e in range(T):
        ids = torch.cat([world.test_samples(d, e).ids for d in EVERYONE])
        tests.append(float((ids // len(world.test.y)).float().mean()))
    assert tests == pytest.approx(want, abs=0.06)
    early, late = np.array_split(np.array(ids_of(world, 0, 2)) // len(world.train.y), 2)
    assert np.mean(early) < 0.5 < np.mean(late)  # within an experience, too


def test_a_sample_drifts_once(raw):
    world = made(raw, kind="domain-incremental", num_domains=5, drift="gradual")
    count = len(world.train.y)
    last = np.full(count, -1)
    for position in range(T):
        ids = np.concatenate([ids_of(world, d, position) for d in EVERYONE])
        now = np.full(count, -1)
        now[ids % count] = ids // count
        assert (now >= last).all()
        last = now
    assert set(last) == {3, 4}


def test_labels_that_change_their_meaning(raw):
    world = made(raw, kind="domain-incremental", transform="relabel", num_domains=2)
    first, later = world.train_samples(0, 0), world.train_samples(0, 4)
    assert torch.equal(first.batch().x, later.batch().x)
    assert world.train.domains is None
    names = world.train.meanings
    assert torch.equal(names[0], torch.arange(10))
    assert sorted(names[1].tolist()) == list(range(10))
    assert torch.equal(later.labels, names[1][first.labels])
    assert torch.equal(later.batch().y, later.labels)
    assert not torch.equal(later.labels, first.labels)
    a, b = world.test_samples(0, 0), world.test_samples(0, 4)
    assert torch.equal(b.labels, names[1][a.labels])


# -- orders and fleets -----------------------------------------------------------------------------


def test_staggered_devices_are_ahead_of_each_other(raw):
    world = made(raw, order="staggered", max_shift=2)
    orders = [world.stream.order(d) for d in range(4)]
    assert orders == [(0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (2, 3, 4, 0, 1), (0, 1, 2, 3, 4)]
    assert world.orders.tolist() == [list(world.stream.order(d)) for d in EVERYONE]
    full = made(raw, order="staggered")
    assert [full.stream.order(d)[0] for d in EVERYONE] == [0, 1, 2, 3, 4, 0]
    assert made(raw).orders is None


def test_who_is_away_meets_nothing(raw):
    fleet = {"late_share": 0.5, "leaving_share": 0.5, "cohort": 1}
    always, world = made(raw), made(raw, fleet=fleet)
    for position in range(T):
        there = world.presence.at(position)
        sizes = world.train_sizes(EVERYONE, position)
        assert (sizes == np.where(there, always.train_sizes(EVERYONE, position), 0)).all()
    met = world.first_met
    for device in EVERYONE:
        joins, leaves = world.presence.joins[device], world.presence.leaves[device]
        assert met[device].tolist() == [p if joins <= p < leaves else -1 for p in range(T)]


def test_who_joins_late_gathers_from_then_on(raw):
    fleet = {"late_share": 0.5, "cohort": 1}
    always, world = made(raw), made(raw, fleet=fleet, cumulative=True)
    late = int(np.argmax(world.presence.joins))
    joins = int(world.presence.joins[late])
    before: list[int] = []
    for position in range(joins, T):
        before += ids_of(always, late, position)
        assert ids_of(world, late, position) == before


def test_labels_of_before_it_joined_do_not_come(raw):
    fleet = {"late_share": 0.5, "cohort": 1}
    world = made(raw, fleet=fleet, labels={"delay": 1})
    late = int(np.argmax(world.presence.joins * (world.presence.joins < T - 1)))
    joins = int(world.presence.joins[late])
    assert ids_of(world, late, joins) == []
    assert ids_of(world, late, joins + 1) == ids_of(made(raw), late, joins) != []


def test_a_device_without_samples_is_no_hindrance(raw):
    for options in OPTIONS.values():
        world = made({**raw, "partition": {"kind": "dirichlet", "alpha": 0.01}}, **options)
        assert len(all_ids(world)) > 0
        assert world.first_met.shape == (NUM_DEVICES, T)
