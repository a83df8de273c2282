"""Which network a device holds, in a fleet whose devices hold different ones."""

from __future__ import annotations

from edgelearn.scenario.shares import dealt
from edgelearn.scenario.spec import Scenario

BASE = ""  # the network of [model] itself, held by the devices that no variant takes


def variants(scenario: Scenario) -> tuple[str, ...]:
    """Return the name of the variant that each device holds; empty is the network of `[model]`.

    Variants go by the devices' profiles, or are dealt out by their shares of the fleet with the
    scenario's seed.

    Args:
        scenario: Names the variants; their shares sum to at most 1.
    """
    found, fleet = scenario.model.variants, scenario.fleet
    if not found:
        return (BASE,) * fleet.num_devices
    by_profile = {spec.profile: name for name, spec in found.items() if spec.profile}
    if by_profile:
        profiles = dealt(fleet.profiles, fleet.num_devices, scenario.seed, "profiles")
        return tuple(by_profile.get(profile, BASE) for profile in profiles)
    shares = {name: spec.share for name, spec in found.items()}
    if (rest := 1 - sum(shares.values())) > 1e-9:
        shares[BASE] = rest
    return tuple(dealt(shares, fleet.num_devices, scenario.seed, "variants"))
