"""Ranges that outlive a model: kept while a few samples fit, observed anew when they don't."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.protocol import Observed, RangedGroupPrepared, RangedPrepared, Rows, Runtime
from edgelearn.runtime.ranges import Kept, KeptRanges, Places, Probe, calibrated, of_group
from edgelearn.scenario.models import mlp


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5


def runtimes() -> list[Runtime]:
    found: list[Runtime] = [Int8Runtime()]
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return found
    from edgelearn.runtime.onnxruntime import OnnxRuntime

    return [*found, OnnxRuntime(weight_bits=7)]


@pytest.fixture
def model() -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = FlatModel(mlp(input_shape=(8,), num_classes=3, hidden=(6,)))
    found.module.eval()
    return found


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_calibrated_is_within_what_is_observed(runtime: Runtime, model: FlatModel) -> None:
    prepared = runtime.prepare(model, model.initial())
    assert isinstance(prepared, RangedPrepared)
    calibration, x = rand(40, 8), rand(20, 8, seed=1)
    found = prepared.within(prepared.observed(calibration))(x)
    assert torch.equal(found, prepared.calibrated(calibration)(x))
    assert not torch.equal(found, prepared.calibrated(2 * calibration)(x))


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_new_weights_are_served_within_old_ranges_until_these_drift(
    runtime: Runtime, model: FlatModel
) -> None:
    kept, calibration, x = KeptRanges(), rand(40, 8), rand(20, 8, seed=1)
    params = model.initial()
    first = runtime.prepare(model, params)
    assert torch.equal(kept.predictor(first, calibration)(x), first.calibrated(calibration)(x))
    near = runtime.prepare(model, 1.01 * params)
    assert isinstance(first, RangedPrepared)
    assert isinstance(near, RangedPrepared)
    expected = near.within(first.observed(calibration))(x)
    assert torch.equal(kept.predictor(near, calibration)(x), expected)
    assert not torch.equal(expected, near.calibrated(calibration)(x))
    assert kept.num_observed == 1
    for count, factor in enumerate((1.5, 0.4), start=2):  # activations grow; they shrink
        far = runtime.prepare(model, factor * params)
        found = kept.predictor(far, calibration)(x)
        assert torch.equal(found, far.calibrated(calibration)(x))
        assert kept.num_observed == count


@torch.no_grad()
def test_a_range_within_its_bounds_is_kept_and_one_beyond_is_not(model: FlatModel) -> None:
    """The input's own range: growth by 4 and 6 percent of it, shrinking by 40 and 60."""
    prepared = Int8Runtime().prepare(FlatModel(nn.Linear(8, 3)), torch.zeros(27))
    x = rand(8, 8)  # all of it is the probe
    x = (x - x.min()) / (x.max() - x.min())
    for factor, count in ((1.04, 1), (1.06, 2), (0.6, 1), (0.4, 2)):
        kept = KeptRanges()
        kept.predictor(prepared, x)
        kept.predictor(prepared, factor * x)
        assert kept.num_observed == count


@torch.no_grad()
def test_what_has_no_ranges_is_calibrated_each_time(model: FlatModel) -> None:
    kept, x = KeptRanges(), rand(4, 8)
    params = model.initial()
    assert torch.equal(
        kept.predictor(FloatRuntime().prepare(model, params), x)(x), model(params, x)
    )
    prepared = Int8Runtime().prepare(model, params)
    kept.predictor(prepared, x)
    uncalibrated = prepared.calibrated(x[:0])(x)
    assert torch.equal(kept.predictor(prepared, x[:0])(x), uncalibrated)
    kept.predictor(prepared, x)
    assert kept.num_observed == 1  # what came between changed nothing


@torch.no_grad()
def test_ranges_that_are_not_finite_are_not_kept(model: FlatModel) -> None:
    kept, x = KeptRanges(), rand(4, 8)
    prepared = Int8Runtime().prepare(model, model.initial())
    kept.predictor(prepared, x)
    kept.predictor(prepared, torch.full_like(x, float("nan")))
    kept.predictor(prepared, x)
    assert kept.num_observed == 3


def test_bad_arguments() -> None:
    for arguments in ({"num_samples": 0}, {"most_beyond": -0.1}, {"least_filled": 1.0}):
        with pytest.raises(ValueError, match="allowed"):
            Probe(**arguments)  # type: ignore[arg-type]


# -- many devices ----------------------------------------------------------------------------------


