"""When error feedback pays: two streams, in a fleet half of which takes part in each round."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from harness import results
from harness.results import Options

from parts import codecs
from parts.codecs import FEW_BITS, HUNDREDTH, PLAIN

PART = "feedback"
TITLE = "When error feedback pays"
# As many samples a device and devices a round as in the scenario, of a fifth of the devices.
_FLEET: Mapping[str, Mapping[str, Any]] = {
    "fleet": {"num_devices": 20, "cohort": 10},
    "data": {"max_train": 12_000},
}
STREAMS: Mapping[str, Mapping[str, Any]] = {
    "two new classes every 8 rounds": {"num_experiences": 5, "rounds_per_experience": 8},
    "all classes from the start": {"num_experiences": 1, "rounds_per_experience": 40},
}
_ONLY_SENT = {**HUNDREDTH, "feedback": False}
CODECS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    PLAIN: ("none", {}),
    "top-k, 1 %, int8, entropy-coded": ("top-k+lzma", HUNDREDTH),
    "the same, no feedback": ("top-k+lzma", _ONLY_SENT),
    "the same, rescaled": ("top-k+lzma", {**_ONLY_SENT, "rescale": True}),
    "random-k, 5 %, int4, entropy-coded": ("random-k+lzma", {"share": 0.05, **FEW_BITS}),
}


def measure(options: Options) -> dict[str, Any]:
    """Run both streams with each codec; every turn is a seed."""

    def runs(seed: int) -> dict[str, results.Run]:
        return {
            _name(stream, name): partial(
                codecs.run,
                codecs.scenario(
                    codec, args, seed=seed, quick=options.quick, stream=tables, **_FLEET
                ),
            )
            for stream, tables in STREAMS.items()
            for name, (codec, args) in CODECS.items()
        }

    workload = codecs.scenario("none", {}, seed=0, quick=options.quick, **_FLEET).as_dict()
    count = 1 if options.quick else 3
    config = {
        "workload": workload,
        "streams": {stream: dict(tables) for stream, tables in STREAMS.items()},
        "codecs": {name: [codec, dict(args)] for name, (codec, args) in CODECS.items()},
        "seeds": count,
        "command": f"python benchmarks/engines.py --only {PART}",
    }
    return results.repeat(PART, runs, options, config=config, repetitions=count)


def _name(stream: str, codec: str) -> str:
    return f"{stream}: {codec}"


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    fleet = result["config"]["workload"]["fleet"]
    lines = [
        (
            f"`{codecs.SCENARIO}` with {fleet['num_devices']} devices in place of 100, a cohort of "
            f"{fleet['cohort']} as above, and as many samples a device (a fifth of them all): a "
            "device takes part in every other round in the mean, where above it is one in ten. "
            "Once with the scenario's stream, and once with 40 rounds of all classes, where what "
            "was held back is of the same classes still; the second was added when feedback was "
            "seen to cost accuracy on the first. Columns as above."
        ),
        "",
        "| stream | updates | fewer | accuracy, % | lost, points |",
        "|---|---|---|---|---|",
    ]
    for stream in result["config"]["streams"]:
        plain = _name(stream, PLAIN)
        for codec in result["config"]["codecs"]:
            name = _name(stream, codec)
            found = results.runs_of(result, name)
            if not found or len(found) != len(results.runs_of(result, plain)):
                continue
            lines.append(
                f"| {stream} | {codec} | {codecs.fewer(result, name, plain) or 0:,.1f} x "
                f"| {results.spread([100 * run['accuracy'] for run in found])} "
                f"| {results.spread(codecs.losses(result, name, plain))} |"
            )
    return "\n".join(lines)
