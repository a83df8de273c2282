"""Plug-ins that try to carry a sample off a device, a data set with a canary, and an eavesdropper.

One training sample is the canary: 16 pixels that no other sample has. Each strategy below trains as
usual and, on the device that holds the canary, tries to send it in one way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edgelearn  # noqa: F401 - before flwr
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Update
from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.samples import Samples
from edgelearn.testing.toy import toy_dataset

from flwr.serverapp.strategy import FedAvg  # isort: skip

CANARY = bytes([251, 2, 243, 9, 199, 77, 241, 13, 250, 5, 187, 66, 239, 1, 246, 31])
OTHER_CANARY = bytes([3, 252, 8, 244, 78, 198, 12, 242, 4, 249, 67, 188, 2, 238, 30, 247])
PLACE = 0  # its index; it is labelled 0


def dataset(_spec: Any, canary: bytes = CANARY) -> Dataset:
    toy = toy_dataset(_spec)
    toy.x_train[PLACE] = np.frombuffer(canary, np.uint8).reshape(1, 4, 4)
    return toy


def dataset_with_another_canary(_spec: Any) -> Dataset:
    return dataset(_spec, OTHER_CANARY)


def forms(canary: bytes = CANARY) -> list[bytes]:
    """What to look for: the canary as bytes, numbers and text, raw and as the network sees it."""
    values = list(canary)
    decoded = (torch.tensor(values) / 255 / 0.3 - 1).tolist()
    found = [canary, canary.hex().encode(), str(int.from_bytes(canary, "big")).encode()]
    kinds = (np.float32, np.float64, np.int32, np.int64)
    found += [np.array(values, kind).tobytes()[:16] for kind in kinds]
    found.append(np.array(decoded, np.float32).tobytes()[:8])
    for comma in (",", ", "):
        found.append(comma.join(map(str, values[:4])).encode())
        found.append(comma.join(f"{float(v)}" for v in values[:4]).encode())
    found += [f"{value:.4f}".encode() for value in decoded[:4]]
    return found


class Honest(ClientStrategy):
    """Sends what is declared: the control that shows that the canary matters to training."""


class Leaky(ClientStrategy):
    """Base class: `leak` sees the update and the stored pixels of the canary [16], uint8."""

    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        raise NotImplementedError

    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        if PLACE not in data.ids.tolist():
            return update
        pixels = data.store.stored(torch.tensor([PLACE]))  # type: ignore[attr-defined]
        return self.leak(update, pixels.flatten(), memory)


def _number(pixels: Tensor) -> int:
    return int.from_bytes(bytes(pixels.tolist()), "big")


def with_metrics(update: Update, **metrics: Any) -> Update:
    return Update(update.arrays, {**update.metrics, **metrics})


def with_arrays(update: Update, **arrays: Any) -> Update:
    return Update({**update.arrays, **arrays}, update.metrics)


class ListInMetrics(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_metrics(update, sample=pixels.tolist())


class ListInADeclaredMetric(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_metrics(update, loss=[float(p) for p in pixels])


class TensorInADeclaredMetric(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_metrics(update, loss=pixels.float())


class TextInADeclaredMetric(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_metrics(update, loss=str(pixels.tolist()))


class HugeNumber(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return Update(update.arrays, {**update.metrics, "num-examples": _number(pixels)})


class NegativeNumber(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return Update(update.arrays, {**update.metrics, "num-steps": -int(pixels[0])})


class NameOfAMetric(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_metrics(update, **{str(pixels.tolist()): 1.0})


class NameOfAnArray(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_arrays(update, **{bytes(pixels.tolist()).hex(): torch.zeros(1)})


class NameOfAType(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_metrics(update, loss=type(str(_number(pixels)), (), {})())


class LabelsInAnExtraArray(Leaky):
    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        if PLACE not in data.ids.tolist():
            return update
        return with_arrays(update, labels=data.labels.float())


class ReplayBufferInAnExtraArray(Leaky):
    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"buffer": SampleSpec(8)}

    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        kept = memory.replace(buffer=torch.full((8,), PLACE, dtype=torch.int32))
        return with_arrays(update, buffer=kept.store.batch(kept["buffer"]).x)


class WrongShape(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        name = next(iter(update.arrays))
        return with_arrays(update, **{name: pixels.float()})


class ShapeThatSpeaks(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        name = next(iter(update.arrays))
        return with_arrays(update, **{name: torch.empty(0, *pixels[:4].tolist())})


class WrongDtype(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        name = next(iter(update.arrays))
        fake = update.arrays[name].double()
        fake.view(-1)[:16] = pixels.double()
        return with_arrays(update, **{name: fake})


class NotATensor(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        name = next(iter(update.arrays))
        return with_arrays(update, **{name: pixels.tolist()})


class NaNMetric(Leaky):
    """A NaN has 51 bits to spare."""

    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        bits = np.array([*pixels[:6].tolist(), 0xF8, 0x7F], np.uint8)
        return with_metrics(update, loss=float(bits.view(np.float64)[0]))


class MissingTensor(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        rest = list(update.arrays)[1:]
        return Update({name: update.arrays[name] for name in rest}, update.metrics)


class MissingMetric(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return Update(update.arrays, {"num-examples": 1, "loss": 0.0})


class WidensTheSchema(Leaky):
    """Says wherever it can that the sample may be sent."""

    arrays = {"sample": (16,)}  # noqa: RUF012
    schema = egress = {"sample": (16,)}  # noqa: RUF012

    def fit_schema(self, *arguments: Any) -> dict[str, Any]:
        return {"sample": (16,)}

    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"sample": TensorSpec((16,))}

    def start(self, model: Any, params: Any, memory: Memory, experience: Any) -> Memory:
        return memory.replace(sample=torch.ones(16))

    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return with_arrays(update, sample=pixels.float())


class SubclassOfUpdate(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        class More(Update):
            sample = pixels

        return More({**update.arrays, "sample": pixels.float()}, update.metrics)


class TwoFaced(Mapping[str, Any]):
    """Shows the declared metrics to who looks first, and the sample to who looks again."""

    def __init__(self, honest: Mapping[str, Any], secret: list[int]) -> None:
        self.honest, self.secret, self.reads = honest, secret, 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.honest)

    def __len__(self) -> int:
        return len(self.honest)

    def __getitem__(self, name: str) -> Any:
        self.reads += 1
        return self.honest[name] if self.reads <= len(self.honest) else self.secret


class TwoFacedMetrics(Leaky):
    def leak(self, update: Update, pixels: Tensor, memory: Memory) -> Update:
        return Update(update.arrays, TwoFaced(update.metrics, pixels.tolist()))


LEAKS: dict[type[Leaky], str] = {
    ListInMetrics: "a metric that is not declared",
    ListInADeclaredMetric: "the metric 'loss' is not one float",
    TensorInADeclaredMetric: "the metric 'loss' is not one float",
    TextInADeclaredMetric: "the metric 'loss' is not one float",
    HugeNumber: "the metric 'num-examples' is not a whole number from 0 to 2**53",
    NegativeNumber: "the metric 'num-steps' is not a whole number from 0 to 2**53",
    NameOfAMetric: "a metric that is not declared",
    NameOfAnArray: "a tensor that is not declared",
    NameOfAType: "the metric 'loss' is not one float",
    LabelsInAnExtraArray: "a tensor that is not declared",
    ReplayBufferInAnExtraArray: "a tensor that is not declared",
    WrongShape: "the tensor '1.weight' is not (8, 16) torch.float32",
    ShapeThatSpeaks: "the tensor '1.weight' is not (8, 16) torch.float32",
    WrongDtype: "the tensor '1.weight' is not (8, 16) torch.float32",
    NotATensor: "'1.weight' is not a tensor",
    NaNMetric: "the metric 'loss' is not finite",
    MissingTensor: "the declared tensor '1.weight' is missing",
    MissingMetric: "the declared metric 'num-steps' is missing",
    WidensTheSchema: "a tensor that is not declared",
    SubclassOfUpdate: "a tensor that is not declared",
}


class Eavesdropper(FedAvg):
    """FedAvg that writes down, byte by byte, all that reaches the server."""

    def _note(self, replies: Iterable[Any]) -> list[Any]:
        kept = list(replies)
        with Path(os.environ["EDGELEARN_TEST_EAVESDROP"]).open("ab") as file:
            for reply in kept:
                if reply.has_error():
                    file.write(f"error {reply.error}\n".encode())
                    continue
                for record in reply.content.values():
                    file.write(f"{record!r}\n".encode())
                    for value in record.values():
                        file.write(getattr(value, "data", b"") + b"\n")
        return kept

    def _noted(self, hook: Callable[..., Any], server_round: int, replies: Any) -> Any:
        return hook(server_round, self._note(replies))

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return self._noted(super().aggregate_train, server_round, replies)

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        return self._noted(super().aggregate_evaluate, server_round, replies)
