"""`ClientStrategy`: how a device learns. Three ideas: batch, memory, loss.

Every hook is a pure function of tensors: it returns new values and changes none that it was given.
So the same class trains one real device and a stacked cohort of simulated ones. Where it can, a
strategy *declares* what it does (`rehearsal`, `pull`) instead of computing it: then every engine,
compiled ones included, can run it. A device calls

1. `start` when an experience begins,
2. for each step `extend`, `loss`, `adjust`, the optimizer's step, `proximal`, `after_step`,
3. `upload` on what it is about to send,
4. `finish` once, when the experience has ended, on the final **global** parameters. Never at each
   round: that would add an anchor to EWC in every round, and pin it to half-learned parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor

from edgelearn import plugins
from edgelearn.continual.memory import Declaration, Memory
from edgelearn.errors import Fault, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.scenario.stream import Experience


@dataclass(frozen=True, slots=True)
class Facts:
    """What a strategy may know before any data arrives.

    Attributes:
        num_experiences: Length of the stream.
        num_classes: Number of labels, C.
        sample_bytes: Bytes of one stored sample with its label.
    """

    num_experiences: int
    num_classes: int
    sample_bytes: int


@dataclass(frozen=True, slots=True)
class Update:
    """What a device is about to send. The egress guard looks at it before it leaves.

    Attributes:
        arrays: local - global, by tensor name, float32.
        metrics: Scalars by name.
    """

    arrays: Mapping[str, Tensor]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Stored samples that join the batch of every step.

    Attributes:
        buffer: Name of the sample ids in memory.
        count: Samples per step; 0 is as many as arrive.
        share: Part of the loss that they get, in [0, 1]; None weighs all samples alike.
    """

    buffer: str
    count: int = 0
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Pull:
    """A quadratic penalty h(theta) = (strength / 2) sum_i F_i (theta_i - anchor_i)^2.

    Implicit, it is taken after the optimizer's step: argmin_z h(z) + |z - theta|^2 / (2 lr), which
    is theta + w (anchor - theta) with w = s F / (1 + s F), s = lr * strength. That can't diverge.
    Explicit, its gradient joins that of the loss, and diverges once s F > 2.

    Attributes:
        curvature: Name of F in memory [T], float32, not negative.
        anchor: Name of the anchor in memory [T], float32.
        strength: Factor.
        is_explicit: Whether it is taken as a gradient.
    """

    curvature: str
    anchor: str
    strength: float
    is_explicit: bool = False

    def weight(self, memory: Memory, *, lr: float) -> Tensor:
        """Return w [T] of the implicit step."""
        stiffness = memory[self.curvature] * (lr * self.strength)
        return stiffness / (1 + stiffness)

    def gradient(self, params: Tensor, memory: Memory) -> Tensor:
        """Return the gradient [T]."""
        return self.strength * memory[self.curvature] * (params - memory[self.anchor])


def supervised_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy, within the classes of the sample's task where there are tasks.

    Args:
        logits: [B, C].
        batch: Its `weight` weighs samples; without one all count alike.

    Returns:
        Scalar, in nats.
    """
    if batch.mask is not None:
        logits = logits.masked_fill(~batch.mask, float("-inf"))
    if batch.weight is None:
        return F.cross_entropy(logits, batch.y)
    return (F.cross_entropy(logits, batch.y, reduction="none") * batch.weight).sum()


class ClientStrategy:
    """Base class: plain fine-tuning. Override what the method needs, nothing else.

    Example:
        A strategy that pulls a device towards where the experience began::

            class StayClose(ClientStrategy):
                def __init__(self, *, strength: float = 0.1) -> None:
                    self.strength = strength

                def declare(self, model, facts):
                    return {"anchor": TensorSpec((model.layout.num_trained,))}

                def start(self, model, params, memory, experience):
                    return memory.replace(anchor=params.clone())

                def loss(self, model, params, batch, memory):
                    distance = (params - memory["anchor"]).square().sum()
                    return super().loss(model, params, batch, memory) + self.strength * distance
    """

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare what the device remembers: name -> `TensorSpec` or `SampleSpec`."""
        return {}

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,  # noqa: ARG002
    ) -> Memory:
        """Begin an experience, with the global parameters [T] that the device then has."""
        return memory

    def rehearsal(self) -> Rehearsal | None:
        """Declare which stored samples join every batch; what it returns must not change."""
        return None

    def pull(self) -> Pull | None:
        """Declare a quadratic penalty; what it returns must not change."""
        return None

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        """Change the batch of a step; by default it is joined by what `rehearsal` declares."""
        rehearsal = self.rehearsal()
        if rehearsal is None:
            return batch
        past = memory.draw(rehearsal.buffer, rehearsal.count or len(batch), generator)
        return batch.join(past, share=rehearsal.share)

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:  # noqa: ARG002
        """Return the scalar to minimize, a function of the trained parameters [T]."""
        return supervised_loss(model(params, batch.x), batch)

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        """Change the gradient [T] of the loss, as projection and control variates do.

        By default the gradient of an explicit `pull` is added.
        """
        pull = self.pull()
        if pull is None or not pull.is_explicit:
            return gradients
        return gradients + pull.gradient(params, memory)

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:
        """Take the implicit step of a penalty after the optimizer's step: [T] -> [T].

        By default that of an implicit `pull`.
        """
        pull = self.pull()
        if pull is None or pull.is_explicit:
            return params
        return params.lerp(memory[pull.anchor], pull.weight(memory, lr=lr))

    def after_step(
        self,
        before: Tensor,  # noqa: ARG002
        after: Tensor,  # noqa: ARG002
        gradients: Tensor,  # noqa: ARG002
        memory: Memory,
    ) -> Memory:
        """Keep account of a step, as path integrals do; all vectors are [T]."""
        return memory

    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:  # noqa: ARG002
        """Change what is sent, such as clipping it. The guard stops what is not declared."""
        return update

    def finish(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        data: Samples,  # noqa: ARG002
        memory: Memory,
        generator: Generator,  # noqa: ARG002
    ) -> Memory:
        """Consolidate an experience that has ended.

        Args:
            model: The network.
            params: Global parameters [T] at the end of the experience.
            data: The device's training samples of that experience; may be empty.
            memory: What the device remembers.
            generator: Source of randomness.
        """
        return memory

    @property
    def is_declared(self) -> bool:
        """Whether local training is plain but for what `rehearsal` and `pull` declare."""
        return not any(map(self.overrides, ("extend", "loss", "adjust", "proximal", "after_step")))

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; engines skip those that it leaves alone."""
        return getattr(type(self), hook) is not getattr(ClientStrategy, hook)


def make_strategy(reference: str, arguments: Mapping[str, Any]) -> ClientStrategy:
    """Build a client strategy by name, `module:Class` or `file.py:Class`.

    Raises:
        PluginError: If the reference leads nowhere.
        ScenarioError: If it is not a client strategy, or does not take the arguments.
    """
    found = plugins.resolve(reference, plugins.CLIENT_STRATEGIES)
    if not (isinstance(found, type) and issubclass(found, ClientStrategy)):
        message = f"{reference} is not a subclass of edgelearn.ClientStrategy"
        raise ScenarioError(reference, [Fault("client", "strategy", message)])
    faults = plugins.argument_faults(found, arguments, "client.args")
    if faults:
        raise ScenarioError(reference, faults)
    try:
        strategy: ClientStrategy = found(**arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError(reference, [Fault("client", "args", str(error))]) from error
    return strategy
