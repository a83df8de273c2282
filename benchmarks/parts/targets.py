"""What was promised before it was measured, and whether it is met."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness import results

from parts import codecs, comparison, continual, device, ewc, memory, pipelines, runtimes
from parts.comparison import FLOWER
from parts.runtimes import CNN, MOBILENET

Results = dict[str, dict[str, Any]]
FUSED, FAITHFUL = "fused", "faithful"


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        text: What was promised.
        limit: The number.
        at_least: Whether more is better.
        measured: Gets the number from all results; None if it was not measured.
        unit: Written behind the number.
    """

    text: str
    limit: float
    at_least: bool
    measured: Callable[[Results], float | None]
    unit: str = ""

    def row(self, found: Results) -> str:
        """Return the table's row."""
        value = self.measured(found)
        sign = ">=" if self.at_least else "<="
        limit = f"{sign} {self.limit:,.4g}{self.unit}"
        if value is None:
            return f"| {self.text} | {limit} | | not measured |"
        if math.isnan(value):
            return f"| {self.text} | {limit} | accuracies differ | NOT met |"
        met = value >= self.limit if self.at_least else value <= self.limit
        shown = f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"| {self.text} | {limit} | {shown}{self.unit} | {'met' if met else 'NOT met'} |"


def _best(found: Results, workload: str, tier: str, field: str, *, low: bool = False) -> Any:
    """Return the median of an engine, in its better federation."""
    if workload not in found:
        return None
    values = [
        results.median(results.values(found[workload], comparison.name_of(tier, way), field))
        for way in (FAITHFUL, FUSED)
    ]
    known = [v for v in values if v is not None]
    return (min(known) if low else max(known)) if known else None


def _times(workload: str, tier: str, ways: tuple[str, ...] = (FAITHFUL, FUSED)) -> Any:
    def measured(found: Results) -> float | None:
        if workload not in found:
            return None
        ratios = [
            results.ratio(found[workload], "updates_per_s", comparison.name_of(tier, way), FLOWER)
            for way in ways
        ]
        return max((r[0] for r in ratios if r is not None), default=None)

    return measured


def _share(workload: str, tier: str) -> Any:
    def measured(found: Results) -> float | None:
        if workload not in found:
            return None
        names = [comparison.name_of(tier, way) for way in (FAITHFUL, FUSED)]
        shares = [comparison.share_of_gemm(found[workload], name) for name in names]
        return max((s for s in shares if s is not None), default=None)

    return measured


def _of_any(workload: str, field: str, tiers: tuple[str, ...]) -> Any:
    def measured(found: Results) -> float | None:
        values = [_best(found, workload, tier, field, low=True) for tier in tiers]
        return min((v for v in values if v is not None), default=None)

    return measured


def _faithful(found: Results) -> float | None:
    """Return the best tier's ratio with a message per client."""
    ratios = [_times("w3", tier, (FAITHFUL,))(found) for tier in comparison.TIERS]
    return max((r for r in ratios if r is not None), default=None)


def _first_round(found: Results) -> float | None:
    """Return the slowest start over the workloads, of the engine with the most updates there."""
    firsts = []
    for workload in comparison.WORKLOADS_OF_PART:
        if workload not in found:
            continue
        result = found[workload]
        speeds = {
            name: results.median(results.values(result, name, "updates_per_s")) or 0.0
            for name in comparison.engines_of(result)
            if name.startswith("edgelearn ")
        }
        if speeds:
            fastest = max(speeds, key=speeds.__getitem__)
            firsts.append(results.median(results.values(result, fastest, "first_round_s")))
    return max((v for v in firsts if v is not None), default=None)


def _memory(found: Results) -> float | None:
    if memory.WORKLOAD not in found:
        return None
    result = found[memory.WORKLOAD]
    names = dict.fromkeys(n for turn in result["turns"] for n in turn["runs"])
    peaks = [results.median(results.values(result, name, "peak_mib")) for name in names]
    return max((p for p in peaks if p is not None), default=None)


