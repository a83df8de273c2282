"""Losses that make a network answer as a teacher does; see `edgelearn.compress.distill`."""

from __future__ import annotations

from edgelearn.compress.distill import hard_distillation, soft_distillation

__all__ = ["hard_distillation", "soft_distillation"]
