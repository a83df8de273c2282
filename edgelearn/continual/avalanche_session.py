"""A strategy of Avalanche at work: its `train()` cut into begin, rounds and end."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgelearn.continual import avalanche
from edgelearn.continual.freezing import Surroundings, additions
from edgelearn.errors import StrategyError
from edgelearn.params import SHARED, FlatModel, Layout
from edgelearn.scenario.samples import Batch
from edgelearn.scenario.spec import ClientSpec

# What `begin` makes anew, what a step leaves behind, and what is given.
_PASSING = frozenset(
    [
        "adapted_dataset",
        "batch_logits",
        "current_eval_stream",
        "dataloader",
        "evaluator",
        "experience",
        "is_training",
        "loss",
        "model",
        "optimized_param_id",
        "optimizer",
        "replay_loader",
        "_eval_streams",
        "_stop_training",
    ]
)


@dataclass
class Account:
    """A plug-in that counts steps, and adds FedProx's term to the gradient.

    Attributes:
        loss: Sum over steps.
        num_steps: Steps taken.
        num_samples: Samples that passed through them.
        mu: FedProx's mu.
        anchor: Parameters at the beginning of the round, by name, if there is a mu.
    """

    loss: float = 0.0
    num_steps: int = 0
    num_samples: int = 0
    mu: float = 0.0
    anchor: Mapping[str, Tensor] = field(default_factory=dict)

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Add mu (theta - global)."""
        if self.mu:
            for name, parameter in strategy.model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - self.anchor[name], alpha=self.mu)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Count a step."""
        self.loss += float(strategy.loss.detach().sum())
        self.num_steps += 1
        self.num_samples += len(strategy.mb_y)


@dataclass(frozen=True)
class Recipe:
    """How a strategy is built.

    Attributes:
        kind: Its class, or that of a plug-in.
        arguments: Its own arguments.
        beside: Plug-ins to run beside it, with their arguments.
    """

    kind: type[Any]
    arguments: Mapping[str, Any]
    beside: Sequence[tuple[type[Any], Mapping[str, Any]]] = ()

    def build(self, network: nn.Module, spec: ClientSpec, account: Account) -> Any:
        """Build it around a network."""
        beside = [avalanche.build_plugin(kind, values, network) for kind, values in self.beside]
        given = {
            "model": network,
            "optimizer": _optimizer(spec, network),
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": spec.batch_size,
            "train_epochs": spec.epochs,
            "eval_mb_size": spec.batch_size,
            "evaluator": avalanche.no_evaluation(),
        }
        return avalanche.build(self.kind, self.arguments, [*beside, account], given)


class Session:
    """A strategy at work on one experience, within one hook.

    Attributes:
        strategy: The strategy.
        account: What it did.
    """

    def __init__(self, recipe: Recipe, model: FlatModel, spec: ClientSpec, batch: Batch) -> None:
        """Build a strategy that knows nothing.

        Args:
            recipe: How it is built.
            model: The network; a copy of it is trained.
            spec: How it trains.
            batch: All samples of the experience.
        """
        self._layout, self._batch, self._spec = model.layout, batch, spec
        self._tasks = [0] * len(batch)
        self._masks: dict[int, Tensor] = {}
        self._classes: list[list[int]] = []
        network = copy.deepcopy(model.module)
        if batch.mask is not None:  # a task is named by the first class that it allows
            self._tasks = batch.mask.int().argmax(1).tolist()
            self._masks = dict(zip(self._tasks, batch.mask, strict=True))
            network = avalanche.task_masked(network, self._masks)
        self._template = copy.deepcopy(network)
        self.account = Account()
        self.strategy = recipe.build(network, spec, self.account)

    def go_on(self, frozen: bytes) -> None:
        """Take in more of the experience: the session's samples have arrived since.

        What takes in samples when an experience begins takes in these; all else stays as it is.

        Args:
            frozen: What `freeze` returned after the round before, which has been taken up.
        """
        if not avalanche.taken_in(self.strategy):
            return
        self._classes.pop()  # of the experience under way; they come back with the rest
        self.begin()
        held = avalanche.taken_in(self.strategy)
        self.thaw(frozen)
        avalanche.put_in(self.strategy, held)

    def begin(self) -> None:
        """Begin the experience: what `train()` does before the first epoch."""
        strategy = self.strategy
        data = avalanche.dataset(self._batch.x, self._batch.y.tolist(), self._tasks)
        seen = [label for classes in self._classes for label in classes]
        experience = avalanche.experience(data, len(self._classes), seen)
        self._classes.append(experience.classes_in_this_experience)
        strategy.is_training, strategy._stop_training = True, False
        strategy._eval_streams = []
        strategy.model.train()
        strategy._before_training()
        strategy.experience = experience
        strategy._before_training_exp()

    def train(self, params: Tensor, mu: float) -> Tensor:
        """Train for a round: the epochs of `train()`.

        Args:
            params: Parameters to begin with [P].
            mu: FedProx's mu.

        Returns:
            Local parameters [P].
        """
        self.load(params)
        if mu:
            parameters = self.strategy.model.named_parameters()
            self.account.mu = mu
            self.account.anchor = {name: p.detach().clone() for name, p in parameters}
        self.strategy._train_exp(self.strategy.experience, [])
        beside = {n: v for n, v in self._layout.views(params).items() if n.startswith(SHARED)}
        return self._layout.flatten({**self._tensors(), **beside})

    def end(self, params: Tensor) -> None:
        """End the experience: what `train()` does after the last epoch.

        Args:
            params: Parameters that it ends with, [P] or their trained part [T].
        """
        strategy = self.strategy
        with torch.random.fork_rng(devices=[]):  # MIR wants to know what a batch was like
            strategy.mbatch = next(iter(strategy.dataloader))
            strategy._unpack_minibatch()
        self.load(params)
        strategy._after_training_exp()
        strategy._after_training()
        strategy._train_cleanup()

    def load(self, params: Tensor) -> None:
        """Put parameters, [P] or their trained part [T], into the network."""
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in self._layout.views(params).items():
                if not name.startswith(SHARED):
                    tensors[name].copy_(value)

    def freeze(self) -> bytes:
        """Return what the strategy has to remember."""
        held = {
            name: value
            for name, value in vars(self.strategy).items()
            if name not in _PASSING and not name.startswith("mb")
        }
        added = additions(self.strategy.model, self._template)
        added.pop("masks", None)
        state = {
            "strategy": held,
            "network": added,
            "masks": self._masks,
            "classes": self._classes,
        }
        return self._surroundings().freeze(state)

    def thaw(self, frozen: bytes) -> None:
        """Take up what `freeze` returned on this device; nothing if it is empty."""
        if not frozen:
            return
        state = self._surroundings().thaw(frozen)
        vars(self.strategy).update(state["strategy"])
        vars(self.strategy.model).update(state["network"])
        # Where samples come in parts, those at hand may be of more classes than there were.
        at_hand = self._classes[-1:] if len(self._classes) == len(state["classes"]) else []
        self._classes = state["classes"]
        for labels in at_hand:
            self._classes[-1] = sorted({*self._classes[-1], *labels})
        if self._masks:
            self._masks = {**state["masks"], **self._masks}
            self.strategy.model.masks = self._masks

    def _surroundings(self) -> Surroundings:
        strategy = self.strategy
        named = {
            "strategy": strategy,
            "optimizer": strategy.optimizer,
            "evaluator": strategy.evaluator,
            "experience": strategy.experience,
            "account": self.account,
            "template": self._template,
        }
        reducers = {avalanche.library().utils.AvalancheDataset: avalanche.reduce_dataset}
        return Surroundings(named, strategy.model, self._template, reducers)

    def _tensors(self) -> dict[str, Tensor]:
        model = self.strategy.model
        network = model.network if self._masks else model
        found = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        shapes = _shapes(self._layout)
        if wrong := [n for n in shapes if n not in found or tuple(found[n].shape) != shapes[n]]:
            raise StrategyError(
                f"{type(self.strategy).__name__} changed the shape of {', '.join(wrong)}: what the "
                "fleet averages has to keep its shape; give the network all outputs from the start"
            )
        return {name: found[name].detach() for name in shapes}


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    pairs = zip(layout.names, layout.shapes, strict=True)
    return {name: shape for name, shape in pairs if not name.startswith(SHARED)}


def _optimizer(spec: ClientSpec, network: nn.Module) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    if spec.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=spec.lr, weight_decay=spec.weight_decay)


@contextlib.contextmanager
def at_work(seed: int) -> Iterator[None]:
    """Let Avalanche work, with the process-wide generators seeded; they are restored."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        with avalanche.without_notices():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])