def _continual(method: str) -> Any:
    """Return the best engine's ratio among those that agree with Avalanche in accuracy.

    NaN if there are some but none agrees; nothing can be said from a single seed.
    """

    def measured(found: Results) -> float | None:
        if continual.WORKLOAD not in found:
            return None
        result = found[continual.WORKLOAD]
        ratios, disagree = [], False
        for engine in result["config"]["engines"]:
            ratio = results.ratio(
                result, "cpu_s", f"{method}: {continual.AVALANCHE}", f"{method}: {engine}"
            )
            agrees = continual.agree(result, method, engine)
            if ratio is not None and agrees:
                ratios.append(ratio[0])
            disagree = disagree or agrees is False
        return max(ratios, default=float("nan") if disagree else None)

    return measured


def _ewc(found: Results) -> float | None:
    if ewc.WORKLOAD not in found:
        return None
    result = found[ewc.WORKLOAD]
    added = [ewc.overhead(result, tier) for tier in result["config"]["tiers"]]
    return max((a for a in added if a is not None), default=None)


def _fisher(found: Results) -> float | None:
    if ewc.WORKLOAD not in found:
        return None
    return results.median(results.values(found[ewc.WORKLOAD], ewc.FISHER, "ours_ms"))


def _device(method: str) -> Any:
    def measured(found: Results) -> float | None:
        return device.factor(found[device.PART], method) if device.PART in found else None

    return measured


def _added(method: str) -> Any:
    """Return what a method adds to a pass of naive on one device, on the reference engine."""

    def measured(found: Results) -> float | None:
        if device.PART not in found:
            return None
        return device.added(found[device.PART], method, "reference")

    return measured


def _fisher_epochs(found: Results) -> float | None:
    return device.fisher_epochs(found[device.PART]) if device.PART in found else None


def _cpu(tiers: tuple[str, ...]) -> Any:
    return _of_any("flute", "cpu_s_per_round", tiers)


def _served(
    figure: Callable[[dict[str, Any], str], float | None], subject: str
) -> Callable[[Results], float | None]:
    """Return a figure of a served network."""

    def measured(found: Results) -> float | None:
        result = found.get(runtimes.PART)
        return None if result is None else figure(result, subject)

    return measured


def _codec(figure: Callable[[dict[str, Any], str], float | None], name: str) -> Any:
    """Return a figure of a codec."""

    def measured(found: Results) -> float | None:
        return figure(found[codecs.PART], name) if codecs.PART in found else None

    return measured


def _pipeline(name: str, field: str) -> Any:
    """Return a figure of a pipeline."""

    def measured(found: Results) -> float | None:
        result = found.get(pipelines.PART)
        return None if result is None else pipelines.figure(result, name, field)

    return measured


_INT4 = "int4, blocks of 1,024, entropy-coded"
_TOP_K = "top-k, 1 %, int8, entropy-coded"
_RESCALED = f"{_TOP_K}, rescaled"
_RANDOM_K = "random-k, 5 %, int4, blocks of 1,024, entropy-coded"
_CNN_PRUNED, _INT8, _CHANNELS = "small CNN, pruned", "MobileNetV2, int8", "MobileNetV2, channels"

