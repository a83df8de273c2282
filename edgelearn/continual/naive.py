"""Naive: fine-tuning on whatever arrives; the floor that every method has to beat."""

from __future__ import annotations

from typing import final

from edgelearn.continual.strategy import ClientStrategy


@final
class Naive(ClientStrategy):
    """Remember nothing."""
