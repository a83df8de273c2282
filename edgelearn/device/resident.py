"""A real device: it stores samples, not indices, and forgets those that it may not keep.

What its sensor shows is stored when it arrives and kept until the experience is consolidated; then
everything that the client strategy's memory does not refer to is erased. Here the sensor is the
device's part of the scenario's data set, so that a real fleet can be compared with a simulated one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgelearn.continual.memory import SampleSpec
from edgelearn.continual.strategy import Update
from edgelearn.device.evaluate import Counts, evaluate
from edgelearn.device.learner import Learner
from edgelearn.device.runtimes import kept_in, places_of, remembered
from edgelearn.device.store import Answer, DeviceStore, Stored
from edgelearn.device.tracking import Tracker
from edgelearn.errors import StateError
from edgelearn.runtime.protocol import Runtime
from edgelearn.scenario.samples import OwnedSamples, Samples
from edgelearn.scenario.stream import Experience
from edgelearn.scenario.world import World


@dataclass(frozen=True, slots=True)
class OwnedData:
    """A device's view of its own samples.

    Attributes:
        world: What its sensor shows.
        device: Index in the fleet.
        store: Its samples.
        ids: Where those of each position are that it still has.
    """

    world: World
    device: int
    store: OwnedSamples
    ids: Mapping[int, Tensor]

    def experience(self, position: int) -> Experience:
        """Return the experience at a position of its stream."""
        return self.world.stream.experience(self.device, position)

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:
        """Return the training samples at that position, or those that a round of it brings.

        Raises:
            StateError: If they are erased already.
        """
        if position not in self.ids:
            raise StateError(
                f"device {self.device} no longer has the samples of position {position}"
            )
        ids = self.ids[position]
        part, count = self.world.stream.part(server_round)
        return Samples(self.store, ids[len(ids) * part // count : len(ids) * (part + 1) // count])


class ResidentDevice:
    """One device between two instructions: nothing in memory, everything in its store.

    Each method reads the state afresh and returns the new one, which `commit` makes durable: so
    whatever fails in between, up to the power, leaves the device as it was.
    """

    def __init__(
        self, world: World, learner: Learner, runtime: Runtime, store: DeviceStore, *, device: int
    ) -> None:
        if not 0 <= device < world.scenario.fleet.num_devices:
            raise StateError(
                f"there is no device {device} in the scenario {world.scenario.name!r}: its fleet "
                f"has {world.scenario.fleet.num_devices}, counted from 0"
            )
        self._world, self._learner, self._runtime = world, learner, runtime
        self._store, self._device = store, device

    def fit(
        self,
        params: Tensor,
        *,
        position: int,
        server_round: int,
        proximal_mu: float = 0.0,
        admit: Callable[[Update], None] | None = None,
    ) -> tuple[Update, Stored]:
        """Train on the experience at a position; the same question gets the same answer.

        Args:
            params: Global parameters [P].
            position: Where the device is in its stream.
            server_round: Round, from 1.
            proximal_mu: FedProx's mu.
            admit: The guard's look at an update before it is encoded; raises if it may not leave.

        Returns:
            What is to be sent (what the scenario's codec made, if there is one), once the guard has
            admitted it, and the new state.
        """
        stored, question = self._load(), _fingerprint(params)
        last = stored.answer
        if last is not None and (last.server_round, last.question) == (server_round, question):
            return last.update, stored
        with _one_thread():
            data = self._reach(stored, position)
            fit = self._learner.fit(
                stored.state,
                params,
                data,
                position=position,
                server_round=server_round,
                proximal_mu=proximal_mu,
            )
            if admit is not None:
                admit(fit.update)
            if (tracker := Tracker.of(self._world, self._learner, self._runtime)) is not None:
                samples = data.samples(position, server_round=server_round)
                delta = self._learner.layout.flatten(fit.update.arrays)
                fit = replace(fit, state=tracker.after(fit.state, params, delta, samples))
            fit = self._learner.encode(fit, server_round=server_round, device=self._device)
        answer = Answer(server_round, question, fit.update)
        return fit.update, self._forget(replace(stored, state=fit.state, answer=answer), data)

    def consolidate(self, params: Tensor, *, position: int) -> tuple[int, Stored]:
        """Consolidate all experiences up to and with that at a position, then forget their samples.

        Returns:
            Number of samples of the experience at the position, and the new state.
        """
        stored = self._load()
        count = len(self._world.train_samples(self._device, position))
        if stored.state.consolidated > position:
            return count, stored
        with _one_thread():
            data = self._reach(stored, position)
            state = self._learner.consolidate(stored.state, params, data, upto=position + 1)
        return count, self._forget(replace(stored, state=state), data)

    def evaluate(self, params: Tensor, *, position: int) -> tuple[Counts, Stored | None]:
        """Measure the served and the float model on the device's own test samples.

        The served model is calibrated on what the sensor shows at the position, and on what the
        device keeps; no sample of it is stored.

        Returns:
            The counts, and the new state where it has observed activation ranges to keep.
        """
        stored, model = self._load(), self._learner.model
        with _one_thread():
            data = self._reach(stored, position)
            samples = data.samples(position)
            most = self._world.scenario.runtime.num_calibration
            ids = self._learner.calibration_ids(stored.state, samples, most=most)
            own = self._learner.served(
                stored.state, params, samples, position=position, device=self._device
            )
            calibration = data.store.batch(ids).x
            model.module.eval()
            tests = [
                self._world.test_samples(self._device, experience_id)
                for experience_id in range(self._world.stream.num_experiences)
            ]
            with torch.no_grad():
                prepared = self._runtime.prepare(model, own)
                kept = kept_in(stored.state.memory, places_of(self._world, self._runtime, model))
            counts = evaluate(model, own, prepared, calibration, tests, kept=kept)
        if counts.kept is None:
            return counts, None
        before = self._load()  # without the samples that were shown for this
        memory = remembered(before.state.memory, counts.kept)
        return counts, replace(before, state=replace(before.state, memory=memory))

    def commit(self, stored: Stored) -> None:
        """Make a new state durable."""
        self._store.save(stored, self._learner.declaration)

    # -- samples -----------------------------------------------------------------------------------

    def _load(self) -> Stored:
        encoding = self._world.train.encoding
        stored = self._store.load(self._learner.declaration, encoding)
        if stored is not None:
            return stored
        train, public = self._world.train, None
        samples = OwnedSamples.empty(self._world.sample_shape, train.x.dtype, encoding)
        if self._learner.needs_public:
            ids = self._world.public
            public = samples.add(train.stored(ids), train.labels(ids))
        return Stored(self._learner.initial_state(samples, public), samples)

    def _reach(self, stored: Stored, position: int) -> OwnedData:
        """Take in what the sensor has shown up to a position and is not consolidated."""
        ids = dict(stored.pending)
        for reached in sorted({position, *range(stored.state.consolidated, position + 1)}):
            if reached not in ids:
                shown = self._world.train_samples(self._device, reached)
                ids[reached] = stored.samples.add(self._world.train.stored(shown.ids), shown.labels)
        return OwnedData(self._world, self._device, stored.samples, ids)

    def _forget(self, stored: Stored, data: OwnedData) -> Stored:
        """Erase every sample that is neither remembered nor still to be consolidated."""
        pending = {p: ids for p, ids in data.ids.items() if p >= stored.state.consolidated}
        remembered = [
            stored.state.memory[name]
            for name, spec in self._learner.declaration.items()
            if isinstance(spec, SampleSpec)
        ]
        none = torch.empty(0, dtype=torch.int32)
        stored.samples.retain(torch.cat([none, *remembered, *pending.values()]))
        return replace(stored, pending=pending)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Work with one torch thread: more would change the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fingerprint(params: Tensor) -> str:
    raw = params.detach().contiguous().view(torch.uint8).numpy().data
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
