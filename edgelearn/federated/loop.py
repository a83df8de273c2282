"""The round loop: drives any Flower strategy over a fleet, with checkpoints and typed outcomes.

`Strategy.start` always begins at round 1 and keeps nothing; this loop calls the strategy's four
hooks itself (through an `Exchange`), so that a run can be resumed, has phases (fit, consolidate,
evaluate), and knows what became of every device that was asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from edgelearn.federated.checkpoint import Checkpoint, as_tensors, with_prefix
from edgelearn.federated.exchange import Evaluated, Exchange
from edgelearn.federated.journal import Journal
from edgelearn.federated.record import Line
from edgelearn.federated.server import restore, snapshot
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.stream import Stream


@dataclass(frozen=True, slots=True)
class Progress:
    """What a display shows after a round.

    Attributes:
        server_round: The round, from 1.
        num_rounds: Rounds of the run.
        position: Position in the stream.
        accuracy: Served model, over the experiences seen so far; NaN if not measured.
        forgetting: Mean drop of earlier experiences from their best at the end of an experience;
            NaN if there are none.
        num_bytes: Bytes moved so far, both ways.
        outcomes: What became of the cohort.
    """

    server_round: int
    num_rounds: int
    position: int
    accuracy: float
    forgetting: float
    num_bytes: int
    outcomes: Mapping[str, int]


class FleetSide(Protocol):
    """What the loop has to know of the fleet."""

    @property
    def clock_s(self) -> float:
        """Time now: virtual in simulation, wall time in deployment."""

    @property
    def energy_j(self) -> float | None:
        """Modelled energy of all devices since `begin_round`; None where nobody models it."""

    def begin_round(self, server_round: int, *, min_devices: int) -> None:
        """Make ready for a round: wait until enough devices can be reached."""

    def commit(self) -> Mapping[str, Tensor]:
        """Make the devices' new states durable; return what a checkpoint has to hold of it."""

    def restore(self, tensors: Mapping[str, Tensor], clock_s: float) -> None:
        """Go back to what `commit` returned."""