TARGETS = (
    Target("W1, pool, against Flower/Ray", 2, True, _times("w1", "pool"), " x"),
    Target("W1, native, against Flower/Ray", 4.3, True, _times("w1", "native"), " x"),
    Target("W1, native, of the sgemm peak", 75, True, _share("w1", "native"), " %"),
    Target("W2, pool, against Flower/Ray", 13, True, _times("w2", "pool"), " x"),
    Target("W2, native, against Flower/Ray", 35, True, _times("w2", "native"), " x"),
    Target("W3, batched, against Flower/Ray", 170, True, _times("w3", "batched"), " x"),
    Target("W3, native, against Flower/Ray", 1000, True, _times("w3", "native"), " x"),
    Target("W3, a message per client, against Flower/Ray", 7, True, _faithful, " x"),
    Target(
        "softmax regression, pool or batched, CPU a round (Flower/Ray 0.37, pfl 0.055 elsewhere)",
        0.012,
        False,
        _cpu(("pool", "batched")),
        " s",
    ),
    Target("softmax regression, native, CPU a round", 0.003, False, _cpu(("native",)), " s"),
    Target("start of the process to the end of round 1", 5, False, _first_round, " s"),
    Target("10,000 devices with 200 remembered samples, peak", 1024, False, _memory, " MiB"),
    Target(
        "replay, less CPU than Avalanche at equal accuracy", 10, True, _continual("replay"), " x"
    ),
    Target("EWC, less CPU than Avalanche at equal accuracy", 10, True, _continual("ewc"), " x"),
    Target("EWC adds to a step, on the worst engine", 15, False, _ewc, " %"),
    Target("Fisher of 60 samples, 2NN, CPU", 3, False, _fisher, " ms"),
    Target("one device, naive, less CPU than Avalanche", 3, True, _device("naive"), " x"),
    Target("one device, replay, less CPU than Avalanche", 3, True, _device("replay"), " x"),
    Target("one device, EWC, less CPU than Avalanche", 3, True, _device("ewc"), " x"),
    Target("one device, EWC adds to naive, consolidation included", 25, False, _added("ewc"), " %"),
    Target("one device, SI adds to naive, consolidation included", 25, False, _added("si"), " %"),
    Target("Fisher of 1,000 samples, small CNN, in epochs", 2, False, _fisher_epochs, " epochs"),
    *(
        target
        for subject, most_ms in ((CNN, 10), (MOBILENET, 150))
        for target in (
            Target(
                f"{subject}, int8: torch and ONNX Runtime agree",
                99.5,
                True,
                _served(runtimes.agreement, subject),
                " %",
            ),
            Target(
                f"{subject}, int8: accuracy of torch and ONNX Runtime, apart",
                0.3,
                False,
                _served(runtimes.difference, subject),
                " points",
            ),
            Target(
                f"{subject}: new weights in service, ONNX Runtime",
                most_ms,
                False,
                _served(runtimes.refresh, subject),
                " ms",
            ),
            Target(
                f"{subject}: int8 by ONNX Runtime against eager float, batch 1",
                3,
                True,
                _served(runtimes.over_eager, subject),
                " x",
            ),
            Target(
                f"{subject}: int8 against float by ONNX Runtime, batch 1",
                1.2,
                True,
                _served(runtimes.over_float, subject),
                " x",
            ),
            Target(
                f"{subject}: int8 loses", 0.5, False, _served(runtimes.lost, subject), " points"
            ),
            Target(
                f"{subject}: bytes of int8, of those of float",
                0.27,
                False,
                _served(runtimes.share_of_bytes, subject),
            ),
        )
    ),
    Target(f"{_INT4}: fewer bytes up", 15, True, _codec(codecs.fewer, _INT4), " x"),
    Target(f"{_INT4}: lost", 0.5, False, _codec(codecs.lost, _INT4), " points"),
    Target(f"{_TOP_K}: fewer bytes up", 150, True, _codec(codecs.fewer, _TOP_K), " x"),
    Target(f"{_TOP_K}: lost", 2.5, False, _codec(codecs.lost, _TOP_K), " points"),
    *(
        target
        for name in (_RESCALED, _RANDOM_K)  # to the same end, found later
        for target in (
            Target(f"{name}: fewer bytes up", 150, True, _codec(codecs.fewer, name), " x"),
            Target(f"{name}: lost", 2.5, False, _codec(codecs.lost, name), " points"),
        )
    ),
    Target(
        f"{_CNN_PRUNED} to 0.9, int8, packed: fewer bytes",
        22,
        True,
        _pipeline(_CNN_PRUNED, "fewer_bytes"),
        " x",
    ),
    Target(f"{_CNN_PRUNED}: lost", 1, False, _pipeline(_CNN_PRUNED, "lost"), " points"),
    Target(
        f"{_INT8}: fewer bytes",
        3.6,
        True,
        _pipeline(_INT8, "fewer_bytes"),
        " x",
    ),
    Target(
        "MobileNetV2, int8: lost", 0.5, False, _pipeline("MobileNetV2, int8", "lost"), " points"
    ),
    Target(f"{_CHANNELS}: fewer bytes", 10, True, _pipeline(_CHANNELS, "fewer_bytes"), " x"),
    Target(
        f"{_CHANNELS}: less time than eager float", 5, True, _pipeline(_CHANNELS, "quicker"), " x"
    ),
    Target(f"{_CHANNELS}: lost", 2, False, _pipeline(_CHANNELS, "lost"), " points"),
)


