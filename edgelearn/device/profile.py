"""Profiles: what a kind of device can do. Times and energies made from them are **modelled**."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelearn.errors import Fault, ScenarioError, nearest
from edgelearn.scenario.kinds import deal, names_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A kind of device.

    Attributes:
        name: Its name.
        memory_mib: RAM that learning may use.
        train_gflops: Floating-point operations per second in training, in 1e9.
        downlink_mbps: Download rate.
        uplink_mbps: Upload rate.
        power_w: Draw while training.
        radio_j_per_mb: Energy per megabyte moved.
        availability: Probability of being reachable in a round.
    """

    name: str
    memory_mib: float
    train_gflops: float
    downlink_mbps: float
    uplink_mbps: float
    power_w: float
    radio_j_per_mb: float
    availability: float = 1.0

    def train_s(self, flops: float) -> float:
        """Return modelled seconds of training."""
        return flops / (self.train_gflops * 1e9)

    def transfer_s(self, *, bytes_down: int, bytes_up: int) -> float:
        """Return modelled seconds on the network."""
        return 8e-6 * (bytes_down / self.downlink_mbps + bytes_up / self.uplink_mbps)

    def energy_j(self, *, train_s: float, num_bytes: int) -> float:
        """Return modelled energy."""
        return self.power_w * train_s + self.radio_j_per_mb * num_bytes / 1e6


def folder() -> Path:
    """Return the folder of profiles: in the wheel, or beside a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_profiles", package.parent / "clients" / "profiles"):
        if candidate.is_dir():
            return candidate
    raise ScenarioError("profiles", [Fault("", "folder", f"no device profiles beside {package}")])


def load_profile(reference: str) -> Profile:
    """Load a profile by name or path.

    Raises:
        ScenarioError: If it is missing or has faults; all of them are listed.
    """
    path = Path(reference).expanduser()
    if not path.is_file():
        known = {p.stem: p for p in sorted(folder().glob("*.toml"))}
        if reference not in known:
            message = f"no such profile{nearest(reference, known)}; built in: {', '.join(known)}"
            raise ScenarioError(reference, [Fault("fleet.profiles", reference, message)])
        path = known[reference]
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(str(path), [Fault("", "file", f"cannot be read: {error}")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(str(path), [Fault("", "syntax", str(error))]) from error
    fields = {f.name: f for f in dataclasses.fields(Profile) if f.name != "name"}
    faults = [
        Fault("", key, f"unknown key{nearest(key, fields)}; allowed: {', '.join(fields)}")
        for key in raw
        if key not in fields
    ]
    values: dict[str, float] = {}
    for name, spec in fields.items():
        value = raw.get(name, spec.default)
        if value is dataclasses.MISSING:
            faults.append(Fault("", name, "is missing"))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            faults.append(Fault("", name, f"got {value!r}; expected a number above 0"))
        elif name == "availability" and value > 1:
            faults.append(Fault("", name, f"got {value}; at most 1 is allowed"))
        else:
            values[name] = float(value)
    if faults:
        raise ScenarioError(str(path), faults)
    return Profile(name=path.stem, **values)


def assign(shares: Mapping[str, float], num_devices: int, seed: int) -> tuple[Profile, ...]:
    """Give each device a profile, in proportion to the shares."""
    profiles = [load_profile(name) for name in names_of(shares)]
    places = deal(shares, num_devices, seed)
    return tuple(profiles[place] for place in places.tolist())
