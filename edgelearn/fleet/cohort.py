"""From Flower messages to an engine's jobs and back, for a simulated fleet of our own devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import edgelearn.federated._flwr_compat as compat
from edgelearn.device.fleet_store import FleetStore
from edgelearn.device.profile import Profile
from edgelearn.federated import messages as wire
from edgelearn.fleet.grid import Delivery
from edgelearn.fleet.jobs import Done, Engine, Job, Phase
from edgelearn.params import Layout
from edgelearn.scenario.world import World

from flwr.app import Error, Message  # isort: skip

_PHASES = {
    wire.FIT: Phase.FIT,
    wire.CONSOLIDATE: Phase.CONSOLIDATE,
    wire.EVALUATE: Phase.EVALUATE,
}


class CohortExecutor:
    """Executes instructions on an engine, and books time and state to the devices."""

    def __init__(
        self,
        world: World,
        engine: Engine,
        store: FleetStore,
        profiles: Sequence[Profile],
        layout: Layout,
        *,
        flops_per_sample: float,
    ) -> None:
        self._world, self._engine, self._store = world, engine, store
        self._profiles, self._layout = profiles, layout
        self._flops_per_sample = flops_per_sample
        self._digest = world.scenario.digest
        self._serial = 0

    def __call__(self, instructions: Sequence[Message]) -> list[Delivery]:
        """Do what the instructions ask; one delivery for each, in their order."""
        deliveries: dict[int, Delivery] = {}
        for batch in _by_parameters(instructions):
            deliveries.update(self._run([(i, instructions[i]) for i in batch]))
        return [deliveries[i] for i in range(len(instructions))]

    def _run(self, batch: Sequence[tuple[int, Message]]) -> Mapping[int, Delivery]:
        params = wire.decode_params(self._layout, wire.arrays_of(batch[0][1]))
        self._serial += 1
        jobs = [self._job(row, message) for row, (_, message) in enumerate(batch)]
        fits = jobs[0].phase is Phase.FIT
        updates = torch.zeros(len(jobs), self._layout.size if fits else 0)
        results = self._engine.run(jobs, params, updates)
        out = {}
        for (index, message), job, done in zip(batch, jobs, results, strict=True):
            out[index] = self._deliver(message, job, done, updates[job.row], params)
        return out

    def _job(self, row: int, message: Message) -> Job:
        config = wire.config_of(message)
        device = message.metadata.dst_node_id - 1
        wire.check_digest(config, self._digest, device)
        phase = _PHASES[message.metadata.message_type]
        server_round = int(wire.number_in(config, "server-round", 1))
        default = self._world.stream.position(max(server_round, 1))
        position = int(wire.number_in(config, "position", default))
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
            cost=len(self._world.train_samples(device, position)),
            serial=self._serial,
            proximal_mu=wire.number_in(config, "proximal-mu", 0.0),
        )

    def _deliver(
        self, message: Message, job: Job, done: Done, update: Tensor, params: Tensor
    ) -> Delivery:
        if done.died:
            self._store.revert(job.device)
        if done.error is not None:
            return Delivery(Error(compat.ErrorCode.RAISED, done.error))
        if done.checksum is not None:
            self._store.written(job.device, done.checksum)
        if done.progress is not None:
            self._store.progress[job.device] = done.progress
        arrays = None
        if job.phase is Phase.FIT:
            as_delta = wire.config_of(message).get("edgelearn-wire") == "delta"
            values = update if as_delta else params + update
            arrays = wire.encode_params(self._layout, values)
        content = wire.reply_content(done.metrics, arrays)
        profile = self._profiles[job.device]
        transfer_s = profile.transfer_s(
            bytes_down=wire.num_bytes(message.content), bytes_up=wire.num_bytes(content)
        )
        # A training step costs about three forward passes.
        train_s = profile.train_s(3 * self._flops_per_sample * done.num_samples)
        return Delivery(content, transfer_s + train_s)


def _by_parameters(instructions: Sequence[Message]) -> list[list[int]]:
    """Group instructions that carry the same parameters and ask for the same phase."""
    groups: dict[tuple[int, str], list[int]] = {}
    for index, message in enumerate(instructions):
        key = (id(wire.arrays_of(message)), message.metadata.message_type)
        groups.setdefault(key, []).append(index)
    return list(groups.values())
