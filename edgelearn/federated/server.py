"""Server strategies: Flower's own, by name, or anybody's `flwr.serverapp.strategy.Strategy`."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgelearn.federated._flwr_compat  # noqa: F401 - before flwr
from edgelearn import plugins
from edgelearn.errors import Fault, ScenarioError, StateError, nearest
from edgelearn.federated.heterofl import HeteroFL
from edgelearn.params import Layout
from edgelearn.scenario.spec import Scenario

from flwr.app import Array, ArrayRecord  # isort: skip
from flwr.serverapp import strategy as flower  # isort: skip
from flwr.serverapp.strategy import Strategy  # isort: skip

# Not strategies that average tensors of one model: they wrap another one, or aggregate trees.
_NOT_BY_NAME = ("DifferentialPrivacy", "FedXgb", "Result", "Strategy")

# Beside Flower's, those that it lacks.
_OWN: dict[str, type[Strategy]] = {"HeteroFL": HeteroFL}

_STEPPING = (
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedAvgM,
    flower.FedYogi,
    flower.QFedAvg,
)


def strategy_names() -> tuple[str, ...]:
    """Return the names of the strategies that a scenario can name: Flower's, and HeteroFL."""
    return tuple(n for n in sorted([*flower.__all__, *_OWN]) if not n.startswith(_NOT_BY_NAME))


def make_server_strategy(scenario: Scenario) -> Strategy:
    """Build the server strategy of a scenario.

    What the scenario knows goes to the strategy's own arguments (`fraction_train`,
    `min_train_nodes`, `client_learning_rate`, ...) where its constructor has them and the
    scenario's `[server.args]` do not set them.

    Raises:
        ScenarioError: If there is no such strategy, or it does not take the arguments.
        PluginError: If a reference leads nowhere.
    """
    reference, arguments = scenario.server.strategy, dict(scenario.server.args)
    if ":" in reference:
        kind = plugins.resolve(reference, plugins.SERVER_STRATEGIES)
    elif reference in strategy_names():
        kind = _OWN.get(reference) or getattr(flower, reference)
    else:
        message = (
            f"unknown name {reference!r}{nearest(reference, strategy_names())}; allowed: "
            f"{', '.join(strategy_names())}, module:Class or path/to/file.py:Class"
        )
        raise ScenarioError(scenario.name, [Fault("server", "strategy", message)])
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        message = f"{reference} is not a subclass of flwr.serverapp.strategy.Strategy"
        raise ScenarioError(scenario.name, [Fault("server", "strategy", message)])
    if faults := plugins.argument_faults(kind, arguments, "server.args"):
        raise ScenarioError(scenario.name, faults)
    parameters = inspect.signature(kind).parameters
    for name, value in _known_arguments(scenario).items():
        if name in parameters:
            arguments.setdefault(name, value)
    try:
        strategy: Strategy = kind(**arguments)
    except (TypeError, ValueError) as error:
        fault = Fault("server", "args", str(error))
        raise ScenarioError(scenario.name, [fault]) from error
    _refuse_parts(strategy, scenario)
    return strategy


def _refuse_parts(strategy: Strategy, scenario: Scenario) -> None:
    """Refuse devices that hold parts of the model to strategies that take whole ones."""
    if any(width < 1 for width in scenario.fleet.width.values()) and not isinstance(
        strategy, HeteroFL
    ):
        message = (
            f"{type(strategy).__name__} aggregates whole models, and some devices hold a part "
            "(fleet.width); allowed: HeteroFL, or a class derived from it"
        )
        raise ScenarioError(scenario.name, [Fault("server", "strategy", message)])


def refuse_to_step(strategy: Strategy, layout: Layout, scenario: Scenario) -> None:
    """Refuse tensors beside the network to server strategies that do more than average.

    What a client strategy shares (control variates, Fisher information) is a sum that the server's
    average adds up. Momentum, adaptive step sizes and q-fair weights would scale each of its
    numbers, which means nothing. Strategies that choose or trim replies are let through.

    Raises:
        ScenarioError: If the layout has such tensors and the strategy is one of these.
    """
    if layout.num_shared_tensors and isinstance(strategy, _STEPPING):
        message = (
            f"{type(strategy).__name__} makes steps of its own from the average, which changes "
            f"what {scenario.client.strategy!r} sends beside the network; allowed: FedAvg, "
            "FedProx, and those that choose among replies (FedMedian, FedTrimmedAvg, Krum, ...)"
        )
        raise ScenarioError(scenario.name, [Fault("server", "strategy", message)])


def _known_arguments(scenario: Scenario) -> dict[str, Any]:
    fleet, asked = scenario.fleet, scenario.evaluate.num_devices
    return {
        "fraction_train": fleet.cohort / fleet.num_devices,
        "min_train_nodes": fleet.cohort,
        "min_available_nodes": fleet.cohort,
        "fraction_evaluate": asked / fleet.num_devices if asked else 1.0,
        "min_evaluate_nodes": asked or 1,
        "train_loss_key": "loss",
        "client_learning_rate": scenario.client.lr,
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the process-wide generators that Flower's strategies draw from; restore them after."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Seed Python's generator alone, as `seeded` does; it samples the cohort."""
    python = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)


# -- what a strategy remembers between rounds ------------------------------------------------------

Arrays = dict[str, NDArray[Any]]


def snapshot(strategy: Strategy) -> tuple[Arrays, dict[str, Any]]:
    """Return the state of a strategy as arrays and plain values, for the checkpoint.

    All attributes count that are numbers, texts, arrays, ArrayRecords, or lists and string-keyed
    dictionaries of these; functions and classes are configuration. A strategy with other state can
    define `state_dict() -> (arrays, values)` and `load_state_dict(arrays, values)`.

    Raises:
        StateError: If an attribute holds something else.
    """
    if hasattr(strategy, "state_dict"):
        arrays, values = strategy.state_dict()
        return dict(arrays), dict(values)
    arrays = {}
    values = {
        name: _pack(value, name, arrays, type(strategy).__name__)
        for name, value in vars(strategy).items()
        if not callable(value)
    }
    return arrays, values


def restore(strategy: Strategy, arrays: Arrays, values: dict[str, Any]) -> None:
    """Give a freshly built strategy the state of `snapshot`."""
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(arrays, values)
        return
    for name, value in values.items():
        setattr(strategy, name, _unpack(value, arrays))


def _pack(value: Any, path: str, arrays: Arrays, owner: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _pack(value.item(), path, arrays, owner)
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {"array": path}
    if isinstance(value, ArrayRecord):
        named = {k: array.numpy() for k, array in value.items()}
        return {"record": _pack(named, path, arrays, owner)["dict"]}
    if isinstance(value, list | tuple):
        items = [_pack(v, f"{path}/{i}", arrays, owner) for i, v in enumerate(value)]
        return {"list": items} if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _pack(v, f"{path}/{k}", arrays, owner) for k, v in value.items()}}
    raise StateError(
        f"the server strategy {owner} keeps a {type(value).__name__} in {path!r}, which a "
        "checkpoint can't hold; define state_dict() and load_state_dict(arrays, values)"
    )


def _unpack(value: Any, arrays: Arrays) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "array":
        return arrays[inner]
    if kind == "record":
        return ArrayRecord({k: Array(_unpack(v, arrays)) for k, v in inner.items()})
    if kind == "dict":
        return {k: _unpack(v, arrays) for k, v in inner.items()}
    items = [_unpack(v, arrays) for v in inner]
    return items if kind == "list" else tuple(items)
