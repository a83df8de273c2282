"""`ClientStrategy`: how a device learns. Three ideas: batch, memory, loss.

Every hook is a pure function of tensors: it returns new values and changes none that it was given.
So the same class trains one real device and a stacked cohort of simulated ones. Where it can, a
strategy *declares* what it does (`rehearsal`, `pull`, `path`) instead of computing it: then every
engine, compiled ones included, can run it. A device calls

1. `start` when an experience begins,
2. `enter` in each round, with the global parameters, and asks `is_frozen`: then 3 is left out,
3. for each step `extend`, `gradient` (by default that of `loss`) of the network as `view` shows it,
   `adjust`, the optimizer's step, `proximal`, `after_step`; a strategy that has no such steps
   overrides `fit` instead,
4. `leave` in each round, with what came of it, and `upload` on what it is about to send,
5. `finish` once, when the experience has ended, on the final **global** parameters. Never at each
   round: that would add an anchor to EWC in every round, and pin it to half-learned parameters,
6. `serve` whenever it has new parameters to answer with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgelearn import plugins
from edgelearn.continual.local import LocalTask, Passage, Trained
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.path import PathIntegral
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
        num_devices: Devices in the fleet.
        cohort: Devices that take part in a round.
        num_public: Samples that all devices have, and none as its own.
    """

    num_experiences: int
    num_classes: int
    sample_bytes: int
    num_devices: int = 1
    cohort: int = 1
    num_public: int = 0


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
    Explicit, its gradient joins that of the loss, and diverges once s F > 2. Curvature and anchor
    are those of the round's beginning, for all of its steps.

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


