"""Experience replay as papers on single devices have it: a fixed number of exemplars per class."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Batch, Samples
from edgelearn.scenario.stream import Experience


@final
class ExemplarReplay(ClientStrategy):
    """Store so many random exemplars of each class, and weigh present and past by experiences.

    In experience n (from 1) the loss is 1/n times that on the present batch plus 1 - 1/n times that
    on as many stored samples: all experiences weigh alike. Memory grows with the classes, which a
    device can't promise; `edgelearn.continual.replay.Replay` is the method for devices.

    Reference: van de Ven, Tuytelaars, Tolias, "Three types of incremental learning", Nature Machine
    Intelligence 4, 2022, doi:10.1038/s42256-022-00568-3 ("ER").

    Args:
        per_class: Exemplars of each class, at least 1.
    """

    def __init__(self, *, per_class: int = 10) -> None:
        if per_class < 1:
            raise ValueError(f"per_class is {per_class}; at least 1 is needed")
        self.per_class = per_class

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare room for the exemplars of all classes, and the count of experiences."""
        return {
            "buffer": SampleSpec(self.per_class * facts.num_classes),
            "experiences": TensorSpec((), torch.int64),
        }

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,  # noqa: ARG002
    ) -> Memory:
        """Count the experience."""
        return memory.replace(experiences=memory["experiences"] + 1)

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        """Join as many stored samples, with the share of all past experiences in the loss."""
        past = memory.draw("buffer", len(batch), generator)
        return batch.join(past, share=1.0 - 1.0 / max(1, int(memory["experiences"])))

    def finish(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Store exemplars of the classes that are not stored yet."""
        buffer = memory["buffer"].clone()
        known = set(memory.store.labels(buffer[buffer != EMPTY]).tolist())
        order = torch.randperm(len(data), generator=generator)
        ids, labels = data.ids[order], data.labels[order]
        for label in sorted(set(labels.tolist())):
            if label not in known:
                chosen = ids[labels == label][: self.per_class]
                free = (buffer == EMPTY).nonzero().flatten()[: len(chosen)]
                buffer[free] = chosen
        return memory.replace(buffer=buffer)
