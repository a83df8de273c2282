"""Evaluation of a simulated fleet in groups: many devices, the same parameters, one pass.

A group is made of jobs that follow each other, whatever the number of workers: so results do not
depend on who does them. A group fails as its devices one by one would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edgelearn.device.evaluate import Counts, Trial
from edgelearn.federated.egress import Schema
from edgelearn.fleet.jobs import Done, Job, Phase, failure
from edgelearn.scenario.world import World

_log = logging.getLogger(__name__)
_MOST_DEVICES, _MOST_SAMPLES = 32, 4096


def pieces(world: World, jobs: Sequence[Job]) -> list[list[Job]]:
    """Cut jobs into pieces of work: groups of evaluations, and each other job by itself.

    Pieces follow the order of the jobs. A group holds at most 32 devices, and 4,096 test samples
    unless one device alone has more. Any run of whole pieces is cut into the same pieces again.
    """
    out: list[list[Job]] = []
    held = 0
    for job in jobs:
        count = world.num_test_samples(job.device) if job.phase is Phase.EVALUATE else 0
        if (
            out
            and job.phase is out[-1][0].phase is Phase.EVALUATE
            and len(out[-1]) < _MOST_DEVICES
            and held + count <= _MOST_SAMPLES
        ):
            out[-1].append(job)
            held += count
        else:
            out.append([job])
            held = count
    return out


def evaluate_jobs(
    jobs: Sequence[Job],
    *,
    trial_of: Callable[[Job], Trial],
    measure: Callable[[Sequence[Trial]], list[Counts]],
    schema: Schema,
    keep: Callable[[Job, Counts], int | None] | None = None,
) -> list[Done]:
    """Do the jobs of a group.

    A device whose trial can't be had fails, and the others go on. If measuring the group fails,
    its devices are measured one by one, so that only the culprit fails.

    Args:
        jobs: Evaluations.
        trial_of: Reads what a device is evaluated with.
        measure: Evaluates several devices at once.
        schema: What a device may say of it.
        keep: Writes what a device keeps of it, if anything; returns the record's checksum.
    """
    trials: dict[int, Trial] = {}
    done: dict[int, Done] = {}
    for job in jobs:
        try:
            trials[job.row] = trial_of(job)
        except Exception as error:
            done[job.row] = failure(job, error)
    counts: dict[int, Counts] = {}
    if len(trials) > 1:
        try:
            counts = dict(zip(trials, measure(list(trials.values())), strict=True))
        except Exception as error:  # one by one, whose it is will show
            _log.warning("%d devices together: %s; one by one", len(trials), error)
    for job in jobs:
        if job.row not in done:
            try:
                found = counts.get(job.row) or measure([trials[job.row]])[0]
                metrics = _metrics(found)
                schema.admit({}, metrics)
                checksum = None if keep is None else keep(job, found)
                done[job.row] = Done(job.row, metrics, checksum=checksum)
            except Exception as error:
                done[job.row] = failure(job, error)
    return [done[job.row] for job in jobs]


def _metrics(counts: Counts) -> dict[str, object]:
    return {
        "num-examples": sum(counts.count),
        "model-bytes": counts.model_bytes,
        "count": list(counts.count),
        "served": list(counts.served),
        "float": list(counts.float_),
    }
