"""The fused way: a simulated cohort trains as one, and the strategy gets one reply with its mean.

For strategies that use replies for nothing but their weighted mean. Flower's own code still samples
the cohort, writes the config and makes the server's step. Everything else is as in `ByMessage`:
the same admission, the same accounts, the same outcomes; parameters agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelearn.federated import _flwr_compat as compat
from edgelearn.federated import egress, exchange
from edgelearn.federated import messages as wire
from edgelearn.federated.exchange import Counts, Evaluated, Fitted, Outcome, Run, Traffic
from edgelearn.federated.record import Line

from flwr.app import ArrayRecord, Message, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp import strategy as flower  # isort: skip
from flwr.serverapp.strategy import Strategy  # isort: skip

# Exactly these: a subclass may look at single replies.
AVERAGING = (
    flower.FedAvg,
    flower.FedAvgM,
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedProx,
    flower.FedYogi,
)

# Of these the average of one reply is that reply, and the server does nothing else.
_PLAIN = (flower.FedAvg, flower.FedProx)

Failures = Mapping[int, tuple[Outcome, str]]


@dataclass(frozen=True, slots=True)
class Asked:
    """An instruction to many devices.

    Attributes:
        devices: [K].
        server_round: Round, from 1 (0 before the first).
        position: Position in the stream.
        params: Global parameters [P].
        bytes_down: Bytes of the instruction.
        bytes_up: Bytes of a device's reply, or the most that they can be.
        bytes_vary: Of these, those of a message whose size depends on the update; 0 without one.
        ttl_s: Longest time that a reply may take.
        proximal_mu: FedProx's mu.
    """

    devices: Counts
    server_round: int
    position: int
    params: Tensor
    bytes_down: int
    bytes_up: int
    ttl_s: float
    proximal_mu: float = 0.0
    bytes_vary: int = 0


@dataclass(frozen=True, slots=True)
class CohortUpdates:
    """What some of a cohort send.

    Attributes:
        devices: [K].
        updates: local - global [K, P]; rows that failed hold anything.
        num_examples: Samples of each device [K].
        loss: [K].
        norms: Euclidean norm of each update [K].
        bytes_up: Bytes of each reply [K].
        failures: Row -> what became of it instead.
        alarms: Row -> how often it noticed a change, where it did.
    """

    devices: Counts
    updates: Tensor
    num_examples: Counts
    loss: NDArray[np.float64]
    norms: NDArray[np.float64]
    bytes_up: Counts
    failures: Failures
    alarms: Mapping[int, int] = field(default_factory=dict)


class CohortFleet(Protocol):
    """A fleet that can be asked as one; node ids are device + 1."""

    @property
    def grid(self) -> Grid:
        """Flower's grid over the same devices."""

    def fit(self, asked: Asked) -> Iterator[CohortUpdates]:
        """Let devices train, in waves that fit into memory; each is gone with the next."""

    def consolidate(self, asked: Asked) -> Failures:
        """Let devices consolidate."""

    def evaluate(self, asked: Asked) -> tuple[Sequence[Mapping[str, Any]], Failures]:
        """Let devices evaluate; return each one's metrics, empty where it failed."""

    def reachable(self) -> Counts:
        """Return the devices that can be reached now."""

    def mean(self, updates: Tensor, weights: NDArray[np.float64]) -> Tensor:
        """Return sum_k weights_k updates_k [P]; rows with weight 0 do not count, even if NaN."""


def averages(strategy: Strategy) -> bool:
    """Whether a strategy uses replies for nothing but their weighted mean."""
    return type(strategy) in AVERAGING


