"""Runtime -> Prepared -> Predictor: what every way of serving a model offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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
