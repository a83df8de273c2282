"""The scenario: what is learned, who sees which part of it, and when.

Frozen data, read from TOML. Each field says what it allows; `edgelearn.scenario.load` checks a
file against these rules and reports every fault at once.
"""

from __future__ import annotations

import copyreg
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelearn.plugins import AVALANCHE, CODECS, NO_CODEC

PARTITIONS = ("iid", "dirichlet", "shards", "user")
STREAMS = (
    "class-incremental",
    "task-incremental",
    "domain-incremental",
    "new-instances",
    "given",
)
ORDERS = ("shared", "per-device", "staggered")
TRANSFORMS = ("permute", "rotate", "relabel")
DRIFTS = ("sudden", "gradual", "recurring")
BOUNDARIES = ("told", "detected")
DETECTORS = ("page-hinkley", "adwin")
REACHES = ("neighbours", "all")
OPTIMIZERS = ("sgd", "adam", "adamw")
ENGINES = ("auto", "reference", "pool", "batched", "native", "ray")
RECALIBRATIONS = ("always", "on-drift", "tracked")
FEDERATIONS = ("auto", "faithful", "fused")
ALL = "all"
# Keys that a digest has only where they are not as they were before they existed, by table.
_LATER: Mapping[str, Mapping[str, Any]] = {
    "client": {"train": ALL, "accumulate": 1, "checkpoint": False},
    "data": {"public": 0},
    "fleet": {"runtime_args": {}, "width": {}},
    "model": {"variants": {}},
    "runtime": {"recalibrate": "always"},
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field allows.

    Attributes:
        help: One line for people.
        choices: Allowed values, if they are few.
        minimum: Smallest allowed number (or number of items).
        maximum: Largest allowed number.
        above: The number must be larger than this.
        plugins: Entry-point group in which plain names are looked up.
    """

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    plugins: str | None = None


def _rule(help: str, default: Any = dataclasses.MISSING, **limits: Any) -> Any:  # noqa: A002
    return field(default=default, metadata={"rule": Rule(help, **limits)})


def _table(help: str) -> Any:  # noqa: A002
    return field(
        default_factory=lambda: MappingProxyType({}), metadata={"rule": Rule(help)}, hash=False
    )


rule, table = _rule, _table  # for other dataclasses that are checked as scenarios are


def _read_only(values: dict[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(values)


def _reduce(proxy: MappingProxyType[str, Any]) -> tuple[Any, ...]:
    return _read_only, (dict(proxy),)


# Python can't pickle a read-only mapping by itself, and scenarios travel to worker processes.
copyreg.pickle(MappingProxyType, _reduce)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """`[data]`: the samples."""

    dataset: str = _rule("name, module:function or file.py:function", plugins="edgelearn.datasets")
    root: str = _rule("folder to look in before the usual places", default="")
    download: bool = _rule("fetch the data set if it is nowhere on this machine", default=False)
    max_train: int = _rule("use at most this many training samples; 0 is all", 0, minimum=0)
    max_test: int = _rule("use at most this many test samples; 0 is all", 0, minimum=0)
    public: int = _rule("training samples that all devices have, and none as its own", 0, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSpec:
    """`[model.variants.NAME]`: another network, which some of the devices hold."""

    name: str = _rule("name, module:factory or file.py:factory", plugins="edgelearn.models")
    args: Mapping[str, Any] = _table("arguments of the factory")
    share: float = _rule("share of the fleet that holds it", 0.0, minimum=0.0, maximum=1.0)
    profile: str = _rule("profile of the devices that hold it, in place of a share", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """`[model]`: the network, and those that other devices hold."""

    name: str = _rule("name, module:factory or file.py:factory", plugins="edgelearn.models")
    args: Mapping[str, Any] = _table("arguments of the factory")
    variants: Mapping[str, VariantSpec] = _table("other networks by name")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """`[fleet]`: the devices."""

    num_devices: int = _rule("devices in the fleet", minimum=1, maximum=10_000_000)
    cohort: int = _rule("devices chosen for a round", minimum=1)
    profiles: Mapping[str, float] = _table("device profile -> its share of the fleet")
    width: Mapping[str, float] = _table("device profile -> part of each hidden layer that it holds")
    runtime_args: Mapping[str, Any] = _table("device profile -> arguments of its runtime, a table")
    deadline_s: float = _rule(
        "virtual seconds after which a reply is late; 0 is none", 0.0, minimum=0.0
    )
    late_share: float = _rule(
        "share of devices that join at a random later position", 0.0, minimum=0.0, maximum=1.0
    )
    leaving_share: float = _rule(
        "share of devices that leave at a random position", 0.0, minimum=0.0, maximum=1.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSpec:
    """`[partition]`: who holds which samples."""

    kind: str = _rule("how samples are dealt out", "iid", choices=PARTITIONS)
    alpha: float = _rule("Dirichlet concentration; small is skewed", 0.5, above=0.0)
    shards_per_device: int = _rule("label-sorted shards that each device gets", 2, minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """`[stream]`: when a device sees what."""

    kind: str = _rule("what changes from one experience to the next", choices=STREAMS)
    num_experiences: int = _rule("experiences in the stream", minimum=1, maximum=1000)
    rounds_per_experience: int = _rule("rounds that an experience lasts", minimum=1)
    order: str = _rule("the same order of experiences on all devices?", "shared", choices=ORDERS)
    max_shift: int = _rule(
        "staggered: most positions that a device is ahead of device 0; 0 is all", 0, minimum=0
    )
    shuffle_classes: bool = _rule("assign classes to experiences at random", default=False)
    transform: str = _rule("what makes a domain", "permute", choices=TRANSFORMS)
    num_domains: int = _rule("domains; 0 is one for each experience", 0, minimum=0)
    drift: str = _rule("how one domain follows the other", "sudden", choices=DRIFTS)
    blur: float = _rule(
        "share of an experience's samples that arrive with others", 0.0, minimum=0.0, maximum=1.0
    )
    blur_reach: str = _rule("which others", "neighbours", choices=REACHES)
    disjoint_share: float = _rule(
        "share of the classes that do not blur", 0.0, minimum=0.0, maximum=1.0
    )
    cumulative: bool = _rule("does each experience hold all earlier ones too?", default=False)
    online: bool = _rule("does each round bring its own part of an experience?", default=False)
    boundaries: str = _rule("does a device know when data change?", "told", choices=BOUNDARIES)
    detector: str = _rule("what it finds changes with, untold", "page-hinkley", choices=DETECTORS)
    detector_args: Mapping[str, Any] = _table("arguments of the detector")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSpec:
    """`[labels]`: what devices are told of training samples; test labels are the true ones."""

    noise: float = _rule(
        "share of the labels that are another class", 0.0, minimum=0.0, maximum=1.0
    )
    missing: float = _rule("share of the samples without a label", 0.0, minimum=0.0, maximum=1.0)
    per_class: int = _rule(
        "most labelled samples of a class and experience on a device; 0 is all", 0, minimum=0
    )
    delay: int = _rule("positions by which labels come after their samples", 0, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSpec:
    """`[client]`: how a device learns."""

    strategy: str = _rule(
        "name, module:Class or file.py:Class", plugins="edgelearn.client_strategies"
    )
    args: Mapping[str, Any] = _table("arguments of the client strategy")
    epochs: int = _rule("passes over the device's data in a round", 1, minimum=1)
    steps: int = _rule("steps in a round, whatever the epochs; 0: by epochs", 0, minimum=0)
    batch_size: int = _rule("samples per step", 10, minimum=1)
    optimizer: str = _rule("local optimizer", "sgd", choices=OPTIMIZERS)
    lr: float = _rule("local learning rate", above=0.0)
    momentum: float = _rule("momentum of sgd", 0.0, minimum=0.0, maximum=1.0)
    weight_decay: float = _rule("L2 penalty", 0.0, minimum=0.0)
    train: str | tuple[str, ...] = _rule(
        'parameters that take steps: "all", "last:N", "bias", "norm" or a list of names', ALL
    )
    accumulate: int = _rule("parts of a batch that pass one after the other", 1, minimum=1)
    checkpoint: bool = _rule("compute activations again instead of keeping them?", default=False)

    @property
    def saves_memory(self) -> bool:
        """Whether a step is taken in less memory than it would by itself."""
        return self.train != ALL or self.accumulate > 1 or self.checkpoint

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is the gradient times the learning rate."""
        return self.optimizer == "sgd" and self.momentum == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """`[server]`: how updates are combined."""

    strategy: str = _rule(
        "a strategy of Flower, module:Class or file.py:Class", "FedAvg", plugins="flower"
    )
    args: Mapping[str, Any] = _table("arguments of the server strategy")
    max_update_norm: float = _rule(
        "reject an update whose L2 norm exceeds this many times that of the global parameters",
        100.0,
        above=0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSpec:
    """`[wire]`: how updates travel to the server."""

    codec: str = _rule(
        "name, module:Class or file.py:Class, or with +lzma behind it", NO_CODEC, plugins=CODECS
    )
    args: Mapping[str, Any] = _table("arguments of the codec")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSpec:
    """`[runtime]`: the model that a device answers with."""

    name: str = _rule("name, module:Class or file.py:Class", "int8", plugins="edgelearn.runtimes")
    args: Mapping[str, Any] = _table("arguments of the runtime")
    num_calibration: int = _rule("own samples for calibration", 64, minimum=1)
    recalibrate: str = _rule(
        "when are ranges observed on all of these?", "always", choices=RECALIBRATIONS
    )

    @property
    def keeps_ranges(self) -> bool:
        """Whether a device keeps ranges from one model to the next."""
        return self.recalibrate != "always"

    @property
    def tracks_ranges(self) -> bool:
        """Whether it widens them by what it sees after training."""
        return self.recalibrate == "tracked"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSpec:
    """`[evaluate]`: what is measured, and how often."""

    every_rounds: int = _rule("rounds between evaluations", 1, minimum=1)
    num_devices: int = _rule("devices asked; 0 is the whole fleet", 0, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressSpec:
    """`[compress]`: what `edgelearn compress` makes of the final global model of a run."""

    pipeline: str = _rule("stages with | between them, such as prune(0.9) | quantize", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that defines a run but the code: frozen, comparable, with a digest."""

    name: str = _rule("short name")
    title: str = _rule("one line for people", "")
    seed: int = _rule("seed of everything random", 0, minimum=0)
    data: DataSpec
    model: ModelSpec
    fleet: FleetSpec
    partition: PartitionSpec = field(default_factory=PartitionSpec)
    stream: StreamSpec
    labels: LabelSpec = field(default_factory=LabelSpec)
    client: ClientSpec
    server: ServerSpec = field(default_factory=ServerSpec)
    wire: WireSpec = field(default_factory=WireSpec)
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    compress: CompressSpec = field(default_factory=CompressSpec)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.stream.num_experiences * self.stream.rounds_per_experience

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, complete with defaults, that `load` accepts."""
        tables: dict[str, Any] = plain(self)
        return tables

    @property
    def digest(self) -> str:
        """Fingerprint of all that decides the result; devices refuse a server with another one.

        Where data lies on a machine does not count, and of a plug-in file its content does, not
        its path.
        """
        values = self.as_dict()
        for key in ("root", "download"):
            del values["data"][key]
        if self.compress == CompressSpec():  # as before there was such a table
            del values["compress"]
        for table, later in _LATER.items():
            for key, default in later.items():
                if values[table][key] == default:
                    del values[table][key]
        text = json.dumps(_portable(values), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """Return a value of a scenario as what JSON and TOML know."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _portable(value: Any) -> Any:
    """Replace the paths of plug-ins and stored networks by fingerprints of what is in them."""
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if isinstance(value, str) and ".py:" in value:
        place, _, name = value.removeprefix(AVALANCHE).rpartition(":")
        if Path(place).is_file():
            return f"{_fingerprint(Path(place))}:{name}"
    if isinstance(value, str) and value.endswith(".safetensors"):
        file = Path(value).expanduser()
        return _fingerprint(file) if file.is_file() else value
    return value


def _fingerprint(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