@final
class ByCohort:
    """A cohort at once; for strategies of which `averages` is true."""

    def __init__(self, run: Run, fleet: CohortFleet) -> None:
        self._run, self._fleet = run, fleet
        self._is_plain = type(run.strategy) in _PLAIN
        self.traffic = Traffic(run.scenario.fleet.num_devices)
        declared = egress.fit_metrics(detects=run.detects)
        metrics = {name: kind() for name, kind in declared.items()}
        # On the wire a model travels tensor by tensor; here it is one array, which is quicker.
        arrays = wire.encode_params(run.layout, torch.zeros(run.layout.size))
        self._bytes_of_model = arrays.count_bytes()
        update = run.empty_update()
        self._bytes_of_update = wire.num_bytes(wire.reply_content(metrics, update))
        self._bytes_vary = update.count_bytes() if run.has_bounds else 0
        zeros = [0] * run.stream.num_experiences
        schema = egress.evaluate_schema(run.stream.num_experiences)
        counts = {**dict.fromkeys(schema.scalars, 0), **dict.fromkeys(schema.counts, zeros)}
        self._bytes_of_counts = wire.num_bytes(wire.reply_content(counts))
        self._bytes_of_done = wire.num_bytes(wire.reply_content({"num-examples": 0}))

    @property
    def strategy(self) -> Strategy:
        """Flower's strategy."""
        return self._run.strategy

    def fit(self, server_round: int, position: int, params: Tensor) -> Fitted:
        """Let a cohort train, and hand its mean to the strategy."""
        run = self._run
        asked, content = self._ask("configure_train", server_round, position, params)
        if content is None:
            return Fitted(params, {}, [], None)
        limit = run.norm_limit(params)
        outcomes: dict[int, Outcome] = {}
        problems: list[Line] = []
        alarms: dict[int, int] = {}
        total, weighed, losses = torch.zeros_like(params), 0, 0.0
        for found in self._fleet.fit(asked):
            fates, failures = _admit(found, limit)
            problems += _problems(found.devices, failures)
            outcomes |= zip(found.devices.tolist(), fates, strict=True)
            devices = found.devices.tolist()
            alarms |= {devices[r]: n for r, n in found.alarms.items() if r not in failures}
            self._book(asked, found.devices, found.failures, found.bytes_up)
            weights = found.num_examples.astype(np.float64)
            weights[list(failures)] = 0
            weighed += int(weights.sum())
            losses += float((found.loss * weights).sum())
            total += self._fleet.mean(found.updates, weights)
        loss = losses / weighed if weighed else None
        if weighed:
            mean = params + total / weighed
            if self._is_plain:
                params = run.accept(mean, server_round)
            else:
                params = self._aggregate(asked, content, mean, weighed, loss or 0.0)
        exchange.refuse_failure(outcomes, problems, server_round)
        return Fitted(params, outcomes, problems, loss, alarms if run.detects else None)

    def _aggregate(
        self, asked: Asked, content: RecordDict, mean: Tensor, num_examples: int, loss: float
    ) -> Tensor:
        """Let the strategy make its step from one reply, the cohort's mean [P]."""
        run, server_round = self._run, asked.server_round
        metrics = {"num-examples": num_examples, "loss": loss, "num-steps": 0}
        reply = wire.reply_content(metrics, wire.encode_vector(mean))
        asking = Message(content, int(asked.devices[0]) + 1, wire.FIT)
        with run.hook("aggregate_train", server_round):
            arrays, _ = run.strategy.aggregate_train(
                server_round, [Message(reply, reply_to=asking)]
            )
        if arrays is None:
            return asked.params
        return run.accept(wire.decode_vector(arrays), server_round)

    def consolidate(self, server_round: int, position: int, params: Tensor) -> list[Line]:
        """Let every device that can be reached consolidate, on the final global parameters."""
        run = self._run
        content = RecordDict({wire.CONFIG: run.instruction(server_round, position)})
        asked = self._asked(self._fleet.reachable(), server_round, position, params, content)
        failures = self._fleet.consolidate(asked)
        self._book(asked, asked.devices, failures)
        return _problems(asked.devices, failures, "consolidation: ")

    def evaluate(self, server_round: int, position: int, params: Tensor) -> Evaluated:
        """Let devices evaluate what they serve."""
        asked, content = self._ask("configure_evaluate", server_round, position, params)
        if content is None:
            return exchange.table([], [])
        metrics, failures = self._fleet.evaluate(asked)
        self._book(asked, asked.devices, failures)
        problems = _problems(asked.devices, failures, "evaluation: ")
        answers = [
            (int(device), found)
            for row, (device, found) in enumerate(zip(asked.devices, metrics, strict=True))
            if row not in failures
        ]
        exchange.refuse_blindness(problems, len(answers), server_round)
        return exchange.table(answers, problems)

    # -- asking ------------------------------------------------------------------------------------

    def _ask(
        self, hook: str, server_round: int, position: int, params: Tensor
    ) -> tuple[Asked, RecordDict | None]:
        """Let the strategy choose devices and write the instruction."""
        run = self._run
        config = run.instruction(server_round, position)
        arrays = ArrayRecord() if self._is_plain else wire.encode_vector(params)
        with run.hook(hook, server_round, samples_only=True):
            nodes, content = compat.chosen_nodes(
                run.strategy, hook, server_round, arrays, config, self._fleet.grid
            )
        devices = np.array(nodes, np.int64) - 1
        return self._asked(devices, server_round, position, params, content, hook), content

    def _asked(
        self,
        devices: Counts,
        server_round: int,
        position: int,
        params: Tensor,
        content: RecordDict | None,
        hook: str = "",
    ) -> Asked:
        sizes = {"configure_train": self._bytes_of_update, "": self._bytes_of_done}
        configs = [] if content is None else list(content.config_records.values())
        mu = max((wire.number_in(config, "proximal-mu", 0.0) for config in configs), default=0.0)
        return Asked(
            devices=devices,
            server_round=server_round,
            position=position,
            params=params,
            bytes_down=self._bytes_of_model + sum(config.count_bytes() for config in configs),
            bytes_up=sizes.get(hook, self._bytes_of_counts),
            ttl_s=self._run.scenario.fleet.deadline_s or compat.DEFAULT_TTL_S,
            proximal_mu=mu,
            bytes_vary=self._bytes_vary if hook == "configure_train" else 0,
        )

    def _book(
        self, asked: Asked, devices: Counts, failures: Failures, bytes_up: Counts | None = None
    ) -> None:
        answered = np.ones(len(devices), bool)
        answered[list(failures)] = False
        np.add.at(self.traffic.down, devices, asked.bytes_down)
        up = np.full(len(devices), asked.bytes_up) if bytes_up is None else bytes_up
        np.add.at(self.traffic.up, devices[answered], up[answered])


def _admit(found: CohortUpdates, limit: float) -> tuple[list[Outcome], Failures]:
    """Classify what devices sent."""
    outcomes = [Outcome.IDLE if n == 0 else Outcome.OK for n in found.num_examples.tolist()]
    failures = dict(found.failures)
    for row in np.flatnonzero(~(found.norms <= limit)).tolist():
        if row not in failures:
            is_finite = bool(torch.isfinite(found.updates[row]).all())
            large = exchange.too_large(float(found.norms[row]), limit)
            failures[row] = (Outcome.REJECTED, large if is_finite else exchange.NOT_FINITE)
    for row, (outcome, _) in failures.items():
        outcomes[row] = outcome
    return outcomes, failures


def _problems(devices: Counts, failures: Failures, phase: str = "") -> list[Line]:
    return [
        exchange.problem(int(devices[row]), outcome, f"{phase}{reason}")
        for row, (outcome, reason) in sorted(failures.items())
    ]
