"""Plug-ins for the tests of engines: on the device that holds a given sample, something happens."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch import Tensor

from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy, Update
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


class Diverges(OnOneDevice):
    """Sends NaN where it can: past the framework's own check of training."""

    def happen(self, update: Update) -> Update:
        arrays: dict[str, Tensor] = {name: value / 0 * 0 for name, value in update.arrays.items()}
        return Update(arrays, update.metrics)


class LossIsNaN(ClientStrategy):
    def __init__(self, *, victim: int = -1) -> None:
        self.victim = victim

    def loss(self, model: Any, params: Tensor, batch: Any, memory: Memory) -> Tensor:
        loss = super().loss(model, params, batch, memory)
        own = memory.store.batch(memory.store.labels_of(self.victim)) if False else batch
        return loss if own is batch else loss


class CannotBeBuilt(ClientStrategy):
    def __init__(self) -> None:
        raise RuntimeError("no strategy today")