ROUND_HOOKS = ("enter", "is_frozen", "fit", "leave")
STEP_HOOKS = ("view", "extend", "gradient", "loss", "adjust", "proximal", "after_step")


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

    Attributes:
        replaces_loss: Whether `loss` stands in place of cross-entropy, so that it can't be combined
            with another that does; one that adds to `super().loss(...)` leaves it False.
        needs_plain_sgd: Whether momentum and Adam are refused: it reads the mean gradient off where
            a device has come to, or has no room for an optimizer's state.
        keeps_network: Whether a device's network is its own: it stays on the device from round to
            round, and what `shares` declares is all that travels. Where a hook is given global
            parameters, their network is then the device's own. Devices may hold different networks
            if what is shared has the same shapes for all.
    """

    replaces_loss: ClassVar[bool] = False
    needs_plain_sgd: bool = False
    keeps_network: bool = False

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare what the device remembers: name -> `TensorSpec` or `SampleSpec`."""
        return {}

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:  # noqa: ARG002
        """Declare what travels beside the network: name -> `TensorSpec`, float32, zeros at first.

        It lies behind the network in every parameter vector [P] (`model.layout.shared(params)`):
        the server sends its value to each device of a cohort, devices change it in `leave`, and
        the server strategy combines their changes as it combines those of parameters, FedAvg with
        weights in proportion to the devices' samples.
        """
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

    def path(self) -> PathIntegral | None:
        """Declare a path integral, to be kept by whoever takes the steps; it must not change."""
        return None

    def proximity(self) -> float:
        """Declare mu of FedProx's term (mu / 2) |theta - global|^2; it must not change."""
        return 0.0

    def enter(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        """Begin a round: return the parameters to train from, and the memory.

        Args:
            model: The network.
            params: Global parameters [P].
            memory: What the device remembers.
        """
        return params, memory

    def is_frozen(self, memory: Memory) -> bool:  # noqa: ARG002
        """Whether the network is not to be trained any more: the device then takes no steps."""
        return False

    def fit(self, task: LocalTask) -> Trained:
        """Replace local training as a whole, for methods that do not go step by step.

        Such a strategy trains device by device; of the hooks for steps none is called.
        """
        raise NotImplementedError(f"{type(self).__name__} trains step by step")

    def view(self, model: FlatModel) -> FlatModel:
        """Return the network as `gradient` and `loss` are to see it: the network itself by default.

        For methods that change what a network makes of its parameters and inputs, such as fake
        quantization, whatever the loss is. What it returns overrides `FlatModel.forward`, shares
        everything with the network, and keeps nothing. Such a strategy trains device by device.
        """
        return model

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

    def gradient(
        self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Return a step's loss (scalar) and gradient [T], both without a graph.

        For methods that need more than one gradient; by default that of `loss`.
        """
        with torch.enable_grad():
            leaf = params.detach().requires_grad_()
            loss = self.loss(model, leaf, batch, memory)
            (gradients,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradients

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

        By default that of an implicit `pull`. A strategy with a `view` or `gradient` of its own
        may draw here from torch's global generator, as dropout does: the device seeds it.
        """
        pull = self.pull()
        if pull is None or pull.is_explicit:
            return params
        return params.lerp(memory[pull.anchor], pull.weight(memory, lr=lr))

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        """Keep account of a step; all vectors are [T], and the gradient is what `adjust` returned.

        By default the step is added to the `path` that is declared.
        """
        path, pull = self.path(), self.pull()
        if path is None:
            return memory
        if pull is not None and pull.is_explicit:
            gradients = gradients - pull.gradient(before, memory)
        return path.along(before, after, gradients, memory)

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """End a round: return the local parameters [P] to be sent, and the memory.

        What is sent is their difference to the global ones. Whatever is to stay on the device has
        to be put back to its value in `passage.given`.
        """
        return passage.local, memory

    def num_beside(self, memory: Memory) -> int:  # noqa: ARG002
        """Return how many samples were trained on in a round beside its steps, for the accounts.

        Args:
            memory: As `leave` returned it.
        """
        return 0

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

    def serve(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,
        memory: Memory,  # noqa: ARG002
        data: Samples,  # noqa: ARG002
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Return the parameters [P] that the device answers with: the global ones by default.

        This is where a device has a head of its own, class prototypes, or adapts before it
        answers. Quantization comes after.

        Args:
            model: The network.
            params: Global parameters [P].
            memory: What the device remembers.
            data: The device's training samples of its current experience; may be empty.
            generator: Source of randomness.
        """
        return params

    @property
    def is_declared(self) -> bool:
        """Whether a round is plain but for `rehearsal`, `pull`, `path` and `proximity`."""
        return not any(map(self.overrides, (*ROUND_HOOKS, *STEP_HOOKS)))

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; engines skip those that it leaves alone."""
        return getattr(type(self), hook) is not getattr(ClientStrategy, hook)


def make_strategy(reference: str, arguments: Mapping[str, Any]) -> ClientStrategy:
    """Build a client strategy by name, `module:Class` or `file.py:Class`, or several: `ewc+replay`.

    Args:
        reference: The name, or names joined by "+".
        arguments: What it is built with; of several, one table for each name.

    Raises:
        PluginError: If the reference leads nowhere.
        ScenarioError: If it is not a client strategy, or does not take the arguments.
    """
    names = plugins.joined(reference)
    if len(names) > 1:
        return _combined(reference, names, arguments)
    return _single(reference, arguments, "client.args")


def _combined(reference: str, names: list[str], arguments: Mapping[str, Any]) -> ClientStrategy:
    from edgelearn.continual.combined import Combined  # it is a strategy itself

    short = [name.rpartition(":")[2] for name in names]
    faults = [
        Fault("client.args", key, f"no part of {reference!r}; give a table for each of {short}")
        for key, value in arguments.items()
        if key not in short or not isinstance(value, Mapping)
    ]
    if len(set(short)) < len(short):
        faults.append(Fault("client", "strategy", f"{reference!r} has the same name twice"))
    if faults:
        raise ScenarioError(reference, faults)
    parts = {
        key: _single(name, arguments.get(key, {}), f"client.args.{key}")
        for key, name in zip(short, names, strict=True)
    }
    try:
        return Combined(parts)
    except ValueError as error:
        raise ScenarioError(reference, [Fault("client", "strategy", str(error))]) from error


def _single(reference: str, arguments: Mapping[str, Any], table: str) -> ClientStrategy:
    if reference.startswith(plugins.AVALANCHE):
        from edgelearn.continual import avalanche_client  # it is a strategy itself

        return avalanche_client.make(reference, arguments, table)
    found = plugins.resolve(reference, plugins.CLIENT_STRATEGIES)
    if not (isinstance(found, type) and issubclass(found, ClientStrategy)):
        message = f"{reference} is not a subclass of edgelearn.ClientStrategy"
        raise ScenarioError(reference, [Fault("client", "strategy", message)])
    faults = plugins.argument_faults(found, arguments, table)
    if faults:
        raise ScenarioError(reference, faults)
    try:
        strategy: ClientStrategy = found(**arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError(reference, [Fault("client", "args", str(error))]) from error
    return strategy
