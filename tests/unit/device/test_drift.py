"""Detectors: against river where definitions agree, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from edgelearn.device.drift import DETECTORS, Adwin, PageHinkley, make_detector
from edgelearn.errors import ScenarioError


def errors(seed, *parts):
    """Ones with a probability, for a while each: (probability, how many), ..."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.random(n) < p for p, n in parts]).astype(np.float64)


def alarms(detector, values):
    return detector.update(np.zeros(detector.size), values)[1]


def of_river(detector, values):
    found = []
    for place, value in enumerate(values.tolist()):
        detector.update(value)
        if detector.drift_detected:
            found.append(place)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_page_hinkley_is_that_of_river(seed, scale):
    values = scale * errors(seed, (0.1, 300), (0.5, 100), (0.2, 200), (0.9, 150))
    ours = PageHinkley(threshold=8.0, delta=0.01, alpha=0.999, min_samples=20)
    theirs = pytest.importorskip("river.drift").PageHinkley(
        min_instances=20, delta=0.01, threshold=8.0, alpha=0.999, mode="up"
    )
    found = alarms(ours, values)
    assert found == of_river(theirs, values)
    assert found


@pytest.mark.parametrize("seed", range(8))
def test_adwin_finds_a_rise_when_river_does(seed):
    values = errors(seed, (0.1, 500), (0.6, 300))
    first = alarms(Adwin(every=32), values)[0]
    theirs = of_river(pytest.importorskip("river.drift").ADWIN(), values)[0]
    assert 500 <= first < 600
    assert abs(first - theirs) <= 32  # they weigh short parts a little less


@pytest.mark.parametrize("name", DETECTORS)
def test_nothing_is_found_where_nothing_rises(name):
    detector = make_detector(name, {})
    for seed in range(5):
        assert alarms(detector, errors(seed, (0.3, 2000))) == []
        assert alarms(detector, errors(seed, (0.9, 300), (0.1, 500))) == []  # that is learning
    assert alarms(detector, np.zeros(500)) == alarms(detector, np.ones(500)) == []
    assert alarms(detector, np.empty(0)) == []


@pytest.mark.parametrize("name", DETECTORS)
def test_a_sudden_rise_is_found_soon_and_once(name):
    found = alarms(make_detector(name, {}), errors(0, (0.05, 200), (0.95, 200)))
    assert len(found) == 1
    assert 200 <= found[0] < 230


@pytest.mark.parametrize("name", DETECTORS)
def test_rises_that_recur_are_found_each(name):
    values = errors(1, (0.05, 200), (0.9, 100), (0.05, 200), (0.9, 100), (0.05, 200))
    found = alarms(make_detector(name, {}), values)
    assert [place // 100 for place in found] == [2, 5]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_a_stream_may_come_in_pieces(name, pieces):
    detector = make_detector(name, {})
    values = errors(2, (0.1, 150), (0.8, 100), (0.1, 200), (0.9, 100))
    state, found, begin = np.zeros(detector.size), [], 0
    for piece in np.array_split(values, pieces):
        before = state.copy()
        new, places = detector.update(state, piece)
        assert np.array_equal(state, before)
        assert new.shape == (detector.size,)
        state = new
        found += [begin + place for place in places]
        begin += len(piece)
    whole, places = detector.update(np.zeros(detector.size), values)
    assert found == places != []
    assert np.array_equal(state, whole)


def test_the_window_grows_and_is_cut():
    detector = Adwin()
    state, _ = detector.update(np.zeros(detector.size), errors(0, (0.1, 1000)))
    assert detector.width(state) == 1000
    state, found = detector.update(state, np.ones(100))
    assert found
    assert 90 <= detector.width(state) < 120
    assert state.nbytes < 2200


def test_a_fall_cuts_the_window_without_an_alarm():
    detector = Adwin()
    state, found = detector.update(np.zeros(detector.size), errors(0, (0.9, 300), (0.1, 300)))
    assert found == []
    assert detector.width(state) < 350


def test_a_window_longer_than_the_histogram_forgets_its_oldest(monkeypatch):
    monkeypatch.setattr(Adwin, "_ROWS", 3)
    detector = Adwin()
    state, found = detector.update(np.zeros(detector.size), np.zeros(200))
    assert found == []
    assert detector.width(state) <= 5 * (1 + 2 + 4)


def test_page_hinkley_waits_for_its_first_samples():
    values = np.array([0.0] * 3 + [1.0] * 20)
    assert alarms(PageHinkley(threshold=2.0, min_samples=1), values)[0] < 10
    assert alarms(PageHinkley(threshold=2.0, min_samples=18), values) == [17]


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("page-hinkley", {"threshold": 0.0}, "threshold is 0.0; must be above 0"),
        ("page-hinkley", {"delta": -1.0}, "delta is -1.0"),
        ("page-hinkley", {"alpha": 0.0}, "alpha is 0.0"),
        ("page-hinkley", {"alpha": 1.1}, "alpha is 1.1"),
        ("page-hinkley", {"min_samples": 0}, "min_samples is 0"),
        ("adwin", {"confidence": 1.0}, "confidence is 1.0"),
        ("adwin", {"confidence": 0.0}, "confidence is 0.0"),
        ("adwin", {"min_part": 0}, "min_part is 0"),
        ("adwin", {"every": 0}, "every is 0"),
        ("adwin", {"threshold": 1.0}, "threshold: adwin takes confidence, min_part, every"),
        ("adwin", {"confidence": "x"}, "detector_args"),
    ],
)
def test_wrong_arguments(name, arguments, fault):
    with pytest.raises(ScenarioError, match=fault):
        make_detector(name, arguments)
