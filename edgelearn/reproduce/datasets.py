"""Data sets as papers feed them: numbers in [0, 1], not shifted to mean 0."""

from __future__ import annotations

from dataclasses import replace

from edgelearn.scenario.datasets import Dataset
from edgelearn.scenario.datasets import fashion_mnist as load_fashion_mnist
from edgelearn.scenario.datasets import mnist as load_mnist
from edgelearn.scenario.spec import DataSpec


def fashion_mnist(spec: DataSpec) -> Dataset:
    """Fashion-MNIST in [0, 1]."""
    return replace(load_fashion_mnist(spec), mean=0.0, std=1.0)


def mnist(spec: DataSpec) -> Dataset:
    """MNIST in [0, 1]."""
    return replace(load_mnist(spec), mean=0.0, std=1.0)
