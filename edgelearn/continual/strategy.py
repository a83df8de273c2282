"""`ClientStrategy`: how a device learns. Three ideas: batch, memory, loss.

Every hook is a pure function of tensors: it returns new values and changes none that it was given.
So the same class trains one real device and a stacked cohort of simulated ones. A device calls

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

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:  # noqa: ARG002
        """Change the batch of a step, as replay does."""
        return batch

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:  # noqa: ARG002
        """Return the scalar to minimize, a function of the trained parameters [T]."""
        return supervised_loss(model(params, batch.x), batch)

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        """Change the gradient [T] of the loss, as projection and control variates do."""
        return gradients

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:  # noqa: ARG002
        """Take the implicit step of a penalty after the optimizer's step: [T] -> [T].

        For a penalty h this is argmin_z h(z) + |z - params|^2 / (2 lr); it can't diverge, where
        the gradient of a steep h does.
        """
        return params

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
