"""The Flower ClientApp: how a device answers edgelearn's loop, or any Flower strategy.

A SuperNode starts a fresh process for every message, so everything that costs time to import is
imported in the handlers. State lives in the device's own folder; Flower's `Context.state` is not
used, since Flower keeps it in memory only.

Configuration, by whom it is given:

- run (`flwr run -c`): `scenario`, a name or path that the device itself can resolve; `overrides`,
  a JSON object such as {"client.lr": 0.1}; `state-dir`, with one folder per device below it;
- node (`flower-supernode --node-config`): `partition-id`, the index of the device; `state-dir`,
  its own folder, which goes before that of the run.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgelearn.federated._flwr_compat  # noqa: F401 - before flwr
from edgelearn.errors import RunError

from flwr.app import ConfigRecord, Context, Message  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip

if TYPE_CHECKING:
    from edgelearn.device.learners import FleetLearners
    from edgelearn.device.resident import ResidentDevice
    from edgelearn.scenario.spec import Scenario
    from edgelearn.scenario.world import World

_log = logging.getLogger(__name__)


def client_app() -> ClientApp:
    """Make the app that runs on a device. Flower wants it as a plain `app = ...` in a module."""
    app = ClientApp()
    app.train()(_guarded(_train))
    app.evaluate()(_guarded(_evaluate))
    app.query("consolidate")(_guarded(_consolidate))
    app.query("hello")(_guarded(_hello))
    return app


def scenario_from(run_config: Mapping[str, Any]) -> Scenario:
    """Load the scenario that a run's configuration names.

    Raises:
        ScenarioError: If it has faults.
        RunError: If none is named, or the overrides are not a JSON object.
    """
    from edgelearn.scenario.load import load

    source = run_config.get("scenario")
    if not isinstance(source, str) or not source:
        raise RunError(
            "the run's configuration names no scenario; give a name or path: "
            "flwr run -c 'scenario=\"split-digits\"'"
        )
    text = run_config.get("overrides") or "{}"
    try:
        overrides = json.loads(str(text))
    except ValueError as error:
        raise RunError(f"overrides is not JSON: {error}: {text!r}") from error
    if not isinstance(overrides, dict):
        raise RunError(f'overrides is {text!r}; expected an object such as {{"client.lr": 0.1}}')
    return load(source, overrides)


def device_of(context: Context) -> int:
    """Return the index of the device that a node is.

    Raises:
        RunError: If the node's configuration does not say.
    """
    device = context.node_config.get("partition-id")
    if type(device) is not int or device < 0:
        found = "missing" if device is None else repr(device)
        raise RunError(
            f"partition-id is {found} in the node's configuration; expected the index of the "
            "device, from 0: flower-supernode --node-config 'partition-id=0 ...'"
        )
    return device


def _folder(context: Context, device: int) -> Path:
    own, common = context.node_config.get("state-dir"), context.run_config.get("state-dir")
    for given, folder in ((own, str(own)), (common, f"{common}/device-{device}")):
        if given:
            path = Path(folder).expanduser()
            if not path.is_absolute():
                raise RunError(f"state-dir is {given!r}; an absolute path is expected")
            return path
    raise RunError(
        f"device {device} has nowhere to keep its state; give state-dir to its node: "
        "flower-supernode --node-config 'state-dir=\"/var/lib/edgelearn\" ...'"
    )


# -- handlers --------------------------------------------------------------------------------------


def _hello(message: Message, context: Context) -> Message:
    """Say which device this is, and that it has the server's scenario."""
    from edgelearn.federated import egress
    from edgelearn.federated import messages as wire

    device, scenario = device_of(context), scenario_from(context.run_config)
    wire.check_digest(wire.config_of(message), scenario.digest, device)
    _folder(context, device)  # what is missing shows before the first round
    metrics = {"device": device}
    egress.hello_schema().admit({}, metrics)
    return Message(wire.reply_content(metrics), reply_to=message)


def _train(message: Message, context: Context) -> Message:
    """Train; send local - global, or the local parameters to a strategy that expects these."""
    from edgelearn.federated import egress
    from edgelearn.federated import messages as wire

    task = _Task(message, context)
    wire.check_decoder(task.config, task.codec_name)
    trained = egress.fit_schema(task.layout, detects=task.detects)
    sent = egress.sent_schema(task.codec, task.layout, detects=task.detects)
    with task.device() as device:
        update, stored = device.fit(
            task.params,
            position=task.position,
            server_round=task.server_round,
            proximal_mu=wire.number_in(task.config, "proximal-mu", 0.0),
            admit=lambda found: trained.admit(found.arrays, found.metrics),
        )
        sent.admit(update.arrays, update.metrics)
        if task.codec is not None:
            arrays = wire.encode_message({n: v.numpy() for n, v in update.arrays.items()})
        else:
            values = task.layout.flatten(update.arrays)
            if task.config.get("edgelearn-wire") != "delta":
                values = task.params + values
            arrays = wire.encode_params(task.layout, values)
        reply = Message(wire.reply_content(update.metrics, arrays), reply_to=message)
        device.commit(stored)
    return reply


