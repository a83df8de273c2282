"""What the devices of a fleet learn and serve with, by the kind of device."""

from __future__ import annotations

from typing import final

from edgelearn.compress.submodel import Holdings, Part
from edgelearn.device.fleet_store import RecordLayout
from edgelearn.device.learner import Learner, make_learner
from edgelearn.runtime.protocol import Runtime, make_runtime
from edgelearn.scenario.kinds import Kind, Kinds
from edgelearn.scenario.world import World


@final
class FleetLearners:
    """Learners by width, and runtimes by kind; a learner is built when it is first asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._by_width: dict[float, Learner] = {}
        self._runtimes: dict[str, Runtime] = {}

    @property
    def kinds(self) -> Kinds:
        """The kinds of devices."""
        return self._world.kinds

    @property
    def whole(self) -> Learner:
        """That of the whole network, which the server holds, whether or not a device does."""
        return self.of_width(1.0)

    def of_width(self, width: float) -> Learner:
        """Return the learner of the devices with a width."""
        if width not in self._by_width:
            self._by_width[width] = make_learner(self._world, width=width)
        return self._by_width[width]

    def of_device(self, device: int) -> Learner:
        """Return the learner of a device."""
        return self.of_width(self.kinds.of_device(device).width)

    def runtime(self, kind: Kind) -> Runtime:
        """Return the runtime of a kind of device.

        Raises:
            ScenarioError: If it does not take the arguments.
        """
        if kind.name not in self._runtimes:
            name = self._world.scenario.runtime.name
            self._runtimes[kind.name] = make_runtime(name, kind.runtime_args)
        return self._runtimes[kind.name]

    @property
    def record_bytes(self) -> int:
        """Bytes of a device's record in the state of a simulated fleet: the most that one needs."""
        widths = {1.0, *self.kinds.widths}
        declarations = [self.of_width(width).declaration for width in widths]
        return max(RecordLayout.of(declaration).size for declaration in declarations)

    def holdings(self) -> Holdings:
        """Return who holds which part of the global parameters."""
        kinds, layout = self.kinds, self.whole.model.layout
        if kinds.widths == (1.0,):
            return Holdings()
        parts = {
            width: Part.of(layout, self.of_width(width).model.layout)
            for width in kinds.widths
            if width != 1
        }
        count = self._world.scenario.fleet.num_devices
        return Holdings(tuple(kinds.of_device(device).width for device in range(count)), parts)
