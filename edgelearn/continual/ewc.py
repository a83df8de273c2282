"""Elastic weight consolidation: a quadratic pull towards what earlier experiences needed."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.fisher import empirical_fisher, true_fisher
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.storage import Storage, check_kind
from edgelearn.continual.strategy import ClientStrategy, Facts, Pull
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples

MODES = ("online", "separate")
STEPS = ("proximal", "explicit")
FISHERS = ("empirical", "true", "exact")


@final
class EWC(ClientStrategy):
    r"""Penalize change of parameters in proportion to their Fisher information.

    The penalty is (lambda / 2) sum_i F_i (theta_i - anchor_i)^2.

    - "separate" keeps one quadratic per experience (Kirkpatrick et al., equation 3). A sum of
      quadratics is a quadratic: with F = sum_k F_k and anchor = sum_k F_k theta_k / F it is
      the same function up to a constant, which is kept too. So memory does not grow.
    - "online" keeps one running Fisher, F <- gamma F + F_k, around the latest parameters
      (Schwarz et al., section 4).

    The penalty is taken as a proximal step after the optimizer's,
    theta <- (theta + lr lambda F anchor) / (1 + lr lambda F), which can't diverge. As a gradient
    ("explicit") it diverges once lr lambda F > 2. F is from per-example gradients, which is about a
    batch size larger than the square of a batch's mean gradient: a lambda from a codebase that uses
    the latter has to be divided accordingly. By default it is the empirical Fisher, with the given
    labels (`empirical_fisher`), which vanishes where the samples are fitted; "true" draws a label
    of the model's own for each sample, "exact" takes the expectation over all classes
    (`true_fisher`).

    References: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS
    2017, arXiv:1612.00796; Schwarz et al., "Progress & Compress", ICML 2018, arXiv:1805.06370.

    Args:
        strength: lambda, at least 0.
        mode: "online" or "separate".
        decay: gamma of "online", in [0, 1].
        step: "proximal" or "explicit".
        max_fisher_samples: Samples for the Fisher; 0 uses all of the device's experience.
        fisher: "empirical", "true" or "exact".
        storage: How Fisher and anchor are kept: "float32", "float16" or "int8" (`Storage`).
    """

    def __init__(
        self,
        *,
        strength: float = 100.0,
        mode: str = "online",
        decay: float = 1.0,
        step: str = "proximal",
        max_fisher_samples: int = 0,
        fisher: str = "empirical",
        storage: str = "float32",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
        if step not in STEPS:
            raise ValueError(f"step is {step!r}; allowed: {', '.join(STEPS)}")
        if fisher not in FISHERS:
            raise ValueError(f"fisher is {fisher!r}; allowed: {', '.join(FISHERS)}")
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; at least 0 is allowed")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; allowed: 0 to 1")
        if max_fisher_samples < 0:
            raise ValueError(f"max_fisher_samples is {max_fisher_samples}; at least 0 is allowed")
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.step = step
        self.max_fisher_samples = max_fisher_samples
        self.fisher = fisher
        self.storage = check_kind(storage)

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the Fisher, the anchor and the constant of merged quadratics."""
        return {**self._stored(model).declaration(), "constant": TensorSpec((1,))}

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; a round begins plainly if nothing is decoded."""
        return super().overrides(hook) and (hook != "enter" or self.storage != "float32")

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode what is stored cheaply."""
        return params, self._stored(model).unpacked(memory)

    def penalty(self, params: Tensor, memory: Memory) -> Tensor:
        """Return (lambda / 2) sum F (theta - anchor)^2 + constant, scalar."""
        distance = (params - memory["anchor"]).square()
        return 0.5 * self.strength * ((memory["fisher"] * distance).sum() + memory["constant"][0])

    def pull(self) -> Pull:
        """Declare the penalty, for every step of training."""
        return Pull("fisher", "anchor", self.strength, is_explicit=self.step == "explicit")

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Merge the Fisher of the experience that has ended."""
        if len(data) == 0:
            return memory
        stored = self._stored(model)
        new = self._estimate(model, params, data, generator)
        old, anchor = stored.get(memory, "fisher"), stored.get(memory, "anchor")
        if self.mode == "online":
            return stored.put(memory, {"fisher": self.decay * old + new, "anchor": params.clone()})
        total = old + new
        safe = torch.where(total > 0, total, torch.ones_like(total))
        merged = torch.where(total > 0, anchor + (new / safe) * (params - anchor), params)
        constant = (old * (new / safe) * (params - anchor).square()).sum()
        memory = memory.replace(constant=memory["constant"] + constant)
        return stored.put(memory, {"fisher": total, "anchor": merged})

    def _estimate(
        self, model: FlatModel, params: Tensor, data: Samples, generator: Generator
    ) -> Tensor:
        count = self.max_fisher_samples
        if self.fisher == "empirical":
            return empirical_fisher(model, params, data, max_samples=count)
        source = generator if self.fisher == "true" else None
        return true_fisher(model, params, data, source, max_samples=count)

    def _stored(self, model: FlatModel) -> Storage:
        size = model.layout.num_trained
        return Storage(self.storage, size, {"fisher": True, "anchor": False})
