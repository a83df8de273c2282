"""The learners of a fleet: one for each width of model that its devices hold."""

from __future__ import annotations

from typing import final

from edgelearn.compress.submodel import Holdings, Part
from edgelearn.device.fleet_store import RecordLayout
from edgelearn.device.learner import Learner, make_learner
from edgelearn.scenario.world import World


@final
class FleetLearners:
    """Which learner a device trains with; each is built when it is first asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._by_width: dict[float, Learner] = {}

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
        return self.of_width(self.width(device))

    def width(self, device: int) -> float:
        """Return the width of a device's model."""
        return self._world.widths[device] if self._world.widths else 1.0

    @property
    def widths(self) -> tuple[float, ...]:
        """Widths that devices have, falling."""
        return tuple(sorted(set(self._world.widths), reverse=True)) or (1.0,)

    @property
    def record_bytes(self) -> int:
        """Bytes of a device's record in the state of a simulated fleet: the most that one needs."""
        declarations = [self.of_width(width).declaration for width in {1.0, *self.widths}]
        return max(RecordLayout.of(declaration).size for declaration in declarations)

    def holdings(self) -> Holdings:
        """Return who holds which part of the global parameters."""
        layout = self.whole.model.layout
        parts = {
            width: Part.of(layout, self.of_width(width).model.layout)
            for width in self.widths
            if width != 1
        }
        return Holdings(self._world.widths, parts)