def _consolidate(message: Message, context: Context) -> Message:
    """Consolidate what has ended, and forget its samples."""
    from edgelearn.federated import egress
    from edgelearn.federated import messages as wire

    task = _Task(message, context)
    with task.device() as device:
        count, stored = device.consolidate(task.params, position=task.position)
        metrics = {"num-examples": count}
        egress.consolidate_schema().admit({}, metrics)
        reply = Message(wire.reply_content(metrics), reply_to=message)
        device.commit(stored)
    return reply


def _evaluate(message: Message, context: Context) -> Message:
    """Count the correct answers of the served and of the float model; keep activation ranges."""
    from edgelearn.federated import egress
    from edgelearn.federated import messages as wire

    task = _Task(message, context)
    with task.device() as device:
        counts, stored = device.evaluate(task.params, position=task.position)
        metrics = {
            "num-examples": sum(counts.count),
            "model-bytes": counts.model_bytes,
            "count": list(counts.count),
            "served": list(counts.served),
            "float": list(counts.float_),
        }
        egress.evaluate_schema(len(counts.count)).admit({}, metrics)
        reply = Message(wire.reply_content(metrics), reply_to=message)
        if stored is not None:
            device.commit(stored)
    return reply


class _Task:
    """What an instruction asks of which device."""

    def __init__(self, message: Message, context: Context) -> None:
        from edgelearn.federated import messages as wire

        self._index, self._context = device_of(context), context
        self._world, learners = _bench(scenario_from(context.run_config))
        kind = learners.kinds.of_device(self._index)
        self._learner, self._runtime = learners.of_kind(kind), learners.runtime(kind)
        self._digest = self._world.scenario.digest
        self.config: ConfigRecord = wire.config_of(message)
        wire.check_digest(self.config, self._digest, self._index)
        self.layout = self._learner.layout
        self.detects = self._learner.detector is not None
        self.codec, self.codec_name = self._learner.codec, self._world.scenario.wire.codec
        if kind.width < 1:
            wire.check_cutter(self.config, kind.width)
        self.params = wire.decode_params(self.layout, wire.arrays_of(message))
        self.server_round = int(wire.number_in(self.config, "server-round", 1))
        default = self._world.stream.position(max(self.server_round, 1))
        self.position = int(wire.number_in(self.config, "position", default))
        last = self._world.stream.num_experiences - 1
        if not 0 <= self.position <= last:
            raise RunError(
                f"round {self.server_round} is beyond the stream of {self._world.scenario.name!r}: "
                f"position {self.position}, the last is {last}"
            )

    @contextmanager
    def device(self) -> Iterator[ResidentDevice]:
        """Return the device, with its folder to itself."""
        from edgelearn.device.resident import ResidentDevice
        from edgelearn.device.store import DeviceStore
        from edgelearn.federated import messages as wire

        # Without edgelearn's loop, every run of Flower is a run of its own.
        run = str(self.config.get(wire.RUN, f"flower-{self._context.run_id}"))
        folder = _folder(self._context, self._index)
        store = DeviceStore(folder, digest=self._digest, run=run)
        with store.locked():
            yield ResidentDevice(
                self._world, self._learner, self._runtime, store, device=self._index
            )


@functools.lru_cache(maxsize=2)
def _bench(scenario: Scenario) -> tuple[World, FleetLearners]:
    """Build what depends on the scenario alone, once per process."""
    from edgelearn.device.learners import FleetLearners
    from edgelearn.scenario.world import build

    world = build(scenario)
    return world, FleetLearners(world)


def _guarded(handler: Callable[[Message, Context], Message]) -> Any:
    """Let no text of a foreign exception leave: it can hold a sample, and Flower sends it."""

    @functools.wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            from edgelearn.federated import egress

            if egress.is_public(error):
                raise
            device = context.node_config.get("partition-id")
            _log.exception("device %s failed", device)
            raise RunError(f"device {device}: {egress.reason_of(error)}") from error

    return guarded
