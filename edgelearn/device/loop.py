"""The loop of a device's life: infer -> feedback -> learn, with or without a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edgelearn.continual.memory import SampleSpec
from edgelearn.device.learner import Learner
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.errors import StateError
from edgelearn.files import write_atomic
from edgelearn.runtime.protocol import Predictor, Runtime
from edgelearn.runtime.ranges import KeptRanges, Recalibrate
from edgelearn.scenario.samples import EMPTY, Encoding, OwnedSamples, Samples
from edgelearn.scenario.stream import Experience


@dataclass(frozen=True, slots=True)
class _Fed:
    """What a device learns from: the samples on which it got feedback in this experience."""

    store: OwnedSamples
    ids: Tensor
    device: int = 0

    def experience(self, position: int) -> Experience:
        classes = sorted(set(self.store.labels(self.ids).tolist()))
        return Experience(position, position, tuple(classes))

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:  # noqa: ARG002
        return Samples(self.store, self.ids)


@final
class DeviceLoop:
    """One device that answers with its served model and learns from what it is told.

    State (memory, samples, local parameters) survives the process: everything that a method
    changed is durable when it returns.

    Example:
        See `examples/device_loop.py`.
    """

    def __init__(
        self,
        learner: Learner,
        runtime: Runtime,
        directory: Path,
        *,
        encoding: Encoding,
        sample_shape: tuple[int, ...],
        sample_dtype: torch.dtype = torch.uint8,
        num_calibration: int = 64,
        recalibrate: Recalibrate = "always",
    ) -> None:
        """Wake the device up, or start a new one where the directory holds none.

        Args:
            learner: Network and client strategy.
            runtime: What it answers with.
            directory: Where its state lies.
            encoding: How stored samples become inputs.
            sample_shape: Shape of a stored sample.
            sample_dtype: Its dtype.
            num_calibration: Own samples for the calibration of the served model.
            recalibrate: When ranges of activations are observed on these: for each new model
                ("always"), or only when a few of them no longer fit the ranges observed before
                ("on-drift", see `edgelearn.runtime.ranges`); after a start always.

        Raises:
            ValueError: If `recalibrate` is anything else.
            StateError: If the stored state is damaged or of another network, or the strategy learns
                from public samples, which nobody gives a device here.
        """
        if recalibrate not in get_args(Recalibrate):
            allowed = ", ".join(get_args(Recalibrate))
            raise ValueError(f"recalibrate is {recalibrate!r}; allowed are {allowed}")
        self._learner, self._runtime = learner, runtime
        self._ranges = KeptRanges() if recalibrate == "on-drift" else None
        self._store = DeviceStore(directory, digest=learner.layout.digest)
        self._parameters = directory / "parameters.safetensors"
        self._num_calibration = num_calibration
        stored = self._store.load(learner.declaration, encoding)
        if stored is None:
            samples = OwnedSamples.empty(sample_shape, sample_dtype, encoding)
            stored = Stored(learner.initial_state(samples), samples)
        _refuse_without_public(learner, stored)
        self._stored: Stored = stored
        self._params, self._num_lessons = learner.initial(), 0
        if self._parameters.is_file():
            self._params, self._num_lessons = self._read_params()
        self._predictor: Predictor | None = None

    @property
    def position(self) -> int:
        """Position in its stream: experiences that have ended."""
        return self._stored.state.consolidated

    @property
    def params(self) -> Tensor:
        """Local float parameters [P]."""
        return self._params.clone()

    def adopt(self, params: Tensor) -> None:
        """Take parameters [P] from elsewhere, such as the fleet's."""
        if params.shape != self._params.shape:
            raise StateError(
                f"got parameters {tuple(params.shape)}, the network has {tuple(self._params.shape)}"
            )
        self._replace_params(params.clone())

    def infer(self, x: Tensor) -> Tensor:
        """Answer with the served model.

        Args:
            x: Stored samples [n, ...].

        Returns:
            Labels [n], int64.
        """
        none = torch.zeros(len(x), dtype=torch.int64)
        inputs = self._stored.samples.encoding.decode(x, none).x
        self._learner.model.module.eval()
        with torch.no_grad():
            if self._predictor is None:
                state, samples = self._stored.state, self._fed().samples(0)
                most = self._num_calibration
                ids = self._learner.calibration_ids(state, samples, most=most)
                calibration = self._stored.samples.batch(ids).x
                own = self._learner.served(
                    state, self._params, samples, position=self.position, device=0
                )
                prepared = self._runtime.prepare(self._learner.model, own)
                if self._ranges is None:
                    self._predictor = prepared.calibrated(calibration)
                else:
                    self._predictor = self._ranges.predictor(prepared, calibration)
            return self._predictor(inputs).argmax(1)

    def feedback(self, x: Tensor, labels: Tensor) -> None:
        """Store what the right answers were [n], to learn from later."""
        ids = self._stored.samples.add(x, labels)
        pending = torch.cat([self._fed().ids, ids])
        self._commit(replace(self._stored, pending={self.position: pending}))
        if self._learner.strategy.overrides("serve"):  # the answer may depend on these samples
            self._predictor = None

    def learn(self) -> float:
        """Train on the feedback of this experience; return the mean loss, 0 without feedback.

        Raises:
            DivergenceError: If training diverged; the device is as it was.
        """
        lesson = self._num_lessons + 1
        fit = self._learner.fit(
            self._stored.state,
            self._params,
            self._fed(),
            position=self.position,
            server_round=lesson,
        )
        delta = self._learner.layout.flatten(fit.update.arrays)
        self._commit(replace(self._stored, state=fit.state))
        self._num_lessons = lesson
        self._replace_params(self._params + delta)
        return float(fit.update.metrics["loss"])

    def end_experience(self) -> None:
        """Consolidate what was learned, and erase the samples that need not be remembered."""
        upto = self.position + 1
        state = self._learner.consolidate(self._stored.state, self._params, self._fed(), upto=upto)
        kept = [
            state.memory[name]
            for name, spec in self._learner.declaration.items()
            if isinstance(spec, SampleSpec)
        ]
        self._stored.samples.retain(torch.cat([torch.empty(0, dtype=torch.int32), *kept]))
        self._commit(replace(self._stored, state=state, pending={}))
        self._predictor = None

    def _read_params(self) -> tuple[Tensor, int]:
        try:
            with safe_open(self._parameters, framework="pt") as file:
                lessons = int((file.metadata() or {})["lessons"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise StateError(f"{self._parameters}: damaged or truncated: {error}") from error
        return self._learner.layout.flatten(tensors), lessons

    def _fed(self) -> _Fed:
        ids = self._stored.pending.get(self.position, torch.empty(0, dtype=torch.int32))
        return _Fed(self._stored.samples, ids)

    def _commit(self, stored: Stored) -> None:
        self._store.save(stored, self._learner.declaration)
        self._stored = stored

    def _replace_params(self, params: Tensor) -> None:
        views = self._learner.layout.views(params)
        tensors = {name: view.contiguous() for name, view in views.items()}
        write_atomic(self._parameters, save(tensors, {"lessons": str(self._num_lessons)}))
        self._params, self._predictor = params, None


def _refuse_without_public(learner: Learner, stored: Stored) -> None:
    """Refuse a strategy that learns with others by public samples, where the device has none."""
    for name, spec in learner.declaration.items():
        if not isinstance(spec, SampleSpec) or not spec.is_public:
            continue
        if bool((stored.state.memory[name] == EMPTY).any()):
            raise StateError(
                f"{learner.spec.strategy!r} learns with other devices by public samples, and this "
                "device has none: it would learn alone. Take a strategy that needs none, or let "
                "the device be one of a fleet, which gets them from [data] public"
            )
