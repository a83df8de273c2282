"""Times rounds in whatever process runs them; needs psutil only."""

import json
import os
import time
from pathlib import Path

import psutil


def argument():
    """Return what the parent asks for."""
    return json.loads(Path(os.environ["BENCH_ARGUMENT"]).read_text())


def finish(result):
    """Hand a result to the parent."""
    path = Path(os.environ["BENCH_RESULT"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)


def tree_cpu_s(root=None):
    """Return CPU seconds of a process and all its descendants, ended ones included."""
    me, total = psutil.Process(root), 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


class Clock:
    """Notes the wall time of each round, and the CPU time of the tree over all that count.

    The first `skip` rounds are left out. CPU is read twice only: at the start and the end of the
    rounds that count.
    """

    def __init__(self, root=None, *, skip=1, budget_s=0.0, min_rounds=3):
        self.root, self.skip, self.budget_s, self.min_rounds = root, skip, budget_s, min_rounds
        self.walls, self.first_round_s = [], None
        self._seen, self._cpu, self._began, self._last = 0, 0.0, 0.0, time.perf_counter()

    def start(self):
        """Begin the first round."""
        self._last = time.perf_counter()

    def round_done(self):
        """End a round; return whether it was the last that is needed."""
        now = time.perf_counter()
        self._seen += 1
        if self._seen == 1:
            self.first_round_s = time.time() - float(os.environ["BENCH_STARTED"])
        if self._seen <= self.skip:
            if self._seen == self.skip:
                self._cpu = tree_cpu_s(self.root)
                self._began = time.perf_counter()
            self._last = time.perf_counter()
            return False
        self.walls.append(now - self._last)
        self._last = now
        return len(self.walls) >= self.min_rounds and now - self._began >= self.budget_s

    def cpu_s(self):
        """Return CPU seconds of the rounds that count; call it once, right after the last."""
        return tree_cpu_s(self.root) - self._cpu


def figures(clock, cpu_s, samples, cohort, mean_samples, flops_per_sample):
    """Return the figures of a run.

    `samples` are those of each counted round's cohort. A client update is that of a device with the
    fleet's mean number of samples, so that the luck of which rounds were counted has no effect.
    """
    walls = clock.walls
    rates = sorted(n / wall for n, wall in zip(samples, walls, strict=True))
    middle = len(rates) // 2
    rate = rates[middle] if len(rates) % 2 else (rates[middle - 1] + rates[middle]) / 2
    ordered = sorted(walls)
    total = sum(samples)
    return {
        "updates_per_s": rate / mean_samples,
        "samples_per_s": rate,
        "gflops": rate * flops_per_sample / 1e9,
        "cpu_ms_per_update": 1e3 * cpu_s / total * mean_samples,
        "cpu_s_per_round": cpu_s / total * mean_samples * cohort,
        "round_ms": 1e3 * ordered[len(ordered) // 2],
        "first_round_s": clock.first_round_s,
        "rounds": len(walls),
        "walls_ms": [round(1e3 * w, 3) for w in walls[:20]],
    }
