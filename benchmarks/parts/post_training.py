"""Weights that were trained in float, served with fewer bits: what QAT is measured against."""

from __future__ import annotations

from typing import final

from torch import Generator, Tensor

from edgelearn.continual.memory import Memory
from edgelearn.continual.qat import QAT
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples


@final
class PostTraining(ClientStrategy):
    """Serve what `qat` with 4 bits serves, and change nothing about training."""

    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,
        generator: Generator,
    ) -> Tensor:
        """Return the global parameters with weights on the grid of 4 bits."""
        return QAT(bits=4).serve(model, params, memory, data, generator)
