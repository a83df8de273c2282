"""What the values of a scenario have to say to each other: faults that no single key shows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgelearn.errors import Fault, nearest
from edgelearn.scenario.kinds import DEFAULT_KIND
from edgelearn.scenario.spec import (
    ALL,
    ClientSpec,
    EvaluateSpec,
    FleetSpec,
    LabelSpec,
    ServerSpec,
    StreamSpec,
    VariantSpec,
)

_PARTS = (ALL, "bias", "norm")
_OF_DOMAINS = {"num_domains": 0, "drift": "sudden"}


def faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Check what concerns several keys, as far as these are without a fault of their own.

    Args:
        values: Checked values by table and key; None where there is a fault.
    """
    fleet = _complete(FleetSpec, values.get("fleet", {}))
    stream = _complete(StreamSpec, values.get("stream", {}))
    asked = _complete(EvaluateSpec, values.get("evaluate", {}))["num_devices"]
    yield from _fleet_faults(fleet, asked, stream["num_experiences"])
    yield from _variant_faults(values.get("model", {}).get("variants") or {}, fleet)
    yield from _client_faults(_complete(ClientSpec, values.get("client", {})))
    yield from _server_faults(_complete(ServerSpec, values.get("server", {})))
    if None not in stream.values():
        yield from _domain_faults(stream)
        yield from _arrival_faults(stream)
        yield from _order_faults(stream)
        yield from _given_faults(stream)
        yield from _boundary_faults(stream)
        T = stream["num_experiences"]
        delay = _complete(LabelSpec, values.get("labels", {}))["delay"]
        if delay is not None and delay >= T:
            message = f"got {delay}; the stream has {T} positions, so no label would ever come"
            yield Fault("labels", "delay", message)


