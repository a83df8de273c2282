"""Reference tier: one device after another, in this process. The truth for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from edgelearn.fleet.evaluation import pieces
from edgelearn.fleet.jobs import Done, Job, Phase
from edgelearn.fleet.workbench import Workbench
from edgelearn.scenario.world import World


@final
class ReferenceEngine:
    """One workbench, one thread."""

    def __init__(self, world: World, store_path: Path) -> None:
        self._world = world
        self._bench = Workbench(world, store_path)

    @property
    def name(self) -> str:
        """The tier's name."""
        return "reference"

    @property
    def num_workers(self) -> int:
        """Processes that work."""
        return 1

    def run(self, jobs: Sequence[Job], params: Tensor, updates: Tensor) -> list[Done]:
        """Do all jobs, in order."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more would change the order of sums, and be slower
        try:
            done: list[Done] = []
            for piece in pieces(self._world, jobs):
                if piece[0].phase is Phase.EVALUATE:
                    done += self._bench.evaluate(piece, params)
                else:
                    done += [self._bench.perform(job, params, updates[job.row]) for job in piece]
            return done
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        """Nothing to release."""
