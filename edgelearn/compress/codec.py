"""Codec: a pair of encode (on the device) and decode (on the server), with its error stated.

A codec makes an update smaller before it crosses the wire. What it makes, a message, is a fixed set
of tensors that it declares: their shapes and dtypes are what the egress guard admits, and their
bytes are what a device is billed for, known before a run unless one has but a bound.

Codecs are pure: what a device has to remember of what was not sent (the residual of error feedback)
is kept by the device itself, beside the client strategy's memory, and handed in with the next
update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgelearn import plugins
from edgelearn.errors import DivergenceError, Fault, PluginError, ScenarioError, StateError
from edgelearn.params import Layout
from edgelearn.plugins import ENTROPY
from edgelearn.seeds import torch_generator

NONE = plugins.NO_CODEC


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a message.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        is_bound: Whether it is of one dimension, and its length at most that of the shape; else
            the shape is exact.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_bound: bool = False

    def __str__(self) -> str:
        return f"{'at most ' if self.is_bound else ''}{tuple(self.shape)} {self.dtype}"

    def admits(self, value: Tensor) -> bool:
        """Whether a tensor is of the declared shape and dtype."""
        shape = tuple(value.shape)
        fits = len(shape) == 1 and shape <= self.shape if self.is_bound else shape == self.shape
        return fits and value.dtype == self.dtype


class Codec(ABC):
    """Encodes updates on devices and decodes them on the server.

    Methods are pure functions: they change none of their arguments, keep nothing on `self`, and
    draw from the given generator alone.

    Attributes:
        is_unbiased: Whether decode(encode(x)) is x in the mean over the generator.
        keeps_residual: Whether a device keeps what was not sent and adds it to its next update:
            error feedback (Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
            Compression Schemes", 2019, arXiv:1901.09847, algorithm 2).
    """

    @property
    def is_unbiased(self) -> bool:
        """Whether the mean is exact; see above."""
        return False

    @property
    def keeps_residual(self) -> bool:
        """Whether a device keeps what was not sent; see above."""
        return False

    @abstractmethod
    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """Return what a message consists of, by name; the same for every update.

        No size that depends on the update, if possible: it tells something about the update.

        Args:
            layout: Of the parameters [P].
        """

    @abstractmethod
    def encode(
        self, layout: Layout, update: Tensor, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return an update as a message.

        Args:
            layout: Of the parameters.
            update: local - global [P], float32, finite.
            generator: Source of randomness; seeded with the run's seed, round and device.
        """

    @abstractmethod
    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
        """Return the update [P], float32, that a message stands for.

        It comes from a device, so what its values say is not to be trusted: raise for what
        `encode` can't have made.

        Args:
            layout: Of the parameters.
            message: Tensors as declared by `pieces`.
        """

    @abstractmethod
    def error(self, layout: Layout, update: Tensor) -> Tensor:
        """Return the largest |decode(encode(update)) - update| [P] that there can be."""


def make_codec(reference: str, arguments: Mapping[str, Any]) -> Codec | None:
    """Build a codec by name, `module:Class` or `file.py:Class`; None for "none".

    "NAME+lzma" compresses the messages of a codec.

    Args:
        reference: The name.
        arguments: What the codec is built with.

    Raises:
        PluginError: If the reference leads nowhere.
        ScenarioError: If it is not a codec, or does not take the arguments.
    """
    if reference == NONE:
        if arguments:
            message = f"got {', '.join(arguments)}; updates are sent as they are (codec: none)"
            raise ScenarioError(reference, [Fault("wire", "args", message)])
        return None
    name, is_compressed = reference.removesuffix(ENTROPY), reference.endswith(ENTROPY)
    if is_compressed and name == NONE:
        message = f"got {reference!r}; there is nothing to compress: name a codec (int4{ENTROPY})"
        raise ScenarioError(reference, [Fault("wire", "codec", message)])
    found = plugins.resolve(name, plugins.CODECS)
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise PluginError(f"{reference!r} is {found!r}, not a Codec")
    if faults := plugins.argument_faults(found, arguments, "wire.args"):
        raise ScenarioError(reference, faults)
    try:
        codec: Codec = found(**arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError(reference, [Fault("wire", "args", str(error))]) from error
    if not is_compressed:
        return codec
    from edgelearn.compress.entropy import EntropyCoded  # it is a codec itself

    return EntropyCoded(codec)


def encoded(
    codec: Codec, layout: Layout, update: Tensor, *, seed: int, server_round: int, device: int
) -> dict[str, Tensor]:
    """Encode an update [P]; the same one gives the same message in every process.

    Raises:
        DivergenceError: If a number is not finite: it would stay in a residual for ever.
    """
    if not bool(torch.isfinite(update).all()):
        raise DivergenceError(
            f"device {device}, round {server_round}: its update is not finite, so it is not encoded"
        )
    generator = torch_generator(seed, "wire", server_round, device)
    return dict(codec.encode(layout, update, generator))


def decoded(codec: Codec, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:
    """Return the update [P] that a device's message stands for.

    Raises:
        StateError: If it stands for none. Like all that may leave a device, it names what was
            declared and not what was found.
    """
    name = type(codec).__name__
    declared = codec.pieces(layout)
    if found := [key for key in declared if key not in message]:
        raise StateError(f"the message has no {found[0]!r}, which {name} declares")
    if len(message) > len(declared):
        raise StateError(f"the message has tensors that {name} does not declare")
    for key, piece in declared.items():
        if not piece.admits(message[key]):
            raise StateError(f"{key!r} of the message is not {piece}, as {name} declares")
    try:
        update = codec.decode(layout, message)
    except Exception as error:  # whatever a codec makes of values that it did not encode
        raise StateError(f"{name} can't decode the message") from error
    if tuple(update.shape) != (layout.size,) or update.dtype != torch.float32:
        raise StateError(f"{name}.decode did not return {(layout.size,)} {torch.float32}")
    return update
