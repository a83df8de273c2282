"""Memory aware synapses: a quadratic pull, by how much each parameter changes the output."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory
from edgelearn.continual.per_example import sum_over_examples
from edgelearn.continual.storage import Storage, check_kind
from edgelearn.continual.strategy import ClientStrategy, Facts, Pull
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples

STEPS = ("proximal", "explicit")
_ROWS = 128  # that pass through the network at once


@final
class MAS(ClientStrategy):
    r"""Penalize change of parameters in proportion to the sensitivity of the network's output.

    When an experience has ended, the mean over the device's samples of
    \|d \|\|f(x)\|\|^2 / d theta_i\|, f being the logits, is added to gamma Omega_i; the penalty is
    lambda sum_i Omega_i (theta_i - anchor_i)^2. Both are at the final **global** parameters. It
    needs no labels but for the classes that a sample's task allows: in a task-incremental stream f
    has these alone.

    The absolute value is taken of each sample's gradient, as the paper defines it; codebases that
    take that of a batch's mean gradient have a smaller Omega.

    Reference: Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, "Memory Aware Synapses: Learning
    what (not) to forget", ECCV 2018, arXiv:1711.09601, equation 2, with the squared norm of the
    output in place of the output. We differ: the penalty is taken as a proximal step after the
    optimizer's (as `EWC` does), which can't diverge; "explicit" takes it as a gradient.

    Args:
        strength: lambda, at least 0; default as in the paper.
        decay: gamma, in [0, 1]; 1 adds the experiences up.
        step: "proximal" or "explicit".
        max_samples: Samples for the importance; 0 uses all of the device's experience.
        storage: How importance and anchor are kept: "float32", "float16" or "int8" (`Storage`).
    """

    def __init__(
        self,
        *,
        strength: float = 1.0,
        decay: float = 1.0,
        step: str = "proximal",
        max_samples: int = 0,
        storage: str = "float32",
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; at least 0 is allowed")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; allowed: 0 to 1")
        if step not in STEPS:
            raise ValueError(f"step is {step!r}; allowed: {', '.join(STEPS)}")
        if max_samples < 0:
            raise ValueError(f"max_samples is {max_samples}; at least 0 is allowed")
        self.strength = strength
        self.decay = decay
        self.step = step
        self.max_samples = max_samples
        self.storage = check_kind(storage)

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the importance and the anchor."""
        return self._stored(model).declaration()

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; a round begins plainly if nothing is decoded."""
        return super().overrides(hook) and (hook != "enter" or self.storage != "float32")

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode what is stored cheaply."""
        return params, self._stored(model).unpacked(memory)

    def pull(self) -> Pull:
        """Declare the penalty, for every step of training."""
        strength = 2 * self.strength
        return Pull("importance", "anchor", strength, is_explicit=self.step == "explicit")

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,  # noqa: ARG002
    ) -> Memory:
        """Add the importance on the experience that has ended."""
        if len(data) == 0:
            return memory
        stored = self._stored(model)
        new = output_sensitivity(model, params, data, max_samples=self.max_samples)
        importance = self.decay * stored.get(memory, "importance") + new
        return stored.put(memory, {"importance": importance, "anchor": params.clone()})

    def _stored(self, model: FlatModel) -> Storage:
        size = model.layout.num_trained
        return Storage(self.storage, size, {"importance": True, "anchor": False})


def output_sensitivity(
    model: FlatModel, params: Tensor, data: Samples, *, max_samples: int = 0
) -> Tensor:
    """Return 1/N sum_n |d ||f(x_n)||^2 / d params| [T]; see `MAS`.

    Args:
        model: The network; evaluated in eval mode.
        params: Trained parameters [T].
        data: Samples; none gives zeros.
        max_samples: Use only the first so many; 0 uses all.
    """
    count = min(len(data), max_samples) if max_samples else len(data)
    if count == 0:
        return torch.zeros_like(params)
    starts = range(0, count, _ROWS)
    batches = (data.batch(slice(start, min(start + _ROWS, count))) for start in starts)
    return sum_over_examples(model, params, batches, _squared_norms, of=torch.abs) / count


def _squared_norms(logits: Tensor, batch: Batch) -> Tensor:
    """Return each example's squared norm of the logits of its task [B]."""
    if batch.mask is not None:
        logits = logits.masked_fill(~batch.mask, 0.0)
    return logits.square().sum(1)
