"""How a device keeps large vectors: as float32, or in half or a quarter of the room.

A strategy that keeps vectors of the network's size (Fisher, anchor, teacher) declares them through
a `Storage`. What is stored cheaply is decoded into float32 for the while of a round, so that
declared penalties run as ever: training needs that much RAM more, storage needs less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec

KINDS = ("float32", "float16", "int8")
BLOCK = 256  # numbers that share a scale, which costs 1.6 % of int8


@dataclass(frozen=True)
class Storage:
    r"""How vectors are kept.

    With m the largest absolute value of a block of 256 numbers,

    - "float32" keeps them as they are;
    - "float16" keeps x / m, with an error of at most 2^-11 \|x\| + 2^-25 m;
    - "int8" keeps round(127 x / m), with an error of at most m / 254. Of a **curvature** (not
      negative, and most of it far below the largest) it keeps round(255 sqrt(x / m)), without a
      sign, with an error of at most e (2 sqrt(x) + e), e = sqrt(m) / 510: finer where x is small.
      What is below m / 510^2 counts as zero, and is then not held at all.

    Bounds are up to float32's own rounding.

    Attributes:
        kind: "float32", "float16" or "int8".
        size: Length of each vector.
        is_curvature: Name of each vector -> whether it is a curvature.
    """

    kind: str
    size: int
    is_curvature: Mapping[str, bool] = field(default_factory=dict)

    @property
    def is_cheap(self) -> bool:
        """Whether vectors have to be decoded before they are used."""
        return self.kind != "float32"

    def declaration(self) -> Declaration:
        """Return what has to be declared; each vector is float32 in memory under its own name."""
        found: dict[str, TensorSpec] = {}
        for name, is_curvature in self.is_curvature.items():
            found[name] = TensorSpec((self.size,), is_kept=not self.is_cheap)
            if self.is_cheap:
                found[f"{name}.codes"] = TensorSpec((self.size,), self._dtype(is_curvature))
                found[f"{name}.scales"] = TensorSpec((math.ceil(self.size / BLOCK),))
        return found

    def put(self, memory: Memory, vectors: Mapping[str, Tensor]) -> Memory:
        """Return the memory with vectors [size], to be kept."""
        if not self.is_cheap:
            return memory.replace(**vectors)
        encoded: dict[str, Tensor] = {}
        for name, vector in vectors.items():
            codes, scales = self._encode(vector, is_curvature=self.is_curvature[name])
            encoded |= {f"{name}.codes": codes, f"{name}.scales": scales}
        return memory.replace(**encoded)

    def get(self, memory: Memory, name: str) -> Tensor:
        """Return a vector [size] as it is kept, float32."""
        if not self.is_cheap:
            return memory[name]
        return self._decode(
            memory[f"{name}.codes"],
            memory[f"{name}.scales"],
            is_curvature=self.is_curvature[name],
        )

    def unpacked(self, memory: Memory) -> Memory:
        """Return the memory with each vector under its own name, for the while of a round."""
        if not self.is_cheap:
            return memory
        return memory.replace(**{name: self.get(memory, name) for name in self.is_curvature})

    def _dtype(self, is_curvature: bool) -> torch.dtype:
        if self.kind == "float16":
            return torch.float16
        return torch.uint8 if is_curvature else torch.int8

    def _encode(self, vector: Tensor, *, is_curvature: bool) -> tuple[Tensor, Tensor]:
        blocks = _blocks(vector)
        scales = blocks.abs().amax(1)
        shares = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
        if self.kind == "int8":
            shares = shares.sqrt().mul(255).round() if is_curvature else shares.mul(127).round()
        codes = shares.flatten()[: self.size].to(self._dtype(is_curvature))
        return codes, scales

    def _decode(self, codes: Tensor, scales: Tensor, *, is_curvature: bool) -> Tensor:
        shares = _blocks(codes.to(torch.float32))
        if self.kind == "int8":
            shares = (shares / 255).square() if is_curvature else shares / 127
        return (shares * scales[:, None]).flatten()[: self.size]


def check_kind(kind: str) -> str:
    """Return the name of a kind of storage.

    Raises:
        ValueError: If there is none of that name.
    """
    if kind not in KINDS:
        raise ValueError(f"storage is {kind!r}; allowed: {', '.join(KINDS)}")
    return kind


def _blocks(vector: Tensor) -> Tensor:
    """Return a vector in rows of a block, the last filled up with zeros."""
    rows = math.ceil(len(vector) / BLOCK)
    return torch.nn.functional.pad(vector, (0, rows * BLOCK - len(vector))).view(rows, BLOCK)
