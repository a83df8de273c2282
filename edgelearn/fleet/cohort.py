"""From Flower messages to an engine's jobs and back, for a simulated fleet of our own devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import edgelearn.federated._flwr_compat as compat
from edgelearn.compress.submodel import Holdings
from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.profile import Profile
from edgelearn.federated import messages as wire
from edgelearn.federated.by_cohort import Asked, CohortUpdates, Failures
from edgelearn.federated.exchange import Outcome
from edgelearn.fleet.grid import Delivery, too_late
from edgelearn.fleet.jobs import CohortDone, CohortFit, Done, Engine, Integers, Job, Phase
from edgelearn.params import Layout
from edgelearn.scenario.world import World

from flwr.app import ArrayRecord, Error, Message  # isort: skip

_PHASES = {
    wire.FIT: Phase.FIT,
    wire.CONSOLIDATE: Phase.CONSOLIDATE,
    wire.EVALUATE: Phase.EVALUATE,
}

_UPDATES_BYTES = 2**28


class CohortExecutor:
    """Executes instructions on an engine, and books time, energy and state to the devices.

    Attributes:
        energy_j: Modelled energy booked so far; whoever reads it sets it back to 0. What failed
            is not booked, since nobody knows how far it came.
    """

    def __init__(
        self,
        world: World,
        engine: Engine,
        store: FleetStore,
        profiles: Sequence[Profile],
        layout: Layout,
        *,
        flops_per_sample: NDArray[np.float64],
        holdings: Holdings,
    ) -> None:
        """Make it.

        Args:
            world: The scenario's world.
            engine: What does the work.
            store: The devices' state.
            profiles: Of each device.
            layout: Of the global parameters [P].
            flops_per_sample: Of one forward pass on each device.
            holdings: Which part of the parameters each device holds.
        """
        self._world, self._engine, self._store = world, engine, store
        self._profiles, self._layout, self._holdings = profiles, layout, holdings
        self._flops_per_sample = flops_per_sample
        self._digest = world.scenario.digest
        self._serial = 0
        self.energy_j = 0.0
        self._updates = torch.empty(0, 0)
        self._downlink_mbps = np.array([profile.downlink_mbps for profile in profiles])
        self._uplink_mbps = np.array([profile.uplink_mbps for profile in profiles])
        self._train_gflops = np.array([profile.train_gflops for profile in profiles])
        self._power_w = np.array([profile.power_w for profile in profiles])
        self._radio_j_per_mb = np.array([profile.radio_j_per_mb for profile in profiles])

    def __call__(self, instructions: Sequence[Message]) -> list[Delivery]:
        """Do what the instructions ask; one delivery for each, in their order."""
        deliveries: dict[int, Delivery] = {}
        for batch in _by_parameters(instructions):
            deliveries.update(self._run([(i, instructions[i]) for i in batch]))
        return [deliveries[i] for i in range(len(instructions))]

    def _layout_of(self, device: int) -> Layout:
        part = self._holdings.of_device(device)
        return self._layout if part is None else part.layout

    def _run(self, batch: Sequence[tuple[int, Message]]) -> Mapping[int, Delivery]:
        layout = self._layout_of(batch[0][1].metadata.dst_node_id - 1)
        params = wire.decode_params(layout, wire.arrays_of(batch[0][1]))
        self._serial += 1
        jobs = [self._job(row, message) for row, (_, message) in enumerate(batch)]
        fits = jobs[0].phase is Phase.FIT
        updates = torch.zeros(len(jobs), layout.size if fits else 0)
        results = self._engine.run(jobs, params, updates)
        out = {}
        for (index, message), job, done in zip(batch, jobs, results, strict=True):
            out[index] = self._deliver(message, job, done, updates[job.row], params)
        return out

    # -- a cohort at once --------------------------------------------------------------------------

    def fit(self, asked: Asked) -> Iterator[tuple[CohortUpdates, float]]:
        """Train a cohort in waves.

        Yields:
            What a wave sends, and the virtual seconds until all of it is here. The next wave
            overwrites the updates.
        """
        self._serial += 1
        size = self._layout.size
        for start in range(0, len(asked.devices), rows_in_memory(size)):
            devices = asked.devices[start : start + rows_in_memory(size)]
            if self._updates.shape != (len(devices), size):
                self._updates = self._engine.buffer(len(devices), size)
            begun, consolidated = self._store.progress[devices].T.astype(np.int64)
            read_slots, write_slots = self._store.slots_of(devices)
            cohort = CohortFit(
                devices=devices,
                server_round=asked.server_round,
                position=asked.position,
                begun=begun,
                consolidated=consolidated,
                read_slots=read_slots,
                write_slots=write_slots,
                serial=self._serial,
                proximal_mu=asked.proximal_mu,
            )
            done = self._engine.fit(cohort, asked.params, self._updates)
            self._keep_all(devices, done)
            up = _bytes_up(asked, done)
            failures, seconds = self._timed(asked, devices, done.errors, done.num_samples, up)
            sent = done.num_examples, done.loss, done.norms, up
            yield CohortUpdates(devices, self._updates, *sent, failures, done.alarms), seconds

    def _keep_all(self, devices: Integers, done: CohortDone) -> None:
        """Note the devices' new states, or that their old ones hold."""
        for row in done.died:
            self._store.revert(int(devices[row]))
        for row, checksum in done.checksums.items():
            self._store.written(int(devices[row]), checksum)
        succeeded = np.ones(len(devices), bool)
        succeeded[list(done.errors)] = False
        self._store.progress[devices[succeeded]] = done.progress[succeeded]

    def ask(self, asked: Asked, phase: Phase) -> tuple[list[Mapping[str, Any]], Failures, float]:
        """Let devices consolidate or evaluate; return metrics, failures and virtual seconds."""
        self._serial += 1
        sizes = self._world.train_sizes(asked.devices, asked.position).tolist()
        jobs = [
            self._job_of(row, device, phase, asked.server_round, asked.position, cost, 0.0)
            for row, (device, cost) in enumerate(zip(asked.devices.tolist(), sizes, strict=True))
        ]
        results = self._engine.run(jobs, asked.params, torch.empty(len(jobs), 0))
        for job, done in zip(jobs, results, strict=True):
            self._keep(job, done)
        errors = {done.row: done.error for done in results if done.error is not None}
        none, up = np.zeros(len(jobs), np.int64), np.full(len(jobs), asked.bytes_up)
        failures, seconds = self._timed(asked, asked.devices, errors, none, up)
        return [done.metrics for done in results], failures, seconds

    def _timed(
        self,
        asked: Asked,
        devices: Integers,
        errors: Mapping[int, str],
        num_samples: Integers,
        bytes_up: Integers,
    ) -> tuple[Failures, float]:
        """Book virtual time; what takes longer than an instruction lives is too late."""
        # As Profile.transfer_s, train_s and energy_j have it, to the last bit.
        down_s = asked.bytes_down / self._downlink_mbps[devices]
        up_s = bytes_up / self._uplink_mbps[devices]
        train_flops = 3 * self._flops_per_sample[devices] * num_samples
        train_s = train_flops / (self._train_gflops[devices] * 1e9)
        latency_s = 8e-6 * (down_s + up_s) + train_s
        failures = {row: (Outcome.FAILED, reason) for row, reason in errors.items()}
        latency_s[list(failures)] = 0.0
        radio_j = self._radio_j_per_mb[devices] * (asked.bytes_down + bytes_up) / 1e6
        energy_j = self._power_w[devices] * train_s + radio_j
        energy_j[list(failures)] = 0.0
        self.energy_j += float(energy_j.sum())
        for row in np.flatnonzero(latency_s > asked.ttl_s).tolist():
            failures[row] = (Outcome.LATE, too_late(latency_s[row], asked.ttl_s))
        return failures, min(float(latency_s.max(initial=0.0)), asked.ttl_s)

    # -- message by message ------------------------------------------------------------------------

    def _job(self, row: int, message: Message) -> Job:
        config = wire.config_of(message)
        device = message.metadata.dst_node_id - 1
        wire.check_digest(config, self._digest, device)
        phase = _PHASES[message.metadata.message_type]
        if phase is Phase.FIT:
            wire.check_decoder(config, self._world.scenario.wire.codec)
        server_round = int(wire.number_in(config, "server-round", 1))
        default = self._world.stream.position(max(server_round, 1))
        position = int(wire.number_in(config, "position", default))
        cost = len(self._world.train_samples(device, position))
        mu = wire.number_in(config, "proximal-mu", 0.0)
        return self._job_of(row, device, phase, server_round, position, cost, mu)

    def _job_of(
        self,
        row: int,
        device: int,
        phase: Phase,
        server_round: int,
        position: int,
        cost: int,
        proximal_mu: float,
    ) -> Job:
        read_slot, write_slot = self._store.slots(device)
        begun, consolidated = self._store.progress[device].tolist()
        return Job(
            row=row,
            device=device,
            phase=phase,
            server_round=server_round,
            position=position,
            begun=begun,
            consolidated=consolidated,
            read_slot=read_slot,
            write_slot=write_slot,
            cost=cost,
            serial=self._serial,
            proximal_mu=proximal_mu,
        )

    def _keep(self, job: Job, done: Done) -> None:
        """Note a device's new state, or that its old one holds."""
        if done.died:
            self._store.revert(job.device)
        if done.error is not None:
            return
        if done.checksum is not None:
            self._store.written(job.device, done.checksum)
        if done.progress is not None:
            self._store.progress[job.device] = done.progress

    def _deliver(
        self, message: Message, job: Job, done: Done, update: Tensor, params: Tensor
    ) -> Delivery:
        self._keep(job, done)
        if done.error is not None:
            return Delivery(Error(compat.ErrorCode.RAISED, done.error))
        arrays = None
        if job.phase is Phase.FIT:
            arrays = self._arrays(message, job.device, done, update, params)
        content = wire.reply_content(done.metrics, arrays)
        profile = self._profiles[job.device]
        down, up = wire.num_bytes(message.content), wire.num_bytes(content)
        transfer_s = profile.transfer_s(bytes_down=down, bytes_up=up)
        # A training step costs about three forward passes.
        flops = 3 * float(self._flops_per_sample[job.device]) * done.num_samples
        train_s = profile.train_s(flops)
        self.energy_j += profile.energy_j(train_s=train_s, num_bytes=down + up)
        return Delivery(content, transfer_s + train_s)

    def _arrays(
        self, instruction: Message, device: int, done: Done, update: Tensor, params: Tensor
    ) -> ArrayRecord:
        """Return what a device's reply holds: what its codec made, or what was asked for."""
        if done.message is not None:
            return wire.encode_message(done.message)
        as_delta = wire.config_of(instruction).get("edgelearn-wire") == "delta"
        values = update if as_delta else params + update
        return wire.encode_params(self._layout_of(device), values)


def _bytes_up(asked: Asked, done: CohortDone) -> Integers:
    """Return the bytes of each device's reply [K]; of one that failed, the most."""
    bytes_up = np.full(len(done.norms), asked.bytes_up)
    if asked.bytes_vary:
        for row, message in done.messages.items():
            bytes_up[row] += wire.encode_message(message).count_bytes() - asked.bytes_vary
    return bytes_up


def rows_in_memory(size: int) -> int:
    """Return how many updates of `size` parameters are held at once."""
    return max(1, _UPDATES_BYTES // (4 * size))


def _by_parameters(instructions: Sequence[Message]) -> list[list[int]]:
    """Group instructions that carry the same parameters and ask for the same phase."""
    groups: dict[tuple[int, str], list[int]] = {}
    for index, message in enumerate(instructions):
        key = (id(wire.arrays_of(message)), message.metadata.message_type)
        groups.setdefault(key, []).append(index)
    return list(groups.values())
