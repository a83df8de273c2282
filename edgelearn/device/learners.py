"""The learners of a fleet: one for each network that its devices hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgelearn.device.fleet_store import RecordLayout
from edgelearn.device.learner import Learner, make_learner
from edgelearn.errors import Fault, ScenarioError
from edgelearn.scenario.variants import BASE
from edgelearn.scenario.world import World


@dataclass(frozen=True, slots=True)
class Learners:
    """A learner for each network, and who learns with which.

    Attributes:
        by_variant: Learners by the name of the network; "" is that of `[model]`.
        held: Name of the network that each device holds.
    """

    by_variant: Mapping[str, Learner]
    held: tuple[str, ...]

    @classmethod
    def of(cls, world: World) -> Learners:
        """Build the learners of all networks that a scenario names.

        Raises:
            ScenarioError: If a network does not fit, or if what travels is not the same for all.
        """
        names = (BASE, *world.scenario.model.variants)
        found = {name: make_learner(world, name) for name in names}
        common = found[BASE].layout
        for name, learner in found.items():
            if learner.layout.digest != common.digest:
                message = (
                    f"what {learner.spec.strategy!r} shares has other shapes than for the network "
                    "of [model]; devices of both can't average it"
                )
                raise ScenarioError(
                    world.scenario.name, [Fault(f"model.variants.{name}", "name", message)]
                )
        return cls(found, world.variants)

    @property
    def base(self) -> Learner:
        """The learner of the network of `[model]`; what travels is the same for all."""
        return self.by_variant[BASE]

    @property
    def largest(self) -> Learner:
        """The learner whose devices remember most, among those that a device has."""
        held = set(self.held)
        return max(
            (learner for name, learner in self.by_variant.items() if name in held),
            key=lambda learner: learner.memory_bytes,
        )

    def __getitem__(self, device: int) -> Learner:
        """Return the learner of a device."""
        return self.by_variant[self.held[device]]

    def record(self, variant: str = BASE) -> RecordLayout:
        """Return the layout of a device's record in the fleet's file: as long for all networks."""
        longest = max(RecordLayout.of(s.declaration).size for s in self.by_variant.values())
        return RecordLayout.of(self.by_variant[variant].declaration, at_least=longest)
