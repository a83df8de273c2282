"""One device, no server: it answers, is told what was right, and learns without forgetting.

Run: python examples/device_loop.py
"""

import tempfile
from pathlib import Path

import edgelearn
from edgelearn.device.learners import make_learner
from edgelearn.device.loop import DeviceLoop
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.world import build


def live(strategy: str, directory: Path) -> None:
    scenario = edgelearn.load(
        "split-digits",
        fleet={"num_devices": 1, "cohort": 1},
        client={"strategy": strategy, "args": {"capacity": 50} if strategy == "replay" else {}},
    )
    world = build(scenario)
    device = DeviceLoop(
        make_learner(world),
        Int8Runtime(),
        directory,
        encoding=world.train.encoding,
        sample_shape=world.sample_shape,
    )
    for position in range(world.stream.num_experiences):
        arriving = world.train_samples(0, position)
        x, labels = world.train.stored(arriving.ids), arriving.labels
        before = (device.infer(x) == labels).float().mean()
        device.feedback(x, labels)
        for _ in range(3):
            device.learn()
        device.end_experience()
        seen = [world.test_samples(0, e) for e in range(position + 1)]
        right = [(device.infer(world.test.stored(s.ids)) == s.labels).float().mean() for s in seen]
        now = "  ".join(f"{share:4.0%}" for share in right)
        print(f"{strategy:>7}  experience {position}: {before:4.0%} right at first, then  {now}")


if __name__ == "__main__":
    for name in ("naive", "replay"):
        with tempfile.TemporaryDirectory() as folder:
            live(name, Path(folder))
