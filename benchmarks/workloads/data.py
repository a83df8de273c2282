"""Data sets for benchmarks: digits repeated to the size of a fleet, and a synthetic MNIST."""

from __future__ import annotations

import numpy as np

from edgelearn.scenario.datasets import Dataset, digits
from edgelearn.scenario.spec import DataSpec

DIGITS_SAMPLES = 20_000
SYNTHETIC_SAMPLES = 60_000
_TEST = 1_000


def repeated_digits(spec: DataSpec) -> Dataset:
    """Digits over and over, so that 1,000 devices hold about 20 samples each."""
    once = digits(spec)
    rows = np.arange(DIGITS_SAMPLES) % len(once.y_train)
    return Dataset(
        "repeated-digits",
        once.x_train[rows],
        once.y_train[rows],
        once.x_test,
        once.y_test,
        10,
        scale=once.scale,
    )


def synthetic(spec: DataSpec) -> Dataset:
    """MNIST-shaped noise around one prototype per class; `max_train` samples, else 60,000."""
    generator = np.random.default_rng(0)
    prototypes = generator.integers(0, 128, (10, 1, 28, 28), dtype=np.uint8)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = generator.integers(0, 10, count)
        noise = generator.integers(0, 128, (count, 1, 28, 28), dtype=np.uint8)
        noise += prototypes[y]
        return noise, y

    train, test = draw(spec.max_train or SYNTHETIC_SAMPLES), draw(_TEST)
    return Dataset("synthetic", *train, *test, 10, scale=1 / 255, mean=0.5, std=0.25)
