from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelearn.scenario.labels import labelled, told
from edgelearn.scenario.load import from_dict
from edgelearn.scenario.spec import LabelSpec, StreamSpec
from edgelearn.scenario.stream import Stream
from edgelearn.scenario.world import build


def stream(kind="class-incremental", T=5, num_classes=10, seed=0):
    spec = StreamSpec(kind=kind, num_experiences=T, rounds_per_experience=1)
    return Stream(spec, num_classes, seed)


LABELS = np.arange(1000, dtype=np.int64) % 10


def test_without_noise_nothing_changes():
    assert told(LABELS, LabelSpec(), stream()) is LABELS


@pytest.mark.parametrize("share", [0.001, 0.25, 1.0])
def test_exactly_the_share_is_wrong_and_all_other_classes_are_as_likely(share):
    found = told(LABELS, LabelSpec(noise=share), stream())
    assert (found != LABELS).sum() == round(share * 1000)
    assert set(np.unique(found)) <= set(range(10))
    if share == 1.0:
        moves = np.bincount((found - LABELS) % 10, minlength=10)
        assert moves[0] == 0
        assert 80 < moves[1:].min() <= moves[1:].max() < 145


def test_noise_stays_within_a_task():
    tasks = stream("task-incremental")
    found = told(LABELS, LabelSpec(noise=1.0), tasks)
    assert (found == LABELS ^ 1).all()  # of two classes, the other


def test_a_task_of_one_class_can_not_be_noisy():
    assert (told(LABELS, LabelSpec(noise=1.0), stream("task-incremental", T=10)) == LABELS).all()


def test_missing_labels():
    assert labelled(1000, LabelSpec(missing=0.3), 0).sum() == 700
    assert labelled(1000, LabelSpec(missing=1.0), 0).sum() == 0
    assert labelled(1000, LabelSpec(), 0).all()
    assert (
        labelled(50, LabelSpec(missing=0.5), 0) != labelled(50, LabelSpec(missing=0.5), 1)
    ).any()


def world(raw, **labels):
    return build(from_dict({**raw, "labels": labels}))


def test_devices_train_on_what_they_are_told_and_are_tested_on_the_truth(raw):
    clean, noisy = world(raw), world(raw, noise=0.5)
    for device in range(6):
        for position in range(5):
            first, second = (w.train_samples(device, position) for w in (clean, noisy))
            assert torch.equal(first.ids, second.ids)  # the truth decides who has what, and when
            a, b = (w.test_samples(device, position) for w in (clean, noisy))
            assert torch.equal(a.labels, b.labels)
    wrong = clean.train.y != noisy.train.y
    assert int(wrong.sum()) == round(0.5 * len(wrong))


def test_samples_without_label_are_not_trained_on_but_were_seen(raw):
    clean, found = world(raw), world(raw, missing=0.4)
    everyone = np.arange(6)
    count = sum(found.train_sizes(everyone, p).sum() for p in range(5))
    total = len(clean.train.y)
    assert count == total - round(0.4 * total)
    assert np.array_equal(found.first_met, clean.first_met)
    assert np.array_equal(world(raw, missing=1.0).first_met, clean.first_met)


@pytest.mark.parametrize("kind", ["class-incremental", "domain-incremental", "new-instances"])
def test_few_labels(raw, kind):
    raw["stream"]["kind"] = kind
    clean, few = world(raw), world(raw, per_class=3)
    for device in range(6):
        for position in range(5):
            all_, some = (w.train_samples(device, position) for w in (clean, few))
            counts = torch.bincount(all_.labels, minlength=10).clamp(max=3)
            assert torch.equal(torch.bincount(some.labels, minlength=10), counts)
            assert set(some.ids.tolist()) <= set(all_.ids.tolist())
    assert [len(t) for t in clean.test_parts] == [len(t) for t in few.test_parts]


def test_late_labels(raw):
    now, later = world(raw), world(raw, delay=2)
    for position in range(5):
        for device in range(6):
            found = later.train_samples(device, position).ids
            want = now.train_samples(device, position - 2).ids if position >= 2 else found[:0]
            assert torch.equal(found, want)
        experience = later.stream.experience(0, position)
        assert experience.position == position
        told_of = (0, 0, 0, 1, 2)[position]
        assert experience.id == told_of
        assert experience.classes == (later.stream.classes(told_of) if position >= 2 else ())
    assert (now.first_met == later.first_met).all()
