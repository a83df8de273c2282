"""What a device needs in memory to learn and to answer: the sum, component by component.

A step is computed, not looked up: the device's own training code takes steps on real samples while
each tensor is followed (`device.counting`), and what is alive at the highest moment is told apart.
So whatever a strategy, an optimizer or an option does to a step is in the sum. Counted are

- `weights`: the parameters as they came, the device's copy of them and the network's own, 4 bytes a
  number each, and its buffers;
- `gradients`: of the parameters that take steps;
- `optimizer`: momentum or Adam's moments, and what a strategy keeps from one step to the next;
- `activations`: what the forward pass made and the backward pass still needs;
- `working`: what is on its way at that moment, such as derivatives by activations, and gradients
  that are about to be used, and states of torch's generator (5 KB each);
- `kernels`: what the kernel of a convolution holds in a layout of its own, by a rule
  (`device.counting`);
- `batch`: samples that are decoded to float32;
- `strategy`: tensors that the client strategy remembers, and a codec's residual;
- `buffer`: samples that it keeps, as they are stored;
- `served`: the int8 model (or whatever the runtime makes of it) that answers meanwhile;
- `message`: the update, encoded, where sending it is what takes most;
- `overhead`: what the caller says that everything else takes.

Not counted: what other kernels use, the interpreter, libraries and code, and consolidation at
the end of an experience (Fisher, choosing exemplars), which takes no steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from edgelearn.continual.local import Trained
from edgelearn.continual.memory import Memory, SampleSpec
from edgelearn.device.blocks import blocks_of
from edgelearn.device.counting import KERNEL, Count, Storage
from edgelearn.device.learner import Learner
from edgelearn.device.training import Step, Training
from edgelearn.params import FlatModel
from edgelearn.runtime.protocol import Runtime
from edgelearn.scenario.samples import EMPTY, Samples, SampleStore
from edgelearn.scenario.stream import Experience

COMPONENTS = (
    "weights", "gradients", "optimizer", "activations", "working", "kernels", "batch", "strategy",
    "buffer", "served", "message", "overhead",
)  # fmt: skip
_STEPS = 2  # in the first there are no moments yet


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes at the highest moment of something.

    Attributes:
        parts: Bytes by component; see the module.
    """

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Needs:
    """What a device needs.

    Attributes:
        step: In a step of training.
        sending: Once the steps are taken and the update is made.
        answering: To answer with a batch of one, while it does not train.
        made: Of a step, what it makes itself.
    """

    step: Footprint
    sending: Footprint
    answering: Footprint
    made: Mapping[str, int]

    @property
    def training(self) -> Footprint:
        """The larger one of those that come one after the other in a round."""
        return max(self.step, self.sending, key=lambda footprint: footprint.total)


def needs(
    learner: Learner,
    runtime: Runtime,
    samples: Samples,
    *,
    overhead_bytes: int = 0,
    proximal_mu: float = 0.0,
) -> Needs:
    """Compute what a device needs, by taking a few steps.

    Args:
        learner: How it learns.
        runtime: What it answers with.
        samples: What it has of an experience, at least one sample.
        overhead_bytes: What everything else takes: interpreter, libraries, system.
        proximal_mu: FedProx's mu, as the server sends it.
    """
    layout = learner.model.layout
    given = learner.model.initial()
    served = runtime.prepare(learner.model, given).calibrated(samples.batch(slice(1)).x)
    always = {
        "strategy": sum(
            spec.stored_bytes
            for spec in learner.declaration.values()
            if not isinstance(spec, SampleSpec)
        ),
        "buffer": sum(
            spec.device_bytes(learner.facts.sample_bytes)
            for spec in learner.declaration.values()
            if isinstance(spec, SampleSpec)
        ),
        "served": served.model_bytes,
        "overhead": overhead_bytes,
    }
    vector, own = 4 * layout.size, _own_bytes(learner.model)
    counted = count_steps(learner, samples, proximal_mu=proximal_mu)
    step = Counter(always | {"weights": vector + own}) + Counter(counted)
    message = _message_bytes(learner) + (vector if learner.holds_parameters else 0)
    sending = {"weights": 2 * vector + own, "message": message}
    answering = {
        "working": _answer_bytes(learner.model, given, samples),
        "served": served.model_bytes,
        "overhead": overhead_bytes,
    }
    parts = _ordered(step), _ordered(sending | always), _ordered(answering)
    return Needs(*parts, MappingProxyType(counted))


def count_steps(learner: Learner, samples: Samples, *, proximal_mu: float = 0.0) -> dict[str, int]:
    """Return the bytes at the highest moment of a few steps, by component.

    Only what the steps make themselves: neither the parameters that a device gets and the network's
    own, nor what it remembers.
    """
    count = Count()
    round_ = Round.of(learner, samples, proximal_mu=proximal_mu)
    count.phase = _BEFORE if round_.has_steps else _STEP
    counted = _Counted(round_.training.model, round_.training.strategy, round_.training.spec, count)
    with count:
        replace(round_, training=counted).run()
    found: dict[str, int] = {}
    for storage in count.at_peak:
        name = _component(storage, count)
        found[name] = found.get(name, 0) + storage.num_bytes
    if count.has_backward:
        states = 1 + (_num_again(round_.training) if learner.spec.checkpoint else 0)
        random = states * torch.default_generator.get_state().nbytes
        found["working"] = found.get("working", 0) + random
    found = {name: num_bytes for name, num_bytes in found.items() if num_bytes}
    if round_.has_entered:
        found["weights"] = found.get("weights", 0) + 4 * learner.model.layout.size
    return found