def rows_of(x: dict[int, Tensor]) -> list[Rows]:
    device = torch.cat([torch.full((len(own),), k) for k, own in x.items()])
    whole = torch.cat(list(x.values()))
    cuts = zip(whole.split(13), device.split(13), strict=True)  # a device ends within a part
    return [Rows(some, theirs) for some, theirs in cuts]


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_a_group_keeps_what_each_of_its_devices_would(runtime: Runtime, model: FlatModel) -> None:
    """Device 0 drifts, 1 stays, 2 has no samples, 3 has observed nothing yet."""
    params = model.initial()
    places = Places.of(runtime, model, (8,))
    x = {k: rand(n, 8, seed=k) for k, n in enumerate((40, 30, 0, 9))}
    before = runtime.prepare(model, params)
    kept = [calibrated(before, x[k], Kept.none(places))[1] for k in (0, 1)]
    none = Kept.none(places)
    olds = [kept[0], kept[1], none, none]
    assert all(old is not None for old in olds)
    now = runtime.prepare(model, 1.01 * params)
    assert isinstance(now, RangedGroupPrepared)
    inputs = {**x, 0: 3 * x[0]}
    probes = {k: own[Probe().among(len(own))] for k, own in inputs.items()}
    asked = []

    def observe(some: list[int]) -> Observed:
        asked.append(some)
        return now.observed_group(rows_of({k: inputs[k] for k in some}), num_devices=4)

    first = now.observed_group(rows_of(probes), num_devices=4)
    ranges, new = of_group(olds, first, observe)  # type: ignore[arg-type]
    assert asked == [[0, 3]]
    assert [one is None for one in new] == [False, True, True, False]
    ask = rand(12, 8, seed=9)
    found = now.within_group(ranges)(Rows(ask, torch.arange(12) % 4))
    for k in range(4):
        predict, alone = calibrated(now, inputs[k], olds[k])
        torch.testing.assert_close(found[k::4], predict(ask[k::4]), atol=0.05, rtol=0)
        assert (alone is None) == (new[k] is None)
        if alone is not None and new[k] is not None:
            torch.testing.assert_close(new[k].table, alone.table)
            assert new[k].num_observed == alone.num_observed == (2 if k == 0 else 1)


@torch.no_grad()
def test_ranges_at_other_places_hold_for_nothing_else(model: FlatModel) -> None:
    """Of a network that takes another way for other inputs, all is observed each time."""
    prepared = Int8Runtime().prepare(model, model.initial())
    places = Places((8,), (*Places.of(Int8Runtime(), model, (8,)).names, "elsewhere"))
    x, kept = rand(20, 8), Kept.none(places)
    for count in (1, 2):
        predict, new = calibrated(prepared, x, kept)
        assert torch.equal(predict(x), prepared.calibrated(x)(x))
        assert new is not None
        assert new.num_observed == count
        kept = new
    rows = rows_of({0: x, 1: x + 1})
    probe = prepared.observed_group(rows, num_devices=2)
    ranges, both = of_group([kept, kept], probe, lambda _: probe)
    assert all(one is not None and one.num_observed == 3 for one in both)
    found = prepared.within_group(ranges)(Rows(x, torch.zeros(20, dtype=torch.int64)))
    assert torch.equal(found, prepared.calibrated(x)(x))


@torch.no_grad()
def test_a_layer_that_is_never_asked_has_no_range() -> None:
    """In a group its range is unknown, which is not to say that ranges drift."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    model = FlatModel(Spare())
    places = Places.of(Int8Runtime(), model, (8,))
    assert places.names == ("used.",)
    prepared = Int8Runtime().prepare(model, model.initial())
    x = {0: rand(9, 8), 1: rand(9, 8, seed=1)}
    kept = [Kept.none(places)] * 2
    for expected in ([1, 1], None):
        seen = prepared.observed_group(rows_of(x), num_devices=2)
        ranges, new = of_group(kept, seen, lambda _, seen=seen: seen)  # type: ignore[misc]
        assert (None if None in new else [k.num_observed for k in new if k]) == expected
        kept = [k for k in new if k] or kept
        answers = prepared.within_group(ranges)(Rows(x[0], torch.zeros(9, dtype=torch.int64)))
        assert torch.equal(answers, prepared.calibrated(x[0])(x[0]))


def test_a_table_may_be_longer_than_the_places_are(model: FlatModel) -> None:
    """Where other devices have more of them."""
    prepared = Int8Runtime().prepare(model, model.initial())
    places = Places.of(Int8Runtime(), model, (8,))
    kept = Kept(places, torch.full((5, 4), 7.0))
    x = rand(20, 8)
    with torch.no_grad():
        _, new = calibrated(prepared, x, kept)
        assert new is not None
        assert torch.equal(new.table[2:], kept.table[2:])
        assert calibrated(prepared, x, new)[1] is None
    assert torch.equal(new.ranges[0], torch.stack([x.min(), x.max()]))
    assert kept.num_observed == 0
    assert bool((kept.table == 7).all())


@torch.no_grad()
def test_ranges_widen_with_what_a_probe_spans() -> None:
    places = Places((8,), ("a", "b"))
    table = torch.tensor([[0.0, 4.0, 1.0, 3.0], [-1.0, 1.0, -0.5, 0.5]])
    kept = Kept(places, table, num_observed=2)

    def seen(*pairs: tuple[float, float]) -> Observed:
        ends = [(torch.tensor(low), torch.tensor(high)) for low, high in pairs]
        return Observed((8,), dict(zip(("a", "b"), ends, strict=True)))

    wider = kept.widened(seen((2.0, 5.0), (-0.75, 0.0)))
    assert wider is not None
    expected = torch.tensor([[0.0, 5.0, 1.0, 5.0], [-1.0, 1.0, -0.75, 0.5]])
    assert torch.equal(wider.table, expected)
    assert wider.num_observed == 2
    assert wider.fits(seen((1.0, 5.0), (-0.75, 0.5)))
    assert not kept.fits(seen((1.0, 5.0), (-0.75, 0.5)))
    assert not wider.fits(seen((1.0, 2.9), (-0.75, 0.5)))  # less than half of what it spanned
    assert wider.widened(seen((2.0, 3.0), (0.0, 0.1))) is None
    assert kept.widened(seen((2.0, float("inf")), (0.0, 0.1))) is None
    assert kept.widened(Observed((8,), {"a": (torch.tensor(0.0), torch.tensor(9.0))})) is None
    assert Kept.none(places).widened(seen((2.0, 5.0), (0.0, 1.0))) is None
    assert torch.equal(kept.table, table)
