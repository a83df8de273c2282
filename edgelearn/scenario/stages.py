"""Stages of compression as data, and the line of text that declares them.

A pipeline is a line of stages with `|` between them:

    train(5) | prune(0.9, epochs=2) | quantize(8, runtime="onnxruntime") | pack

Arguments are TOML values. The first may go without its name; the rest have defaults. What a stage
does is in `edgelearn.compress.pipeline`; here is only what may be written.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from edgelearn.errors import Fault, ScenarioError, nearest
from edgelearn.scenario.load import checked, toml_value
from edgelearn.scenario.spec import plain, rule, table

WEIGHT_BITS = (4, 8)
_OPTIMIZERS, _SCHEDULES, _SCOPES = ("adam", "sgd"), ("constant", "cosine"), ("global", "layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What all stages that train have in common."""

    epochs: int = rule("passes over the training samples", 1, minimum=0)
    steps: int = rule("steps in all, whatever the epochs; 0: by epochs", 0, minimum=0)
    batch_size: int = rule("samples per step", 64, minimum=1)
    optimizer: str = rule("optimizer", "adam", choices=_OPTIMIZERS)
    lr: float = rule("learning rate", 1e-3, above=0.0)
    schedule: str = rule("of the learning rate", "constant", choices=_SCHEDULES)
    momentum: float = rule("momentum of sgd", 0.0, minimum=0.0, maximum=0.999)
    weight_decay: float = rule("L2 penalty", 0.0, minimum=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Train(Tuned):
    """`train`: train the network on labels."""

    verb: ClassVar[str] = "train"
    main: ClassVar[str] = "epochs"
    epochs: int = rule("passes over the training samples", 10, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(Tuned):
    """`distill`: train it to answer like the network that the last `train` gave, or the given one.

    With `model` or `args` the pupil is a new, narrower network; else it is the present one, such
    as after `prune_channels`.
    """

    verb: ClassVar[str] = "distill"
    main: ClassVar[str] = "model"
    model: str = rule("name, module:factory or file.py:factory", "", plugins="edgelearn.models")
    args: Mapping[str, Any] = table("arguments of the factory")
    epochs: int = rule("passes over the training samples", 10, minimum=0)
    alpha: float = rule("weight of the teacher's answers", 0.5, minimum=0.0, maximum=1.0)
    temperature: float = rule("T of soft labels", 4.0, above=0.0)
    kind: str = rule("labels that the teacher gives", "soft", choices=("soft", "hard"))

    @property
    def makes_network(self) -> bool:
        """Whether the pupil is a new network."""
        return bool(self.model or self.args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune(Tuned):
    """`prune`: set the smallest weights to zero, and train the others on."""

    verb: ClassVar[str] = "prune"
    main: ClassVar[str] = "sparsity"
    sparsity: float = rule("part of the weights that is zero", 0.8, minimum=0.0, maximum=0.999)
    scope: str = rule("what weights compete with", "global", choices=_SCOPES)
    num_prunings: int = rule("prunings on the cubic schedule", 1, minimum=1)
    epochs: int = rule("passes over the training samples after each pruning", 3, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneChannels(Tuned):
    """`prune_channels`: take channels out of the network, and train what is left."""

    verb: ClassVar[str] = "prune_channels"
    main: ClassVar[str] = "ratio"
    ratio: float = rule("part of a layer's channels that goes", 0.5, minimum=0.0, maximum=0.999)
    round_to: int = rule("channels that stay are a multiple of this", 1, minimum=1)
    epochs: int = rule("passes over the training samples afterwards", 3, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(Tuned):
    """`quantize`: int8 weights and activations; with epochs, after quantization-aware training."""

    verb: ClassVar[str] = "quantize"
    main: ClassVar[str] = "bits"
    bits: int = rule("of a weight: 8 or 4", 8, minimum=4, maximum=8)
    runtime: str = rule("what executes it", "int8", plugins="edgelearn.runtimes")
    args: Mapping[str, Any] = table("arguments of the runtime")
    num_calibration: int = rule("training samples for ranges of activations", 256, minimum=1)
    epochs: int = rule("passes of quantization-aware training; 0: none", 0, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """`pack`: the integer weights in fewer bytes, by bitmask or gaps and an entropy coder."""

    verb: ClassVar[str] = "pack"
    main: ClassVar[str] = ""


Stage = Train | Distill | Prune | PruneChannels | Quantize | Pack
KINDS: Mapping[str, type[Stage]] = MappingProxyType(
    {kind.verb: kind for kind in (Train, Distill, Prune, PruneChannels, Quantize, Pack)}
)


def parse(text: str, *, source: str = "pipeline") -> tuple[Stage, ...]:
    """Return the stages that a line declares.

    Args:
        text: The line; see the module.
        source: Where it stands, for the error.

    Raises:
        ScenarioError: With all faults at once.

    Example:
        >>> [stage.verb for stage in parse("prune(0.9) | quantize | pack")]
        ['prune', 'quantize', 'pack']
        >>> parse("prune(0.9, epochs=2)")[0].sparsity
        0.9
    """
    stages, faults = _parsed(text)
    if faults:
        raise ScenarioError(source, faults)
    return tuple(stages)


def faults_of(text: str) -> list[Fault]:
    """Return all that is wrong with a line of stages."""
    return _parsed(text)[1]


def written(stages: tuple[Stage, ...]) -> str:
    """Return the line that declares stages; `parse` gives them back.

    Of what is default, only the first argument is written.

    Example:
        >>> written(parse("prune(0.9,epochs = 3)|quantize( 8 )"))
        'prune(0.9) | quantize(8)'
    """
    return " | ".join(map(_written, stages))


def _written(stage: Stage) -> str:
    given: list[str] = []
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if field.name == stage.main and value != "":
            given.insert(0, toml_value(plain(value)))
        elif value != _default(field):
            given.append(f"{field.name}={toml_value(plain(value))}")
    return f"{stage.verb}({', '.join(given)})" if given else stage.verb


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return {}


def _parsed(text: str) -> tuple[list[Stage], list[Fault]]:
    stages: list[Stage] = []
    faults: list[Fault] = []
    for place, part in enumerate(_split(text, "|"), start=1):
        match = re.fullmatch(r"\s*([A-Za-z_][A-Za-z0-9_-]*)\s*(?:\((.*)\))?\s*", part, re.DOTALL)
        if match is None:
            message = f"got {part.strip()!r}; expected a stage, such as prune(0.9, epochs=2)"
            faults.append(Fault(f"stage {place}", "syntax", message))
            continue
        verb = match[1].replace("-", "_")
        if verb not in KINDS:
            message = f"unknown stage {match[1]!r}{nearest(verb, KINDS)}; allowed: "
            faults.append(Fault(f"stage {place}", "stage", message + ", ".join(KINDS)))
            continue
        kind, where = KINDS[verb], f"stage {place}, {verb}"
        raw = _arguments(match[2] or "", kind, where, faults)
        if raw is None:
            continue
        stage = checked(kind, raw, where, faults)
        if isinstance(stage, Quantize) and stage.bits not in WEIGHT_BITS:
            message = f"got {stage.bits}; allowed: {', '.join(map(str, WEIGHT_BITS))}"
            faults.append(Fault(where, "bits", message))
        elif isinstance(stage, Quantize) and (
            stage.runtime == "float" or stage.args.get("weight_bits") == 32
        ):
            faults.append(Fault(where, "runtime", "got one that serves the float network"))
        elif isinstance(stage, Quantize) and stage.args.get("weight_bits") in range(
            1, min(stage.bits, 7)
        ):
            message = f"got {stage.args['weight_bits']}; the file would hold {stage.bits}-bit codes"
            faults.append(Fault(where, "args.weight_bits", f"{message} that nothing answers with"))
        elif stage is not None:
            stages.append(stage)
    if not faults:
        faults += _order_faults(stages)
    return stages, faults


def _arguments(
    text: str, kind: type[Stage], where: str, faults: list[Fault]
) -> dict[str, Any] | None:
    """Read the arguments of a stage; None where they can't be read."""
    if not text.strip():
        return {}
    first = _split(text, ",")[0]
    if len(_split(first, "=")) == 1:
        if not kind.main:
            faults.append(Fault(where, "arguments", f"got {first.strip()}; it takes none"))
            return None
        text = f"{kind.main} = {text}"
    try:
        found: dict[str, Any] = tomllib.loads(f"given = {{{text}}}")["given"]
    except tomllib.TOMLDecodeError as error:
        message = f"got {text.strip()!r}; expected name=value, ... with TOML values: {error}"
        faults.append(Fault(where, "arguments", message))
        return None
    return found


def _split(text: str, separator: str) -> list[str]:
    """Split a text where a separator is in no quotes and no brackets."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == separator and depth == 0:
            parts.append("")
            continue
        parts[-1] += sign
    return parts


def _order_faults(stages: list[Stage]) -> Iterator[Fault]:
    """Check what stages have to say to each other."""
    pruned = quantized = packed = 0  # the stage that did it
    for place, stage in enumerate(stages, start=1):
        where = f"stage {place}, {stage.verb}"
        if packed:
            yield Fault(where, "order", f"stage {packed} is pack, which is the last")
        elif quantized and not isinstance(stage, Pack):
            message = f"stage {quantized} has quantized the network; only pack may follow"
            yield Fault(where, "order", message)
        makes = isinstance(stage, PruneChannels) or (
            isinstance(stage, Distill) and stage.makes_network
        )
        if pruned and makes:
            message = f"stage {pruned} has pruned weights of another network; put it behind"
            yield Fault(where, "order", message)
        if isinstance(stage, Pack):
            if not quantized:
                message = "it stores integer weights; put quantize before it"
                yield Fault(where, "order", message)
            packed = packed or place
        quantized = quantized or place * isinstance(stage, Quantize)
        pruned = pruned or place * isinstance(stage, Prune)
