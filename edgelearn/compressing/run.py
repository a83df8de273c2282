"""A network through a pipeline: a row and a file after each stage, and a report at the end."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import edgelearn
from edgelearn.compress.pipeline import Factory, State, run_stages
from edgelearn.compress.structured import torch_pruning
from edgelearn.compressing.rows import NUM_RUNS, Artefact, Row, Scale
from edgelearn.errors import RunError
from edgelearn.files import write_atomic
from edgelearn.fleet.reference import one_thread
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stages import Pack, PruneChannels, Quantize, Stage, parse, written

REPORT = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a pipeline came to.

    Attributes:
        pipeline: The stages as they are written.
        seed: Of everything random.
        num_train: Training samples.
        num_test: Test samples.
        rows: The network given, and the network after each stage.
        networks: The same networks, in float; what a packed or 4-bit one stands for.
        facts: What the network is.
    """

    pipeline: str
    seed: int
    num_train: int
    num_test: int
    rows: tuple[Row, ...]
    networks: tuple[nn.Module, ...]
    facts: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without the networks."""
        return {
            "edgelearn": edgelearn.__version__,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            **self.facts,
            "pipeline": self.pipeline,
            "seed": self.seed,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "rows": [asdict(row) for row in self.rows],
        }


def compress(
    module: nn.Module,
    *,
    train: Samples,
    test: Samples,
    pipeline: str,
    seed: int = 0,
    factory: Factory | None = None,
    facts: Mapping[str, str] | None = None,
    out: Path | None = None,
    num_runs: int = NUM_RUNS,
    on_row: Callable[[Row], None] | None = None,
) -> Report:
    """Compress a network, and measure it after each stage.

    Args:
        module: The network; it stays as it is.
        train: Samples that stages train on, and that ranges of activations come from.
        test: Samples that accuracy is measured on; nothing else sees them.
        pipeline: Stages; see `edgelearn.scenario.stages`.
        seed: Of everything random.
        factory: Makes a network of a name and arguments, for `distill(model, args=...)`.
        facts: What files and report say about the network.
        out: New folder for a file after each stage and `report.json`; None writes nothing, and the
            bytes on disk are those that the files would have.
        num_runs: Calls that count for a time.
        on_row: Called after each stage.

    Raises:
        ScenarioError: With all faults of the pipeline at once.
        ExtraMissingError: If a package is not installed that a stage needs; nothing is done.
        RunError: If the folder is not empty, or a stage can't be done with this network.
    """
    stages = parse(pipeline)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty; nothing was changed. Name a new folder")
    if not len(train) or not len(test):
        raise RunError(
            f"{len(train)} training samples and {len(test)} test samples; some are needed"
        )
    if any(isinstance(stage, PruneChannels) for stage in stages):
        torch_pruning()
    own = {"edgelearn": edgelearn.__version__, **(facts or {}), "pipeline": written(stages)}
    rows: list[Row] = []
    networks: list[nn.Module] = []
    exact = module  # the float network that a quantized one comes from
    with one_thread():
        scale = Scale(stages, train, test, seed=seed, num_runs=num_runs)
        for stage, state in _states(module, stages, train, seed, factory, own):
            if not isinstance(stage, Pack | Quantize):
                exact = state.module
            numbers, artefact = scale.weigh(stage, state, exact)
            text = "given" if stage is None else written((stage,))
            row = Row(stage=text, artefact=_name(len(rows), stage, artefact), **numbers)
            if out is not None:
                write_atomic(out / row.artefact, artefact.data)
            rows.append(row)
            networks.append(state.module)
            if on_row is not None:
                on_row(row)
    report = Report(
        pipeline=written(stages),
        seed=seed,
        num_train=len(train),
        num_test=len(test),
        rows=tuple(rows),
        networks=tuple(networks),
        facts=dict(facts or {}),
    )
    if out is not None:
        text = json.dumps(report.as_dict(), indent=2) + "\n"
        write_atomic(out / REPORT, text.encode())
    return report


def _states(
    module: nn.Module,
    stages: Sequence[Stage],
    train: Samples,
    seed: int,
    factory: Factory | None,
    facts: Mapping[str, str],
) -> Iterator[tuple[Stage | None, State]]:
    """Give the network as it is, and after each stage."""
    yield None, State(module, module, facts=facts)
    yield from run_stages(module, stages, train, seed=seed, factory=factory, facts=facts)


def _name(place: int, stage: Stage | None, artefact: Artefact) -> str:
    verb = "given" if stage is None else stage.verb
    return f"{place}-{verb}.{artefact.suffix}"
