"""Groups of evaluations: what is in them, and failures that stay with their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgelearn.device.evaluate import Counts, Trial
from edgelearn.errors import StateError
from edgelearn.federated.egress import evaluate_schema
from edgelearn.fleet.evaluation import evaluate_jobs, pieces
from edgelearn.fleet.jobs import Job, Phase
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import World, build
from edgelearn.testing.toy import toy_samples, toy_scenario

STORE = toy_samples()


def world_of(num_devices: int) -> World:
    return build(toy_scenario(fleet={"num_devices": num_devices, "cohort": 2}))


def job(row: int, device: int, phase: Phase = Phase.EVALUATE) -> Job:
    return Job(
        row=row,
        device=device,
        phase=phase,
        server_round=1,
        position=0,
        begun=0,
        consolidated=0,
        read_slot=0,
        write_slot=1,
        cost=1,
        serial=1,
    )


# -- what is in a group ----------------------------------------------------------------------------


def lengths(num_jobs: int) -> list[int]:
    world = world_of(4)
    jobs = [job(row, row % 4) for row in range(num_jobs)]
    found = pieces(world, jobs)
    assert [j for piece in found for j in piece] == jobs
    return [len(piece) for piece in found]


@pytest.mark.parametrize(
    ("num_jobs", "expected"), [(0, []), (1, [1]), (32, [32]), (33, [32, 1]), (100, [32] * 3 + [4])]
)
def test_a_group_has_at_most_32_devices(num_jobs: int, expected: list[int]) -> None:
    assert lengths(num_jobs) == expected


def test_whole_pieces_are_cut_into_the_same_pieces_again() -> None:
    world = world_of(4)
    found = pieces(world, [job(row, row % 4) for row in range(150)])
    part = found[1:4]
    assert pieces(world, [j for piece in part for j in piece]) == part


def test_only_evaluations_are_grouped_and_the_order_stays() -> None:
    phases = [Phase.FIT, Phase.FIT, Phase.EVALUATE, Phase.EVALUATE, Phase.CONSOLIDATE]
    jobs = [job(row, row % 4, phase) for row, phase in enumerate([*phases, Phase.EVALUATE])]
    assert [[j.row for j in piece] for piece in pieces(world_of(4), jobs)] == [
        [0],
        [1],
        [2, 3],
        [4],
        [5],
    ]


def test_a_group_has_a_limited_number_of_test_samples() -> None:
    world = world_of(4)
    large = np.zeros(3000, np.int32)
    small = np.zeros(1000, np.int32)
    huge = np.zeros(9000, np.int32)
    world = replace(world, test_parts=(small, large, huge, large))
    jobs = [job(row, device) for row, device in enumerate([0, 1, 0, 2, 3, 0])]
    found = [[j.device for j in piece] for piece in pieces(world, jobs)]
    assert found == [[0, 1], [0], [2], [3, 0]]


# -- failures --------------------------------------------------------------------------------------


class Measure:
    """Counts samples; devices with a given number of calibration samples break it."""

    def __init__(self, *culprits: int) -> None:
        self.culprits = culprits
        self.sizes: list[int] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Counts]:
        self.sizes.append(len(trials))
        if any(len(trial.calibration) in self.culprits for trial in trials):
            raise StateError("a device's memory is damaged")
        return [Counts((len(t.calibration), 0), (0, 0), (0, 0), 7) for t in trials]


def trial_of(job: Job) -> Trial:
    if job.device == 9:
        raise StateError("unreadable")
    ids = torch.arange(job.device, dtype=torch.int32)
    return Trial(Samples(STORE, ids), [Samples(STORE, ids[:0])] * 2)


def outcomes(devices: Sequence[int], measure: Measure) -> list[int | str | None]:
    jobs = [job(row, device) for row, device in enumerate(devices)]
    done = evaluate_jobs(jobs, trial_of=trial_of, measure=measure, schema=evaluate_schema(2))
    assert [d.row for d in done] == list(range(len(devices)))
    assert all((d.metrics == {}) == (d.error is not None) for d in done)
    return [d.error or d.metrics["num-examples"] for d in done]


def test_a_group_is_measured_once() -> None:
    measure = Measure()
    assert outcomes([3, 1, 4], measure) == [3, 1, 4]
    assert measure.sizes == [3]


def test_a_device_that_cannot_be_read_fails_alone() -> None:
    measure = Measure()
    failed = outcomes([3, 9, 4], measure)
    assert failed[::2] == [3, 4]
    assert isinstance(failed[1], str)
    assert measure.sizes == [2]


def test_a_group_that_fails_is_measured_device_by_device() -> None:
    measure = Measure(1)
    found = outcomes([3, 1, 4], measure)
    assert found[::2] == [3, 4]
    assert isinstance(found[1], str)
    assert measure.sizes == [3, 1, 1, 1]


def test_a_single_evaluation_is_asked_once() -> None:
    measure = Measure(5)
    outcomes([5], measure)
    assert measure.sizes == [1]


def test_counts_that_the_schema_refuses_are_one_devices_failure() -> None:
    class Lies(Measure):
        def __call__(self, trials: Sequence[Trial]) -> list[Counts]:
            found = super().__call__(trials)
            return [replace(c, served=(-1, 0)) if c.count[0] == 1 else c for c in found]

    found = outcomes([3, 1, 4], Lies())
    assert found[::2] == [3, 4]
    assert "EgressError" in str(found[1])
