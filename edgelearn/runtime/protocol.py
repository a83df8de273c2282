"""Runtime -> Prepared -> Predictor: what every way of serving a model offers.

A runtime that derives its prepared models from `GroupPrepared` can also answer for several devices
in one pass, which makes a simulated fleet's evaluation cheap. Nothing else needs it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from edgelearn import plugins
from edgelearn.errors import Fault, ScenarioError
from edgelearn.params import FlatModel


class Predictor(Protocol):
    """A model in service."""

    @property
    def model_bytes(self) -> int:
        """Bytes of all that the device keeps to answer."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [B, C] for normalized inputs [B, ...]."""


class Prepared(Protocol):
    """Parameters made ready once, for any number of devices."""

    def calibrated(self, calibration: Tensor) -> Predictor:
        """Return the predictor of one device.

        Args:
            calibration: The device's own inputs [n, ...]; with none, ranges are taken from each
                input when it is answered.
        """


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of several devices, one under another.

    Attributes:
        x: Normalized inputs [n, ...].
        device: Whose each of them is [n], int64, counted within the group.
    """

    x: Tensor
    device: Tensor


@dataclass(frozen=True, slots=True)
class Observed:
    """Ranges of a network's activations on some inputs.

    Attributes:
        shape: Of one input.
        ranges: Lowest and highest value, by what a runtime calls the place; those of float
            parameters near the ones they were observed with can be served with them, too.
    """

    shape: tuple[int, ...]
    ranges: Mapping[str, tuple[Tensor, Tensor]]


class RangedPrepared(ABC):
    """Parameters made ready, for ranges that may have been observed before.

    `calibrated(x)` is `within(observed(x))`, where x has rows.
    """

    @abstractmethod
    def observed(self, x: Tensor) -> Observed:
        """Return the ranges on inputs [n, ...], n >= 1, by the float network."""

    @abstractmethod
    def within(self, observed: Observed) -> Predictor:
        """Return the predictor with these ranges."""


class GroupPredictor(Protocol):
    """The models of a group of devices in service."""

    @property
    def model_bytes(self) -> int:
        """Bytes of all that one device keeps to answer."""

    def __call__(self, rows: Rows) -> Tensor:
        """Return logits [n, C], each row's from the model of its device."""


class GroupPrepared(ABC):
    """Parameters made ready, which can be calibrated for a group of devices at once.

    Only networks that treat each row of a batch on its own are asked in groups (see
    `edgelearn.runtime.rows`).

    Attributes:
        serves_float: Whether the logits are those of the float model, so that whoever has these
            need not ask again.
    """

    serves_float: ClassVar[bool] = False

    @abstractmethod
    def calibrated(self, calibration: Tensor) -> Predictor:
        """Return the predictor of one device, as `Prepared` does."""

    @abstractmethod
    def calibrated_group(self, calibration: Iterable[Rows], *, num_devices: int) -> GroupPredictor:
        """Return the predictor of a group, each device calibrated on its own rows.

        Args:
            calibration: The devices' own inputs, in parts; a device may have none.
            num_devices: Devices in the group, D; `Rows.device` is in [0, D).
        """


class RangedGroupPrepared(GroupPrepared, RangedPrepared):
    """Parameters made ready for a group of devices, with ranges that may have been observed before.

    `calibrated_group(x)` is `within_group(observed_group(x))`, where some device has rows.
    """

    @abstractmethod
    def observed_group(self, calibration: Iterable[Rows], *, num_devices: int) -> Observed:
        """Return the ranges of each device in one pass, by the float network.

        Args:
            calibration: The devices' own inputs, in parts, at least one; a device may have none.
            num_devices: Devices in the group, D.

        Returns:
            Ranges [D] instead of single ones; lowest is above highest for a device without rows.
        """

    @abstractmethod
    def within_group(self, observed: Observed) -> GroupPredictor:
        """Return the predictor of a group with ranges [D], of all that `observed_group` names.

        One whose lowest value is above its highest is unknown: it is taken from each input.
        """


class Runtime(Protocol):
    """A way of serving a model."""

    def prepare(self, model: FlatModel, params: Tensor) -> Prepared:
        """Make parameters [P] ready for service."""


def make_runtime(reference: str, arguments: Mapping[str, Any]) -> Runtime:
    """Build a runtime by name, `module:Class` or `file.py:Class`.

    Raises:
        PluginError: If the reference leads nowhere.
        ScenarioError: If it does not take the arguments.
    """
    found = plugins.resolve(reference, plugins.RUNTIMES)
    if faults := plugins.argument_faults(found, arguments, "runtime.args"):
        raise ScenarioError(reference, faults)
    try:
        runtime: Runtime = found(**arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError(reference, [Fault("runtime", "args", str(error))]) from error
    return runtime
