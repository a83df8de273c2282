"""The benches at which simulated devices do their work, one after another, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from edgelearn.compress.codec import decoded
from edgelearn.device.evaluate import Counts, Trial, evaluate, evaluate_group
from edgelearn.device.fleet_store import UNWRITTEN, RecordFile
from edgelearn.device.learners import FleetLearners
from edgelearn.device.runtimes import kept_in, places_of, remembered
from edgelearn.device.state import DeviceState
from edgelearn.device.tracking import Tracker
from edgelearn.federated import egress
from edgelearn.fleet.evaluation import evaluate_jobs
from edgelearn.fleet.jobs import Done, Job, Phase, failure
from edgelearn.runtime.protocol import Prepared
from edgelearn.scenario.kinds import Kind
from edgelearn.scenario.samples import Samples, SampleStore
from edgelearn.scenario.stream import Experience
from edgelearn.scenario.world import World


@dataclass(frozen=True, slots=True)
class SimulatedData:
    """A simulated device's view of the world: its own samples and nothing else."""

    world: World
    device: int

    @property
    def store(self) -> SampleStore:
        """The data set that all simulated devices share."""
        return self.world.train

    def experience(self, position: int) -> Experience:
        """Return the experience at a position of its stream."""
        return self.world.stream.experience(self.device, position)

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:
        """Return its training samples at that position, or those that a round of it brings."""
        return self.world.train_samples(self.device, position, server_round=server_round)


@final
class Workshop:
    """Does jobs; a process has one, and several give the same bits as one.

    It has a bench for each kind of device. The parameters of a job are those that its device holds,
    and so is its update.
    """

    def __init__(self, world: World, store_path: Path) -> None:
        self._world, self._store_path = world, store_path
        self._learners = FleetLearners(world)
        self._benches = [
            Workbench(world, store_path, self._learners, kind) for kind in world.kinds.kinds
        ]

    def num_params(self, device: int) -> int:
        """Return how many numbers of the global parameters a device holds."""
        return self._learners.of_device(device).layout.size

    def perform(self, job: Job, params: Tensor, update: Tensor) -> Done:
        """Do one job; `update` [p] takes what the server gets.

        Whatever goes wrong is this device's failure, not the run's.
        """
        return self._bench(job).perform(job, params, update)

    def evaluate(self, jobs: Sequence[Job], params: Tensor) -> list[Done]:
        """Do the evaluations of a group, whose devices hold the same part, in one pass."""
        done: dict[int, Done] = {}
        for bench in dict.fromkeys(map(self._bench, jobs)):
            theirs = [job for job in jobs if self._bench(job) is bench]
            done |= {result.row: result for result in bench.evaluate(theirs, params)}
        return [done[job.row] for job in jobs]

    def _bench(self, job: Job) -> Workbench:
        return self._benches[self._world.kinds.place(job.device)]