@dataclass(frozen=True, slots=True)
class Round:
    """A few steps of a device in its second experience, to be counted or measured.

    Attributes:
        training: How it trains.
        params: Parameters to begin with [P].
        memory: What it remembers, its buffers full.
        samples: What it has of the experience.
        mu: Of all proximal terms.
        has_entered: Whether it begins with others than those that the server sent.
        has_steps: Whether it trains step by step.
    """

    training: Training
    params: Tensor
    memory: Memory
    samples: Samples
    mu: float
    has_entered: bool
    has_steps: bool

    @classmethod
    def of(cls, learner: Learner, samples: Samples, *, proximal_mu: float = 0.0) -> Round:
        """Return the round of a learner; the last of what is not counted."""
        strategy, spec = learner.strategy, learner.spec
        params = entered = learner.whole(learner.initial_state(samples.store), learner.initial())
        memory = in_mid_life(learner, samples)
        if strategy.overrides("enter"):
            entered, memory = strategy.enter(learner.model, params, memory)
        has_steps = not strategy.overrides("fit")
        if has_steps:
            spec = replace(spec, steps=_STEPS)
        training = Training(learner.model, strategy, spec)
        mu = proximal_mu + strategy.proximity()
        return cls(training, entered, memory, samples, mu, entered is not params, has_steps)

    def run(self) -> Trained:
        """Take the steps."""
        return self.training.run(
            self.params, self.memory, self.samples, seed=0, proximal_mu=self.mu
        )


def in_mid_life(learner: Learner, samples: Samples) -> Memory:
    """Return the memory of a device that is in its second experience, with its buffers full."""
    data, first, given = _Data(samples), learner.initial_state(samples.store), learner.initial()
    params = learner.whole(first, given)
    memory = learner.consolidate(first, given, data, upto=1).memory
    filled = {}
    for name, spec in learner.declaration.items():
        if isinstance(spec, SampleSpec) and spec.capacity:
            ids = memory[name]
            others = samples.ids[torch.arange(len(ids)) % len(samples)].to(ids.dtype)
            filled[name] = torch.where(ids == EMPTY, others, ids)
    memory = memory.replace(**filled)
    if learner.facts.num_experiences > 1:
        trained = params[: learner.model.layout.num_trained]
        memory = learner.strategy.start(learner.model, trained, memory, data.experience(1))
    return memory


_BEFORE, _BATCH, _STEP = "before", "batch", "step"


def _num_again(training: Training) -> int:
    """Return how many states of torch's generator wait for blocks to be computed again."""
    found = blocks_of(training.model.module)
    return sum(len(blocks.blocks) - blocks.num_kept for blocks in found)


def _component(storage: Storage, count: Count) -> str:
    """Tell what something was that was there at the peak."""
    if storage.phase == KERNEL:
        return "kernels"
    if storage.phase == _BATCH:
        return "batch"
    if storage.phase == _BEFORE:  # copies of parameters; room for a gradient; what a pull weighs
        return {"aten.clone.default": "weights", "aten.empty_like.default": "gradients"}.get(
            storage.operation, "strategy"
        )
    if storage.is_backward:
        if storage.is_graph:
            return "activations"  # computed again
        if storage.step == count.peak_step:
            return "gradients" if storage.outlives_backward else "working"
    if storage.step < count.peak_step:
        return "optimizer"
    # The written-out pass records no graph, and what it makes it needs on the way back.
    return "activations" if storage.is_graph or not count.has_backward else "working"


@dataclass(frozen=True, slots=True)
class _Counted(Training):
    """Training that tells a count where it is."""

    count: Count

    def steps(self, samples: Samples, memory: Memory, seed: int) -> Iterator[Step]:
        self.count.phase = _BATCH
        for step in Training.steps(self, samples, memory, seed):
            self.count.phase = _STEP
            self.count.step += 1
            yield step
            self.count.phase = _BATCH


@dataclass(frozen=True, slots=True)
class _Data:
    """A device that has the same samples in each experience."""

    present: Samples
    device: int = 0

    @property
    def store(self) -> SampleStore:
        return self.present.store

    def experience(self, position: int) -> Experience:
        labels = tuple(sorted(set(self.present.labels.tolist())))
        return Experience(position, position, labels)

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:  # noqa: ARG002
        return self.present


def _own_bytes(model: FlatModel) -> int:
    """Return the bytes of a network's own tensors, and of those that it keeps beside."""
    tensors = (*model.module.parameters(), *model.module.buffers())
    own = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return own + 4 * (model.layout.size - model.layout.num_trained)


def _message_bytes(learner: Learner) -> int:
    """Return the bytes of an update as it is sent, and of the vector that it is encoded from."""
    vector = 4 * learner.layout.size
    if learner.codec is None:
        return vector
    pieces = learner.codec.pieces(learner.layout).values()
    return vector + sum(math.prod(piece.shape) * piece.dtype.itemsize for piece in pieces)


@torch.no_grad()
def _answer_bytes(model: FlatModel, params: Tensor, samples: Samples) -> int:
    """Return the bytes of one input and of what lies between the layers, of the float network."""
    model.carry(params)
    model.module.eval()
    count = Count()
    with count:
        model(params[: model.layout.num_trained], samples.batch(slice(1)).x)
    return count.peak


def _ordered(parts: Mapping[str, int]) -> Footprint:
    known = {name: parts[name] for name in COMPONENTS if parts.get(name)}
    return Footprint(MappingProxyType(known))
