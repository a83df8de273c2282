"""What the devices of a fleet learn and serve with, by the kind of device."""

from __future__ import annotations

from typing import final

from edgelearn.compress.submodel import Holdings, Part
from edgelearn.device.fleet_store import RecordLayout
from edgelearn.device.learner import Learner, make_learner
from edgelearn.device.runtimes import runtime_of
from edgelearn.errors import Fault, ScenarioError
from edgelearn.runtime.protocol import Runtime
from edgelearn.scenario.kinds import BASE, Kind, Kinds
from edgelearn.scenario.world import World


@final
class FleetLearners:
    """A learner for each network, a runtime for each kind; built when they are first asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._learners: dict[tuple[str, float], Learner] = {}
        self._runtimes: dict[str, Runtime] = {}

    @property
    def kinds(self) -> Kinds:
        """The kinds of devices."""
        return self._world.kinds

    @property
    def whole(self) -> Learner:
        """That of `[model]`, whose layout the server holds, whether or not a device has it."""
        return self._of(BASE, 1.0)

    def of_kind(self, kind: Kind) -> Learner:
        """Return the learner of the devices of a kind.

        Raises:
            ScenarioError: If its network does not fit, or what is shared beside it has other shapes
                than beside that of `[model]`.
        """
        return self._of(*kind.network)

    def of_device(self, device: int) -> Learner:
        """Return the learner of a device."""
        return self.of_kind(self.kinds.of_device(device))

    def _of(self, variant: str, width: float) -> Learner:
        if (variant, width) not in self._learners:
            learner = make_learner(self._world, variant=variant, width=width)
            if variant != BASE and learner.layout != self.whole.layout:
                message = (
                    f"what {learner.spec.strategy!r} shares has other shapes than for the network "
                    "of [model]; devices of both can't average it"
                )
                fault = Fault(f"model.variants.{variant}", "name", message)
                raise ScenarioError(self._world.scenario.name, [fault])
            self._learners[variant, width] = learner
        return self._learners[variant, width]

    def runtime(self, kind: Kind) -> Runtime:
        """Return the runtime of a kind of device.

        Raises:
            ScenarioError: If it does not take the arguments.
        """
        if kind.name not in self._runtimes:
            self._runtimes[kind.name] = runtime_of(self._world.scenario, kind)
        return self._runtimes[kind.name]

    @property
    def record_bytes(self) -> int:
        """Bytes of a device's record in the state of a simulated fleet: the most that one needs."""
        learners = (self.whole, *map(self.of_kind, self.kinds.kinds))
        return max(RecordLayout.of(learner.declaration).size for learner in learners)

    def record(self, kind: Kind) -> RecordLayout:
        """Return the layout of the record of a device of a kind, as long as all others."""
        declaration = self.of_kind(kind).declaration
        return RecordLayout.of(declaration, record_bytes=self.record_bytes)

    def holdings(self) -> Holdings:
        """Return who holds which part of the global parameters."""
        kinds, layout = self.kinds, self.whole.layout
        if kinds.widths == (1.0,):
            return Holdings()
        parts = {
            kind.width: Part.of(layout, self.of_kind(kind).layout)
            for kind in kinds.kinds
            if kind.width != 1
        }
        count = self._world.scenario.fleet.num_devices
        return Holdings(tuple(kinds.of_device(device).width for device in range(count)), parts)
