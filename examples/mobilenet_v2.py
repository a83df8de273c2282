"""MobileNetV2 from training to a fleet: trained, made smaller, served as int8, and learning on.

1. `edgelearn compress` trains torchvision's MobileNetV2 on Fashion-MNIST, takes channels out,
   distills the whole network into what is left, and quantizes that.
2. A fleet begins with it. The clothes in its pictures turn further with each experience; devices
   answer with the int8 model by ONNX Runtime, and learn what they see, with replay and without.

Run: python examples/mobilenet_v2.py (about a quarter of an hour on an idle core), or with --quick
in about a minute, on so few images that the numbers mean nothing. `--data` takes another data set:
cifar-10, or image-folder with --root FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import edgelearn
from edgelearn.compressing.command import compress_subject
from edgelearn.compressing.subject import find
from edgelearn.scenario.load import from_dict

PIPELINE = (
    "train({epochs}, batch_size=128, lr=0.002, schedule='cosine')"
    " | prune_channels(0.5, epochs=0)"
    " | distill(epochs={epochs}, batch_size=128, lr=0.002, schedule='cosine')"
    " | quantize(8, runtime='onnxruntime')"
)
SMALLER = "3-distill.safetensors"  # the float network that int8 comes from


def fleet(network: Path, strategy: str, *, data: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Return a scenario whose devices begin with a stored network."""
    return {
        "name": f"mobilenet-{strategy}",
        "data": data,
        "model": {"name": "stored", "args": {"file": str(network)}},
        "fleet": {"num_devices": 10, "cohort": 5},
        "stream": {
            "kind": "domain-incremental",
            "transform": "rotate",
            "num_experiences": 2 if quick else 4,  # 0, 45, 90 and 135 degrees
            "rounds_per_experience": 1 if quick else 4,
        },
        "client": {
            "strategy": strategy,
            "args": {"capacity": 100} if strategy == "replay" else {},
            "steps": 2 if quick else 25,
            "batch_size": 32,
            "lr": 0.02,
        },
        "runtime": {"name": "onnxruntime"},
        "evaluate": {"every_rounds": 1 if quick else 4},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="fashion-mnist", help="data set; default fashion-mnist")
    parser.add_argument("--root", default="", help="folder of the data set")
    parser.add_argument("--epochs", type=int, default=4, help="of each training; default 4")
    parser.add_argument("--out", type=Path, default=Path("runs/mobilenet_v2"), help="new folder")
    parser.add_argument("--network", type=Path, help="begin with this file of a pipeline, at 2")
    parser.add_argument("--quick", action="store_true", help="see that it runs, on few images")
    asked = parser.parse_args()
    data: dict[str, Any] = {"dataset": asked.data, "root": asked.root}
    if asked.quick:
        data |= {"max_train": 600, "max_test": 200}
    network = asked.network
    if network is None:
        subject = find("mobilenet_v2", **data)
        pipeline = PIPELINE.format(epochs=1 if asked.quick else asked.epochs)
        compress_subject(subject, pipeline=pipeline, out=asked.out)
        network = asked.out / SMALLER

    for strategy in ("naive", "replay"):
        raw = fleet(network, strategy, data=data, quick=asked.quick)
        record = edgelearn.simulate(from_dict(raw))
        served, exact = record.scores(), record.scores("float")
        print(
            f"{strategy:>7}: int8 {served.average_accuracy:.1%} over all angles at the end "
            f"(float {exact.average_accuracy:.1%}), forgetting {100 * served.forgetting:.1f} points"
        )


if __name__ == "__main__":
    main()
