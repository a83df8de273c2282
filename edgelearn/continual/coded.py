"""The trained tensors of a network as a device holds them: codes and scales, or plain numbers.

All are cut to matrices with a row for each output channel; a tensor that is not coded is one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgelearn.compress.codes import weights
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel

ALL, BIASES = "all", "biases"


@dataclass(frozen=True, slots=True)
class Row:
    """One trained tensor.

    Attributes:
        num_rows: Output channels; 1 of what is not coded.
        width: Numbers of each.
        is_coded: Whether it is held as codes.
        is_trained: Whether it is in the scope.
    """

    num_rows: int
    width: int
    is_coded: bool
    is_trained: bool

    @property
    def size(self) -> int:
        """Numbers in it."""
        return self.num_rows * self.width

    @property
    def numbers(self) -> list[int]:
        """What stands for it in memory."""
        return [self.num_rows, self.width, int(self.is_coded), int(self.is_trained)]


@dataclass(frozen=True, slots=True)
class Piece:
    """One trained tensor as a device holds it.

    Attributes:
        row: What it is.
        values: Codes or numbers [rows, width].
        scale: Of codes [rows]; of numbers [0].
    """

    row: Row
    values: Tensor
    scale: Tensor

    def weights(self) -> Tensor:
        """Return what it stands for [rows, width], float32."""
        return weights(self.values, self.scale) if self.row.is_coded else self.values


def table_of(model: FlatModel, scope: Sequence[str]) -> list[Row]:
    """Return the trained tensors of a network.

    Raises:
        StrategyError: If the scope names a module that is not there, or nothing that trains.
    """
    layout, modules = model.layout, dict(model.module.named_modules())
    if unknown := [part for part in scope if part not in (ALL, BIASES, *modules)]:
        names = ", ".join(name for name in modules if name)
        raise StrategyError(
            f"scope is {unknown[0]!r}; allowed: {ALL}, {BIASES}, and the modules {names}"
        )
    coded = {
        id(layer.weight) for layer in modules.values() if type(layer) in (nn.Linear, nn.Conv2d)
    }
    parameters = dict(model.module.named_parameters())
    table = [
        Row(
            num_rows=shape[0] if (is_coded := id(parameters[name]) in coded) else 1,
            width=size // shape[0] if is_coded else size,
            is_coded=is_coded,
            is_trained=any(_is_in(name, part) for part in scope),
        )
        for name, shape, size in zip(
            layout.names[: layout.num_trained_tensors], layout.shapes, layout.sizes, strict=False
        )
    ]
    if not any(row.is_trained for row in table):
        raise StrategyError(f"scope is {', '.join(scope)}: nothing that trains is in it")
    return table


def declaration_of(table: Sequence[Row]) -> Declaration:
    """Declare a network as a device holds it, for the time of a round.

    That is codes, scales, plain numbers, a fingerprint of the first codes, and the table.
    """
    coded = [row for row in table if row.is_coded]
    num_rest = sum(row.size for row in table if not row.is_coded)
    return {
        "codes": TensorSpec((sum(row.size for row in coded),), torch.int8, is_kept=False),
        "scales": TensorSpec((sum(row.num_rows for row in coded),), is_kept=False),
        "rest": TensorSpec((num_rest,), is_kept=False),
        "begun": TensorSpec((1,), torch.int64, is_kept=False),
        "table": TensorSpec((len(table), 4), torch.int32, is_kept=False),
    }


def _is_in(name: str, part: str) -> bool:
    """Whether a part of the scope has a parameter."""
    if part == BIASES:
        return name.rpartition(".")[2] == "bias"
    return part == ALL or name.startswith(f"{part}.")


def cut(table: Sequence[Row], params: Tensor) -> Iterator[tuple[Row, Tensor]]:
    """Yield each trained tensor of a vector [T] or [P], as a matrix [rows, width]."""
    sizes = [row.size for row in table]
    pieces = torch.split(params[: sum(sizes)], sizes)
    return ((row, p.view(row.num_rows, row.width)) for row, p in zip(table, pieces, strict=True))


def pieces_of(memory: Memory) -> list[Piece]:
    """Return the trained tensors as memory holds them."""
    codes, scales, rest = 0, 0, 0
    pieces = []
    for num_rows, width, is_coded, is_trained in memory["table"].tolist():
        row = Row(num_rows, width, bool(is_coded), bool(is_trained))
        if is_coded:
            values = memory["codes"][codes : codes + row.size].view(num_rows, width)
            piece = Piece(row, values, memory["scales"][scales : scales + num_rows])
            codes, scales = codes + row.size, scales + num_rows
        else:
            values = memory["rest"][rest : rest + row.size].view(num_rows, width)
            piece = Piece(row, values, memory["scales"][:0])
            rest += row.size
        pieces.append(piece)
    return pieces


def joined(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return parts as one vector, which may be empty."""
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=dtype)