class Workbench:
    """Does the jobs of devices of one kind."""

    def __init__(self, world: World, store_path: Path, learners: FleetLearners, kind: Kind) -> None:
        self._world = world
        self._learner = learner = learners.of_kind(kind)
        self._runtime = learners.runtime(kind)
        count = world.scenario.fleet.num_devices
        self._file = RecordFile(store_path, learners.record(kind), count)
        self._prepared: tuple[int, Prepared] | None = None
        self._places = places_of(world, self._runtime, learner.model)
        self._tracker = Tracker.of(world, learner, self._runtime)
        layout, codec, detects = learner.layout, learner.codec, learner.detector is not None
        self._sent = egress.sent_schema(codec, layout, detects=detects)
        self._schemas = {
            Phase.FIT: egress.fit_schema(layout, detects=detects),
            Phase.CONSOLIDATE: egress.consolidate_schema(),
            Phase.EVALUATE: egress.evaluate_schema(world.stream.num_experiences),
        }

    def perform(self, job: Job, params: Tensor, update: Tensor) -> Done:
        """Do one job; `update` [P] takes what the server gets.

        Whatever goes wrong is this device's failure, not the run's.
        """
        if job.phase is Phase.EVALUATE:
            return self.evaluate([job], params)[0]
        try:
            return self._perform(job, params, update)
        except Exception as error:
            return failure(job, error)

    def evaluate(self, jobs: Sequence[Job], params: Tensor) -> list[Done]:
        """Do the evaluations of a group in one pass; a failure is its device's, not the group's."""

        def measure(trials: Sequence[Trial]) -> list[Counts]:
            if self._learner.serves_own:
                return [self._alone(trial, params) for trial in trials]
            prepared = self._prepare(jobs[0].serial, params)
            return evaluate_group(self._learner.model, params, prepared, trials)

        def trial_of(job: Job) -> Trial:
            return self._trial(job, params)

        def keep(job: Job, counts: Counts) -> int | None:
            if counts.kept is None:
                return None
            memory = remembered(self._state(job).memory, counts.kept)
            return self._file.write(job.device, job.write_slot, memory)

        schema = self._schemas[Phase.EVALUATE]
        return evaluate_jobs(jobs, trial_of=trial_of, measure=measure, schema=schema, keep=keep)

    def _alone(self, trial: Trial, params: Tensor) -> Counts:
        """Evaluate a device that answers with parameters of its own."""
        model = self._learner.model
        own = params if trial.params is None else trial.params
        model.module.eval()
        with torch.no_grad():
            prepared = self._runtime.prepare(model, own)
        calibration = trial.calibration.batch().x
        return evaluate(model, own, prepared, calibration, trial.tests, kept=trial.kept)

    def _perform(self, job: Job, params: Tensor, update: Tensor) -> Done:
        data, learner = SimulatedData(self._world, job.device), self._learner
        state = self._state(job)
        schema = self._schemas[job.phase]
        if job.phase is Phase.CONSOLIDATE:
            new = learner.consolidate(state, params, data, upto=job.position + 1)
            metrics = {"num-examples": len(data.samples(job.position))}
            schema.admit({}, metrics)
            return Done(job.row, metrics, *self._keep(job, state, new))
        fit = learner.fit(
            state,
            params,
            data,
            position=job.position,
            server_round=job.server_round,
            proximal_mu=job.proximal_mu,
        )
        schema.admit(fit.update.arrays, fit.update.metrics)
        layout, codec, message = learner.layout, learner.codec, None
        if self._tracker is not None:
            samples = data.samples(job.position, server_round=job.server_round)
            delta = layout.flatten(fit.update.arrays)
            fit = replace(fit, state=self._tracker.after(fit.state, params, delta, samples))
        if codec is None:
            for name, view in layout.views(update).items():
                view.copy_(fit.update.arrays[name])
        else:
            fit = learner.encode(fit, server_round=job.server_round, device=job.device)
            self._sent.admit(fit.update.arrays, fit.update.metrics)
            update.copy_(decoded(codec, layout, fit.update.arrays))
            message = {name: value.numpy() for name, value in fit.update.arrays.items()}
        kept, norm = self._keep(job, state, fit.state), float(update.norm())
        passed = fit.num_samples
        return Done(
            job.row, fit.update.metrics, *kept, num_samples=passed, norm=norm, message=message
        )

    def _state(self, job: Job) -> DeviceState:
        if job.read_slot == UNWRITTEN:
            learner = self._learner
            memory = learner.initial_state(self._world.train, self._world.public).memory
        else:
            memory = self._file.read(job.device, job.read_slot, self._world.train)
        return DeviceState(memory, job.begun, job.consolidated)

    def _keep(
        self, job: Job, old: DeviceState, new: DeviceState
    ) -> tuple[tuple[int, int], int | None]:
        """Write a device's memory if it changed; return its progress and the checksum."""
        progress = (new.begun, new.consolidated)
        if new.memory is old.memory:
            return progress, None
        return progress, self._file.write(job.device, job.write_slot, new.memory)

    def _trial(self, job: Job, params: Tensor) -> Trial:
        data, state = SimulatedData(self._world, job.device), self._state(job)
        learner = self._learner
        samples = data.samples(job.position)
        most = self._world.scenario.runtime.num_calibration
        calibration = learner.calibration_ids(state, samples, most=most)
        own = learner.served(state, params, samples, position=job.position, device=job.device)
        return Trial(
            Samples(self._world.train, calibration),
            [
                self._world.test_samples(job.device, experience_id)
                for experience_id in range(self._world.stream.num_experiences)
            ],
            own,
            kept_in(state.memory, self._places),
        )

    def _prepare(self, serial: int, params: Tensor) -> Prepared:
        if self._prepared is None or self._prepared[0] != serial:
            model = self._learner.model
            model.module.eval()
            self._prepared = (serial, self._runtime.prepare(model, params))
        return self._prepared[1]
