"""Write docs/benchmarks.md from the result files: python benchmarks/render.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
from harness import results
from harness.paths import PAGE, RESULTS
from parts import (
    calibration,
    codecs,
    comparison,
    continual,
    device,
    evaluation,
    ewc,
    feedback,
    int8_training,
    memory,
    nodes,
    pipelines,
    pruning,
    quantization,
    runtimes,
    scaling,
    steps,
    targets,
)

INTRO = """# Benchmarks

Every figure here was measured by a script in `benchmarks/` and rendered from the JSON files in
`benchmarks/results/`, which hold every repetition, versions, seed and configuration. `make bench`
repeats the demo, `make bench-engines` most of the rest (hours on 2 cores), `python
benchmarks/render.py` writes this page again.

How to read it: timings on shared machines are noisy, **the ratio is the result**. Engines take
turns in one invocation, in reverse order every other turn; a ratio is taken within a turn, and its
median over turns is given. All engines train on the same devices' samples, with the same cohorts,
initial parameters and step size; the first round of a process is left out of rates. A *client
update* is that of a device with the fleet's mean number of samples. CPU counts all processes of an
engine; memory is the peak of the sum of their proportional set sizes (PSS), sampled. Each peer has
an environment of its own, pinned in `benchmarks/peers/*.txt`, made by the script.

*Faithful*: a Flower message per client. *Fused*: one reply per round, with the engine's mean.
"""

SECTIONS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("demo", "The demo, and the same scenario through Flower's Ray simulation", demo.section),
    *((w, comparison.TITLES[w], comparison.section) for w in comparison.TITLES),
    ("memory", "Memory of a big fleet", memory.section),
    ("evaluation", "What evaluation costs", evaluation.section),
    ("ewc", "What EWC costs", ewc.section),
    ("steps", "What regularization adds to a step", steps.section),
    ("continual", "Continual learning beside Avalanche", continual.section),
    ("device", "One device beside Avalanche", device.section),
    (runtimes.PART, runtimes.TITLE, runtimes.section),
    (nodes.PART, nodes.TITLE, nodes.section),
    (calibration.PART, "Ranges of activations", calibration.section),
    ("scaling", "How it scales", scaling.section),
    ("quantization", "Quantization-aware training", quantization.section),
    ("int8-training", "Training without float weights", int8_training.section),
    (pipelines.PART, "Pipelines of compression", pipelines.section),
    (pruning.PART, "Pruning while learning", pruning.section),
    ("codecs", "What crosses the wire", codecs.section),
    (feedback.PART, feedback.TITLE, feedback.section),
)
# Parts with a script of their own.
SCRIPTS = {
    "demo": "demo.py",
    "quantization": "quantization.py",
    "int8-training": "quantization.py",
    runtimes.PART: "runtimes.py",
    nodes.PART: "nodes.py",
}


def footer(result: dict[str, Any]) -> str:
    """Say on what a part was measured, and how to repeat it."""
    config = result["config"]
    versions = ", ".join(f"{n} {v}" for n, v in result["versions"].items())
    peers = "; ".join(
        f"{peer}: {', '.join(f'{n} {v}' for n, v in sorted(found.items()))}"
        for peer, found in config.get("peers", {}).items()
    )
    loads = [load for turn in result["turns"] for load in turn.get("load", [])]
    seed = f"seed {config.get('workload', {}).get('seed', 0)}"
    if "seeds" in config:  # one a turn
        seed = f"seeds 0 to {config['seeds'] - 1}"
    memory = f", {result['memory_gib']:g} GiB" if result["memory_gib"] else ""
    flags = ", ".join([result["machine"], *result["cpu_flags"]])
    return (
        f"{len(result['turns'])} turn(s); {result['cpu']} ({flags}), {result['cores']} cores"
        f"{memory}; Python {result['python']}, {versions}, edgelearn {result['edgelearn']} "
        f"({result['commit']}), {seed}"
        + (f"; load average {min(loads):.1f} - {max(loads):.1f}" if loads else "")
        + (f". Peers' environments: {peers}" if peers else "")
        + f". Repeat: `{config['command']}`."
    )


def render(folder: Path = RESULTS, page: Path = PAGE) -> Path:
    """Write the page from the results in a folder; return its path."""
    found = {name: r for name, _, _ in SECTIONS if (r := results.read(name, folder)) is not None}
    parts = [INTRO]
    if set(found) - set(SCRIPTS):
        parts += ["## Targets, set beforehand\n", targets.section(found) + "\n"]
    for name, title, section in SECTIONS:
        parts.append(f"## {title}\n")
        if name not in found:
            command = SCRIPTS.get(name, f"engines.py --only {name}")
            parts.append(f"Not measured yet: `python benchmarks/{command}`.\n")
            continue
        parts += [section(found[name]) + "\n", footer(found[name]) + "\n"]
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    if scaling.WORKLOAD in found:
        scaling.plot(found[scaling.WORKLOAD], images / scaling.PLOT)
    page.write_text("\n".join(parts))
    return page


if __name__ == "__main__":
    print(render())