# Kept by hand: why a target was missed, as far as measurements tell.
REASONS = """\
**What was missed, and why.** *W1, pool*: workers run torch's convolutions, whose pooling alone
takes a fifth of a step; with two processes on two cores nothing is left to gain without other
kernels, which is what the native engine is. *W3*: below 20 microseconds an update the ratio hangs
on how fast the machine runs Ray's Python: on a second machine (`results/w3-xeon.json`, Intel Xeon)
batched was 165 x and native 631 x. *EWC's step*: beside the weights, the pull reads the anchor and
the curvature in every step, so it moves two more vectors of the model's size. On the Intel Xeon of
this table torch's passes over them double a step of the reference engine, while the kernels, with
one pass, add 17 %; on an AMD EPYC (`results/ewc-epyc.json`), where a plain step takes the kernels
no longer than memory needs for its weights, it was 21 % and 33 %, and 35 % on the worst engine.
Prefetching gained nothing, half precision would break the promised 1e-4 between engines.
*Avalanche, 20
devices*: its step of the 2NN costs 0.7 ms (replay) and 1.3 ms (EWC); the compiled step with its
replayed samples costs 0.1 ms, so seven to thirteen is the most that training alone could give, and
consolidation (a Fisher of 240 samples per device; writing what is remembered) is half of what is
left. With as many replayed samples in an epoch's last batch as in any other, which is what
Avalanche does, accuracies agree. *One device*: what EWC adds there holds the Fisher of each
experience; SI sees each step's gradient, which a plain step never writes out, and keeps a sum of
the network's size. "What regularization adds to a step" has it by engine: the vectors of the 2NN do
not fit the cache together with the weights, those of a network of 25,000 parameters do, and there
the kernels stay below 25 %.
*Int8 against float of one engine*: more than half of what an answer of the small CNN takes in int8
is its first convolution, 23 microseconds, 4 in float ("Where ONNX Runtime's microseconds and bytes
go"). The engine's direct integer convolutions on x86 want a multiple of 4 channels in and 16 or
more out; with 1 and 8 it unfolds the image byte by byte and multiplies matrices. If that took no
time at all, int8 would be at 1.3 x. Tried by hand, with no clear gain and no script kept:
blocks of places as channels, a depthwise convolution of a repeated channel, signed activations, a
fixed batch and the session's options. With more channels int8 is quicker.
*top-k 1 %*, with feedback: new classes come every eight rounds, and with ten of a hundred devices
in a round each meets the server four times, so what it held back is stale by then; feedback brings
nothing here ("When error feedback pays" has a fleet and a stream where it does). The rows of
*rescaled* top-k and of random-k were added when that was known, against the same two bounds: they
were picked from some twenty variants on seed 0, and seeds 1 and 2 run once. What top-k sends of a
tensor is shorter than the tensor's update, so the server goes a shorter way than the devices did;
its length given back, top-k loses half. The rest is bias: small numbers that agree are sent by
nobody. Random-k errs more in each message, but with the mean zero and on each device otherwise, and
the mean over ten devices and forty rounds takes that out. Twice the share of top-k in 4 bits, with
feedback, is at the bound."""


def section(found: Results) -> str:
    """Return the table of targets."""
    lines = ["| target | promised | measured | |", "|---|---|---|---|"]
    note = (
        "Of an engine that ran faithful and fused, the better counts; of memory the worst engine."
    )
    return "\n".join([*lines, *(target.row(found) for target in TARGETS), "", note, "", REASONS])
