"""Plug-ins for the tests of engines: on the device that holds a given sample, something happens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Update
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Prepared, Int8Runtime
from edgelearn.runtime.protocol import GroupPredictor, GroupPrepared, Predictor, Rows
from edgelearn.scenario.samples import Samples


class OnOneDevice(ClientStrategy):
    def __init__(self, *, victim: int = -1) -> None:
        self.victim = victim

    def happen(self, update: Update) -> Update:
        return update

    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        return self.happen(update) if self.victim in data.ids.tolist() else update


class Killed(OnOneDevice):
    def happen(self, update: Update) -> Update:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class Exits(OnOneDevice):
    def happen(self, update: Update) -> Update:
        os._exit(7)


class Raises(OnOneDevice):
    def happen(self, update: Update) -> Update:
        raise ValueError("not today")


class SendsNaN(OnOneDevice):
    def happen(self, update: Update) -> Update:
        return Update({n: v * float("nan") for n, v in update.arrays.items()}, update.metrics)


class FallsIll(OnOneDevice):
    """From its second experience on, the loss of that device is NaN."""

    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"ill": TensorSpec(())}

    def loss(self, model: Any, params: Tensor, batch: Any, memory: Memory) -> Tensor:
        loss = super().loss(model, params, batch, memory)
        return torch.where(memory["ill"] > 0, float("nan"), 1.0) * loss

    def finish(self, model: Any, params: Any, data: Samples, memory: Memory, generator: Any) -> Any:
        return memory.replace(ill=torch.tensor(float(self.victim in data.ids.tolist())))


class CannotBeBuilt(ClientStrategy):
    def __init__(self) -> None:
        raise RuntimeError("no strategy today")


class DeadlyRuntime:
    """int8, but what a device has to be calibrated with kills the process, or raises."""

    def __init__(self, *, pixels: float = -1.0, kills: bool = True) -> None:
        self.pixels, self.kills = pixels, kills

    def prepare(self, model: FlatModel, params: Tensor) -> DeadlyPrepared:
        return DeadlyPrepared(self, Int8Runtime().prepare(model, params))

    def look_at(self, x: Tensor) -> None:
        if ((x.flatten(1).double().sum(1) - self.pixels).abs() < 1e-6).any():
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("not today")


class DeadlyPrepared(GroupPrepared):
    def __init__(self, runtime: DeadlyRuntime, prepared: Int8Prepared) -> None:
        self.runtime, self.prepared = runtime, prepared

    def calibrated(self, calibration: Tensor) -> Predictor:
        self.runtime.look_at(calibration)
        return self.prepared.calibrated(calibration)

    def calibrated_group(self, calibration: Iterable[Rows], *, num_devices: int) -> GroupPredictor:
        def looked_at() -> Iterator[Rows]:
            for rows in calibration:
                self.runtime.look_at(rows.x)
                yield rows

        return self.prepared.calibrated_group(looked_at(), num_devices=num_devices)
