"""Gradient episodic memory: no step may raise the loss on any past experience."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.errors import ExtraMissingError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Batch, Samples

_RIDGE = 1e-3  # of the authors' code: keeps the program strictly convex


@final
class GEM(ClientStrategy):
    r"""Project the gradient so that it does not point against that of any past experience.

    The step follows the closest vector to the gradient g whose product with the gradient g_k of the
    loss on the stored samples of each past experience k is not negative. With those as the rows of
    M, it is M^T v + g, where v solves the small quadratic program

        min_v  1/2 v^T (M M^T + 0.001 I) v + (M g)^T v   subject to  v >= gamma,

    one number for each past experience. It is solved only where some product is negative. A gamma
    above 0 moves towards the past experiences even then: it favours backward transfer. The paper
    adds gamma to the solution for gamma = 0; the bound and the 0.001 are those of the authors'
    code, which Avalanche has too.

    A step takes the gradient of *all* stored samples, so it costs (batch + capacity) / batch times
    one without memory; `AGEM` is the cheap version.

    Reference: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS
    2017, arXiv:1706.08840, equation 11. We differ: an experience's samples are drawn at random when
    it has ended; there they are the last ones of it.

    Args:
        memory_kib: Size of the memory on a device, in KiB of stored samples, divided equally
            among all experiences of the stream, at least one for each.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        gamma: Margin, at least 0; default as in the authors' experiments.

    Raises:
        ExtraMissingError: If the package quadprog, which solves the program, is not installed.
    """

    def __init__(self, *, memory_kib: float = 0.0, capacity: int = 0, gamma: float = 0.5) -> None:
        if memory_kib < 0 or capacity < 0 or (memory_kib > 0 and capacity > 0):
            raise ValueError("give memory_kib or capacity, not both, and not below 0")
        if not gamma >= 0:
            raise ValueError(f"gamma is {gamma}; at least 0 is allowed")
        _expect_solver()  # now, not in the middle of a run
        self.memory_kib = memory_kib
        self.capacity = capacity
        self.gamma = gamma

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare equally many samples for each experience, and how many have ended."""
        capacity = self.capacity or 200
        if self.memory_kib > 0:
            capacity = int(self.memory_kib * 1024) // facts.sample_bytes
        share = max(1, capacity // facts.num_experiences)
        return {
            "buffer": SampleSpec(share * facts.num_experiences),
            "ended": TensorSpec((facts.num_experiences,), torch.bool),
        }

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:  # noqa: ARG002
        """Append all stored samples."""
        ids = memory["buffer"]
        held = (ids != EMPTY).nonzero().flatten()
        if len(held) == 0:
            return batch
        return batch.join(replace(memory.store.batch(ids[held]), places=held))

    def gradient(
        self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Return the loss on present samples, and its gradient, projected."""
        loss, gradient = super().gradient(model, params, batch.present, memory)
        if batch.places is None:
            return loss, gradient
        share = len(memory["buffer"]) // len(memory["ended"])
        past = batch.past
        experience = torch.div(batch.places, share, rounding_mode="floor")
        references = [
            super(GEM, self).gradient(model, params, _rows(past, experience == k), memory)[1]
            for k in sorted(set(experience.tolist()))
        ]
        return loss, project(gradient, torch.stack(references), gamma=self.gamma)

    def finish(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Store some samples of the experience that has ended."""
        share = len(memory["buffer"]) // len(memory["ended"])
        place = int(memory["ended"].sum())
        ended, buffer = memory["ended"].clone(), memory["buffer"].clone()
        ended[place] = True
        chosen = data.ids[torch.randperm(len(data), generator=generator)[:share]]
        buffer[place * share : place * share + len(chosen)] = chosen
        return memory.replace(buffer=buffer, ended=ended)


def project(gradient: Tensor, references: Tensor, *, gamma: float) -> Tensor:
    """Return M^T v + g for the v of equation 11, or g where no product is negative.

    Args:
        gradient: g [T].
        references: M [K, T], the gradient of each past experience.
        gamma: Lower bound of v.
    """
    if not bool((references @ gradient < 0).any()):
        return gradient
    quadprog = _expect_solver()
    rows, g = references.double(), gradient.double()
    square = rows @ rows.T
    square = (square + square.T) / 2 + _RIDGE * torch.eye(len(rows), dtype=torch.float64)
    bounds = torch.full((len(rows),), gamma, dtype=torch.float64)
    identity = torch.eye(len(rows), dtype=torch.float64)
    v, *_ = quadprog.solve_qp(square.numpy(), -(rows @ g).numpy(), identity.numpy(), bounds.numpy())
    return (torch.from_numpy(v) @ rows + g).to(gradient.dtype)


def _rows(batch: Batch, chosen: Tensor) -> Batch:
    mask = None if batch.mask is None else batch.mask[chosen]
    return Batch(batch.x[chosen], batch.y[chosen], None, mask)


def _expect_solver() -> ModuleType:
    try:
        return import_module("quadprog")  # here: only this strategy needs it
    except ModuleNotFoundError as error:
        raise ExtraMissingError(
            package="quadprog", extra="avalanche", needed_for="the client strategy 'gem'"
        ) from error
