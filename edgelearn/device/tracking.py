"""Activation ranges that are tracked in training: widened by what a device sees after it.

A device's new weights are near those that it is about to serve, in a fleet as a part of their mean.
So a probe of its samples passes through the trained network once in a round, and the ranges that
the device keeps (`edgelearn.runtime.ranges`) widen to hold what it spans: then fewer of them have
drifted when a model is served. That they are too wide is found as for all kept ranges, by a probe
of the served model that spans less than half of what a probe has spanned.

Jacob et al. (2018, arXiv:1712.05877, section 3.1) and Krishnamoorthi (2018, arXiv:1806.08342)
average the ranges of training batches instead, in each step and with the weights of that step.
Compiled engines show no activations within a step; and a moving average over rounds has no more to
do with the mean of all devices than the last round has: tried, it saved no observations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from edgelearn.device.learner import Learner
from edgelearn.device.learners import FleetLearners
from edgelearn.device.runtimes import kept_in, places_of, remembered
from edgelearn.device.state import DeviceState
from edgelearn.runtime.protocol import RangedPrepared, Runtime
from edgelearn.runtime.ranges import Places
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import World


@final
@dataclass(frozen=True, slots=True)
class Tracker:
    """Looks at one device after another when it has trained; holds nothing of any of them.

    Attributes:
        learner: What they learn with.
        runtime: What they serve with.
        places: Where they keep ranges.
        num_calibration: Own samples among which a probe is spread.
    """

    learner: Learner
    runtime: Runtime
    places: Places
    num_calibration: int

    @classmethod
    def of(cls, world: World, learner: Learner, runtime: Runtime) -> Tracker | None:
        """Return the tracker of a scenario; None if it tracks nothing."""
        spec = world.scenario.runtime
        places = places_of(world, runtime, learner.model) if spec.tracks_ranges else None
        return None if places is None else cls(learner, runtime, places, spec.num_calibration)

    def after(
        self, state: DeviceState, params: Tensor, update: Tensor, samples: Samples
    ) -> DeviceState:
        """Return the state of a device after training, with wider ranges where it saw wider ones.

        Args:
            state: Its state.
            params: Global parameters [P] that it began with.
            update: What it made of them, local - global [P].
            samples: What it trained on; with none, nothing is to be seen.
        """
        kept = kept_in(state.memory, self.places)
        if kept is None or not kept.num_observed or not len(samples):
            return state
        model = self.learner.model
        ids = self.learner.calibration_ids(state, samples, most=self.num_calibration)
        probe = samples.store.batch(ids[kept.probe.among(len(ids))]).x
        model.module.eval()
        with torch.no_grad():
            prepared = self.runtime.prepare(model, self.learner.whole(state, params + update))
            if not isinstance(prepared, RangedPrepared):
                return state
            wider = kept.widened(prepared.observed(probe))
        return state if wider is None else replace(state, memory=remembered(state.memory, wider))


@final
class Trackers:
    """The trackers of a fleet, by the kind of device."""

    def __init__(self, world: World) -> None:
        self._kinds, learners = world.kinds, FleetLearners(world)
        self._of_kind = [
            Tracker.of(world, learners.of_kind(kind), learners.runtime(kind))
            for kind in world.kinds.kinds
        ]

    @classmethod
    def of(cls, world: World) -> Trackers | None:
        """Return those of a scenario; None if its devices track nothing."""
        return cls(world) if world.scenario.runtime.tracks_ranges else None

    def after(
        self, device: int, state: DeviceState, params: Tensor, update: Tensor, samples: Samples
    ) -> DeviceState:
        """Return the state of a device after training, as its tracker does."""
        tracker = self._of_kind[self._kinds.place(device)]
        return state if tracker is None else tracker.after(state, params, update, samples)