def _complete(kind: type[Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with its defaults; None where there is a fault."""
    out: dict[str, Any] = {}
    for spec in dataclasses.fields(kind):
        default = None if spec.default is dataclasses.MISSING else spec.default
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        out[spec.name] = table.get(spec.name, default)
    return out


def _fleet_faults(
    fleet: Mapping[str, Any], asked: int | None, num_experiences: int | None
) -> Iterator[Fault]:
    num_devices = fleet["num_devices"]
    for table, key, wanted in (
        ("fleet", "cohort", fleet["cohort"]),
        ("evaluate", "num_devices", asked),
    ):
        if wanted is not None and num_devices is not None and wanted > num_devices:
            message = f"got {wanted}; at most {num_devices} is allowed, the size of the fleet"
            yield Fault(table, key, message)
    for name, share in (fleet["profiles"] or {}).items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
            yield Fault("fleet.profiles", name, f"got {share!r}; expected a share above 0")
    yield from _kind_faults(fleet, fleet["profiles"] or (DEFAULT_KIND,))
    T, late, leaving = num_experiences, fleet["late_share"], fleet["leaving_share"]
    if T is None or late is None or leaving is None:
        return
    for key, share in (("late_share", late), ("leaving_share", leaving)):
        if share > 0 and T < 2:
            yield Fault("fleet", key, f"got {share:g}; one experience has no later position")
    if late + leaving > 1 and T == 2:
        message = f"with late_share, more than all; of 2 positions a device has no third: {late:g}"
        yield Fault("fleet", "leaving_share", f"got {leaving:g}; {message}")


def _variant_faults(
    variants: Mapping[str, Mapping[str, Any]], fleet: Mapping[str, Any]
) -> Iterator[Fault]:
    if variants and any(part != 1 for part in (fleet["width"] or {}).values()):
        message = "widths are of one network, which devices with [model.variants] do not have"
        yield Fault("fleet", "width", f"{message}; allowed: a variant that is smaller")
    kinds = fleet["profiles"] or (DEFAULT_KIND,)
    whole = {name: _complete(VariantSpec, table) for name, table in variants.items()}
    if any(spec["share"] is None or spec["profile"] is None for spec in whole.values()):
        return
    taken: dict[str, str] = {}
    for name, spec in whole.items():
        table, share, profile = f"model.variants.{name}", spec["share"], spec["profile"]
        if bool(share) == bool(profile):
            message = "give one of share, above 0, and profile: which devices hold it"
            yield Fault(table, "share", message)
        elif profile and profile not in kinds:
            yield Fault(table, "profile", _no_profile(profile, kinds))
        elif profile and profile in taken:
            yield Fault(table, "profile", f"got {profile!r}, which {taken[profile]!r} has already")
        taken.setdefault(profile, name)
    if {bool(spec["profile"]) for spec in whole.values()} == {True, False}:
        message = "some go by a share and some by a profile; all have to go by the same"
        yield Fault("model", "variants", message)
    if (total := sum(spec["share"] for spec in whole.values())) > 1 + 1e-9:
        yield Fault("model", "variants", f"their shares sum to {total:g}; at most 1 is allowed")


def _no_profile(name: str, kinds: Iterable[str]) -> str:
    return f"{name!r} is no profile of the fleet{nearest(name, kinds)}; allowed: {', '.join(kinds)}"


def _kind_faults(fleet: Mapping[str, Any], kinds: Iterable[str]) -> Iterator[Fault]:
    for key in ("width", "runtime_args"):
        for name in fleet[key] or {}:
            if name not in kinds:
                yield Fault(f"fleet.{key}", name, _no_profile(name, kinds))
    for name, arguments in (fleet["runtime_args"] or {}).items():
        if not isinstance(arguments, Mapping):
            yield Fault("fleet.runtime_args", name, f"expected a table, got {arguments!r}")
    for name, part in (fleet["width"] or {}).items():
        if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
            message = f"got {part!r}; a number above 0 and at most 1 is expected"
            yield Fault("fleet.width", name, message)


def _client_faults(client: Mapping[str, Any]) -> Iterator[Fault]:
    train, parts, size = client["train"], client["accumulate"], client["batch_size"]
    if isinstance(train, str) and train not in _PARTS and not re.fullmatch(r"last:[1-9]\d*", train):
        close = nearest(train, (*_PARTS, "last:1"))
        allowed = ", ".join(_PARTS) + ", last:N with N from 1, or a list of names"
        yield Fault("client", "train", f"got {train!r}{close}; allowed: {allowed}")
    elif train == ():
        message = "got an empty list; name at least one layer or tensor"
        yield Fault("client", "train", message)
    if parts is not None and size is not None and parts > size:
        message = f"got {parts}; a batch of {size} has at most so many parts (batch_size)"
        yield Fault("client", "accumulate", message)


def _server_faults(server: Mapping[str, Any]) -> Iterator[Fault]:
    """Check what Flower takes as it is, and sends to the devices."""
    mu = (server["args"] or {}).get("proximal_mu", 0)
    is_own = ":" in (server["strategy"] or "")  # may mean anything by it
    if not is_own and (isinstance(mu, bool) or not isinstance(mu, int | float) or mu < 0):
        yield Fault("server.args", "proximal_mu", f"got {mu!r}; a number from 0 is expected")


def _domain_faults(stream: Mapping[str, Any]) -> Iterator[Fault]:
    kind, T, count = stream["kind"], stream["num_experiences"], stream["num_domains"]
    if kind != "domain-incremental":
        for key, default in _OF_DOMAINS.items():
            if stream[key] != default:
                message = f"got {stream[key]!r}; only a domain-incremental stream has domains"
                yield Fault("stream", key, message)
        return
    if count > T:
        message = f"got {count}; at most {T} is allowed, the experiences of the stream"
        yield Fault("stream", "num_domains", message)
    elif stream["drift"] == "recurring" and not 2 <= count < T:
        message = f"got {count}; domains come back where there are 2 to {T - 1} (drift: recurring)"
        yield Fault("stream", "num_domains", message)
    if stream["drift"] == "gradual":
        if stream["order"] == "per-device":
            message = "got 'gradual'; experiences in random order do not change gradually"
            yield Fault("stream", "drift", message)
        if stream["blur"] > 0:
            message = f"got {stream['blur']:g}; gradual drift has no boundaries to blur"
            yield Fault("stream", "blur", message)


def _arrival_faults(stream: Mapping[str, Any]) -> Iterator[Fault]:
    blur = stream["blur"]
    if blur > 0 and stream["kind"] == "new-instances":
        message = f"got {blur:g}; new instances are of one distribution, with nothing to blur"
        yield Fault("stream", "blur", message)
    elif blur > 0 and stream["num_experiences"] < 2:
        yield Fault("stream", "blur", f"got {blur:g}; one experience has no others to blur with")
    if blur == 0 and stream["blur_reach"] != "neighbours":
        yield Fault("stream", "blur_reach", f"got {stream['blur_reach']!r}; blur is 0")
    disjoint = stream["disjoint_share"]
    if disjoint > 0 and blur == 0:
        yield Fault("stream", "disjoint_share", f"got {disjoint:g}; blur is 0")
    elif disjoint > 0 and stream["kind"] == "domain-incremental":
        message = f"got {disjoint:g}; every domain has all classes"
        yield Fault("stream", "disjoint_share", message)
    if stream["online"] and stream["cumulative"]:
        message = "got true; what is seen once is not there later on (online is true too)"
        yield Fault("stream", "cumulative", message)


def _boundary_faults(stream: Mapping[str, Any]) -> Iterator[Fault]:
    if stream["boundaries"] == "told":
        if stream["detector_args"]:
            yield Fault("stream", "detector_args", "boundaries are told; nothing is detected")
    elif stream["cumulative"]:
        message = "got true; samples that come again hide a change (boundaries are detected)"
        yield Fault("stream", "cumulative", message)


def _given_faults(stream: Mapping[str, Any]) -> Iterator[Fault]:
    if stream["kind"] == "given" and stream["shuffle_classes"]:
        message = "got true; the data set says which experience each of its samples is of"
        yield Fault("stream", "shuffle_classes", message)


def _order_faults(stream: Mapping[str, Any]) -> Iterator[Fault]:
    shift, T = stream["max_shift"], stream["num_experiences"]
    if shift and stream["order"] != "staggered":
        yield Fault("stream", "max_shift", f"got {shift}; the order is {stream['order']!r}")
    elif shift >= T:
        message = f"got {shift}; at most {T - 1} is allowed, the last position"
        yield Fault("stream", "max_shift", message)
