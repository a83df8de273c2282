"""Half precision: each number as a float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from edgelearn.compress.codec import Codec, Piece
from edgelearn.params import Layout


@final
class Float16(Codec):
    """Rounds each number to the nearest IEEE 754 binary16: 2 bytes instead of 4.

    |error| <= max(2^-11 |x|, 2^-25): 11 significant bits, steps of 2^-24 below 2^-14. Beyond
    65,504 a number becomes infinite, and the server rejects the update.
    """

    def pieces(self, layout: Layout) -> Mapping[str, Piece]:
        """One tensor of halves."""
        return {"values": Piece((layout.size,), torch.float16)}

    def encode(
        self,
        layout: Layout,  # noqa: ARG002
        update: Tensor,
        generator: torch.Generator,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Round to half precision."""
        return {"values": update.to(torch.float16)}

    def decode(self, layout: Layout, message: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Return the halves as floats."""
        return message["values"].to(torch.float32)

    def error(self, layout: Layout, update: Tensor) -> Tensor:  # noqa: ARG002
        """Half a step: see the class."""
        bound = (update.abs() * 2.0**-11).clamp(min=2.0**-25)
        return bound.masked_fill(update.abs() > torch.finfo(torch.float16).max, float("inf"))
