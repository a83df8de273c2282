"""Several devices in one session of ONNX Runtime: the bits that each device's own session gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgelearn.params import FlatModel
from edgelearn.runtime.observers import MinMax, ranges_of, ranges_of_group
from edgelearn.runtime.protocol import GroupPrepared, Rows
from edgelearn.runtime.qdq import quantized_numbers
from edgelearn.scenario.models import cnn, mlp

engine = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
from edgelearn.runtime import onnx_group, onnx_session  # noqa: E402
from edgelearn.runtime.onnx_group import ranges_of_each  # noqa: E402
from edgelearn.runtime.onnx_session import Session  # noqa: E402
from edgelearn.runtime.onnxruntime import OnnxPredictor, OnnxPrepared, OnnxRuntime  # noqa: E402

NUM_CALIBRATION = [7, 0, 30, 1]  # of each device
NUM_INPUTS = [5, 2, 0, 9]


class Branches(nn.Module):
    """Sums, averages, ReLU6, and values that several take."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.third, self.last = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.relu6, self.average = nn.ReLU6(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.second(x)
        x = torch.relu(x) + self.relu6(self.third(x))
        return self.last(self.average(x).flatten(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one layer": (lambda: nn.Linear(6, 4), (6,)),
    "mlp": (lambda: mlp(input_shape=(1, 5, 5), num_classes=4, hidden=(9, 8)), (1, 5, 5)),
    "cnn": (lambda: cnn(input_shape=(2, 8, 8), num_classes=4), (2, 8, 8)),
    "branches": (Branches, (2, 8, 8)),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_devices(sizes: list[int], shape: tuple[int, ...], seed: int) -> Rows:
    """Inputs of another scale on each device."""
    device = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scale = torch.tensor([0.1, 5.0, 1.0, 30.0])[device].view(-1, *[1] * len(shape))
    return Rows(randn(len(device), *shape, seed=seed) * scale, device)


def prepare(factory: Callable[[], nn.Module], *, bits: int = 8) -> OnnxPrepared:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FlatModel(factory())
    model.module.eval()
    params = model.initial()
    params += 0.2 * torch.rand(len(params), generator=torch.Generator().manual_seed(1))
    return OnnxRuntime(weight_bits=bits).prepare(model, params)


@torch.no_grad()
def test_what_the_engine_does_not_compute_in_integers_is_not_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then it has multiplied the scales of biases already, which differ between devices."""
    open_ = onnx_session._open

    def without_fusion(artefact: bytes, options: Any, **how: Any) -> Session:
        named = {"disabled_optimizers": ["ConstantSharing", "QDQSelectorActionTransformer"]}
        return open_(artefact, options, **(named if how else {}))

    monkeypatch.setattr(onnx_session, "_open", without_fusion)
    factory, shape = NETWORKS["mlp"]
    prepared, rows = prepare(factory), of_devices([5, 6], shape, 3)
    found = prepared.calibrated_group([rows], num_devices=2)(rows)
    for device in (0, 1):
        x = rows.x[rows.device == device]
        assert torch.equal(found[rows.device == device], prepared.calibrated(x)(x))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_each_device_gets_the_bits_of_its_own_session(name: str) -> None:
    factory, shape = NETWORKS[name]
    prepared = prepare(factory)
    assert isinstance(prepared, GroupPrepared)
    template, folded, weights = prepared._made(shape)
    calibration, rows = (
        of_devices(n, shape, s) for n, s in ((NUM_CALIBRATION, 1), (NUM_INPUTS, 2))
    )
    pieces = zip(calibration.x.split(11), calibration.device.split(11), strict=True)
    parts = [Rows(x, device) for x, device in pieces]  # devices begin and end within a part
    group = prepared.calibrated_group(parts, num_devices=4)
    found, ranges = (
        group(rows),
        ranges_of_group(
            partial(template.observe, folded),
            parts,
            MinMax(),
            places=[p.name for p in template.points],
            num_devices=4,
        ),
    )
    for device, own in enumerate(ranges_of_each(ranges, num_devices=4)):
        x = rows.x[rows.device == device]
        alone = prepared.calibrated(calibration.x[calibration.device == device])
        assert group.model_bytes == alone.model_bytes
        if own is None:
            assert device == 1
            assert torch.equal(found[rows.device == device], alone(x))
            continue
        assert not isinstance(group.answers[device], OnnxPredictor)  # type: ignore[union-attr]
        observed = ranges_of(
            partial(template.observe, folded), calibration.x[calibration.device == device], MinMax()
        )
        for point, pair in own.items():  # float sums may end in another bit for another batch
            torch.testing.assert_close(pair, observed[point])
        numbers = quantized_numbers(template, folded, weights, own, is_calibrated=True)
        exact = OnnxPredictor(template.artefact(numbers), shape)
        assert torch.equal(found[rows.device == device], exact(x))


@torch.no_grad()
def test_a_group_opens_a_session_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(NETWORKS["mlp"][0])
    opened = []
    session = engine.InferenceSession

    def counted(*args: object, **options: object) -> object:
        opened.append(1)
        return session(*args, **options)

    monkeypatch.setattr(engine, "InferenceSession", counted)
    for _ in range(2):
        group = prepared.calibrated_group([of_devices([3] * 4, (1, 5, 5), 1)], num_devices=4)
        group(of_devices([2] * 4, (1, 5, 5), 2))
    assert len(opened) == 2  # one that optimizes, one that answers


@torch.no_grad()
def test_where_the_engine_computed_an_input_away_each_device_has_its_own_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = prepare(NETWORKS["mlp"][0])
    calibration = of_devices([3] * 4, (1, 5, 5), 1)
    rows = of_devices([2] * 4, (1, 5, 5), 2)
    expected = prepared.calibrated_group([calibration], num_devices=4)(rows)
    opened = onnx_group.open_with_inputs

    def folding(artefact: bytes, names: set[str]) -> tuple[Session, frozenset[str]]:
        session, found = opened(artefact, names)
        return session, found - {min(found)}

    monkeypatch.setattr(onnx_group, "open_with_inputs", folding)
    group = prepare(NETWORKS["mlp"][0]).calibrated_group([calibration], num_devices=4)
    assert all(isinstance(answer, OnnxPredictor) for answer in group.answers)  # type: ignore[union-attr]
    assert torch.equal(group(rows), expected)


@torch.no_grad()
def test_a_float_group_shares_the_session_of_the_float_network() -> None:
    prepared = prepare(NETWORKS["cnn"][0], bits=32)
    rows = of_devices(NUM_INPUTS, (2, 8, 8), 2)
    group = prepared.calibrated_group([of_devices([1, 0, 1, 1], (2, 8, 8), 1)], num_devices=4)
    expected = prepared.calibrated(rows.x)(rows.x)
    np.testing.assert_allclose(group(rows), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_devices_none_of_which_has_samples_are_answered() -> None:
    prepared = prepare(NETWORKS["mlp"][0])
    rows = of_devices(NUM_INPUTS, (1, 5, 5), 2)
    group, alone = prepared.calibrated_group([], num_devices=4), prepared.calibrated(rows.x[:0])
    assert torch.equal(group(rows), alone(rows.x))
    assert group.model_bytes == alone.model_bytes