@dataclass(slots=True)
class RoundLoop:
    """One run of a scenario.

    Attributes:
        scenario: What is run.
        stream: Its stream.
        exchange: How the fleet is asked.
        fleet: What else there is to know of the fleet.
        journal: Where the record and checkpoints go.
        on_round: Called after every round.
        checkpoint_every_s: Least wall time between checkpoints; 0 makes one after every round.
    """

    scenario: Scenario
    stream: Stream
    exchange: Exchange
    fleet: FleetSide
    journal: Journal
    on_round: Callable[[Progress], None] | None = None
    checkpoint_every_s: float = 1.0
    _best: dict[int, float] = field(default_factory=dict)
    _num_updates: int = 0
    _training_s: float = 0.0

    def run(self, params: Tensor, resumed: Checkpoint | None = None) -> Tensor:
        """Run all rounds that are left.

        Args:
            params: Initial global parameters [P].
            resumed: Where to go on.

        Returns:
            The final global parameters [P].

        Raises:
            RunError: If the run can't go on; the first cause is in the message.
        """
        done, last_saved = 0, time.monotonic()
        if resumed is not None:
            done, params = resumed.server_round, self._restore(resumed)
        else:
            self.fleet.begin_round(0, min_devices=1)
            found = self.exchange.evaluate(0, 0, params)
            line = {"kind": "start", "accuracy": found.pooled, "problems": found.problems}
            self.journal.append(line)
        for server_round in range(done + 1, self.scenario.num_rounds + 1):
            params = self._round(server_round, params)
            due = time.monotonic() - last_saved >= self.checkpoint_every_s
            if due or server_round == self.scenario.num_rounds:
                self._save(server_round, params)
                last_saved = time.monotonic()
        return params

    def totals(self) -> tuple[list[int], list[int]]:
        """Return bytes up and down by device."""
        traffic = self.exchange.traffic
        return traffic.up.tolist(), traffic.down.tolist()

    @property
    def updates_per_s(self) -> float:
        """Devices trained and aggregated per second of wall time, in this process."""
        return self._num_updates / self._training_s if self._training_s else 0.0

    def _round(self, server_round: int, params: Tensor) -> Tensor:
        started, traffic = time.perf_counter(), self.exchange.traffic
        up, down = int(traffic.up.sum()), int(traffic.down.sum())
        position = self.stream.position(server_round)
        ends = self.stream.ends_experience(server_round)
        self.fleet.begin_round(server_round, min_devices=self.scenario.fleet.cohort)
        fitted = self.exchange.fit(server_round, position, params)
        self._training_s += time.perf_counter() - started
        self._num_updates += len(fitted.outcomes)
        params = fitted.params
        line: Line = {"kind": "round", "round": server_round, "position": position, **fitted.line}
        if ends and self.scenario.stream.boundaries == "told":
            line["problems"] += self.exchange.consolidate(server_round, position, params)
        accuracy: dict[str, list[int]] | None = None
        devices: Line | None = None
        if ends or server_round % self.scenario.evaluate.every_rounds == 0:
            found = self.exchange.evaluate(server_round, position, params)
            line["problems"] += found.problems
            accuracy = found.pooled
            devices = self._devices(found, server_round, position) if ends else None
        line |= {
            "accuracy": accuracy,
            "bytes_up": int(traffic.up.sum()) - up,
            "bytes_down": int(traffic.down.sum()) - down,
            "clock_s": self.fleet.clock_s,
            "energy_j": self.fleet.energy_j,
            "wall_s": time.perf_counter() - started,
        }
        self.journal.append(line)
        if devices is not None:
            self.journal.append(devices)
        self._report(line)
        return params

    def _devices(self, found: Evaluated, server_round: int, position: int) -> Line:
        """Return the line of each device's counts; who could not be asked stands in it too."""
        line = found.line(server_round, position)
        if not self.scenario.evaluate.num_devices:
            answered = {*line["devices"], *(problem["device"] for problem in found.problems)}
            away = set(range(self.scenario.fleet.num_devices)) - answered
            line["offline"] = sorted(away)
        return line

    # -- state -------------------------------------------------------------------------------------

    def _save(self, server_round: int, params: Tensor) -> None:
        arrays, values = snapshot(self.exchange.strategy)
        tensors = {
            "params": params,
            **self.exchange.traffic.tensors(),
            **as_tensors("strategy.", arrays),
            **self.fleet.commit(),
        }
        plain = {
            "strategy": values,
            "clock_s": self.fleet.clock_s,
            "best": {str(k): v for k, v in self._best.items()},
        }
        self.journal.checkpoint(Checkpoint(server_round, tensors, plain, 0))

    def _restore(self, checkpoint: Checkpoint) -> Tensor:
        tensors, values = checkpoint.tensors, checkpoint.values
        arrays = with_prefix("strategy.", tensors)
        restore(self.exchange.strategy, arrays, dict(values["strategy"]))
        self.exchange.traffic.restore(tensors)
        self._best.update({int(k): v for k, v in values["best"].items()})
        self.fleet.restore(tensors, values["clock_s"])
        return tensors["params"].clone()

    def _report(self, line: Mapping[str, Any]) -> None:
        accuracy, drop = float("nan"), float("nan")
        seen = line["accuracy"]
        if seen is not None and self.scenario.stream.order == "shared":
            here = range(line["position"] + 1)
            shares = {j: seen["served"][j] / seen["count"][j] for j in here if seen["count"][j]}
            if shares:
                accuracy = float(np.mean(list(shares.values())))
            past = [self._best[j] - shares[j] for j in shares if j in self._best and j < here[-1]]
            drop = float(np.mean(past)) if past else float("nan")
            if self.stream.ends_experience(line["round"]):  # as the accuracy matrix has it
                for j, share in shares.items():
                    self._best[j] = max(self._best.get(j, 0.0), share)
        elif seen is not None and sum(seen["count"]):
            accuracy = sum(seen["served"]) / sum(seen["count"])
        if self.on_round is not None:
            self.on_round(
                Progress(
                    line["round"],
                    self.scenario.num_rounds,
                    line["position"],
                    accuracy,
                    drop,
                    int(self.exchange.traffic.up.sum() + self.exchange.traffic.down.sum()),
                    line["outcomes"],
                )
            )
