"""Int8 training: a device that trains int8 codes, and has no float copy of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from edgelearn.compress.codes import ROUNDINGS, grid, moved_codes, nearest_codes, weights
from edgelearn.continual.coded import (
    ALL,
    BIASES,
    cut,
    declaration_of,
    joined,
    pieces_of,
    table_of,
)
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.errors import DivergenceError, StrategyError
from edgelearn.params import FlatModel


@final
class Int8Train(ClientStrategy):
    r"""Train the codes that a device stores, with quantization-aware scaling (QAS).

    In a round a device holds a weight as w = s c, with an int8 code c and a scale s of its output
    channel that stays as it is; biases and norms are float32. By the chain rule the gradient of a
    code is s dL/dw, while the code is w / s: beside what it is to change it is s^2 too small, and
    hardly a step reaches the next code. QAS multiplies it by s^-2 (Lin et al., section 2.1):

        c <- clip(R(c - lr s^-2 dL/dc), -127, 127),   s^-2 dL/dc = s^-1 dL/dw,

    with R stochastic (E[R(x)] = x, which keeps steps far below 1 in the mean) or to the nearest.
    Networks compute with s c, whose float32 values exist for the time of a step; what is left of a
    step is codes, so a weight carries no fraction from one step to the next. That is the method,
    and it is what `codes` in memory hold: a byte a weight, for the time of a round.

    **In a federation.** The global parameters arrive as float32 and are put on the grid, to the
    nearest code: with `headroom` 1 a device begins with the codes that the int8 runtime serves. It
    sends s (c_end - c_begin), which codes can represent, added to what it got: a code that did not
    change sends exactly 0, and steps that the mean over a cohort makes smaller than s are kept by
    the server, whose parameters are float32. Rounding on arrival is not sent.

    It joins strategies that go step by step (`replay+int8-train`, `ewc+int8-train`). One that
    leaves its own weights on the device, or moves them after the last step (`fedper`, `reptile`
    behind it), contradicts codes and is refused in the first round where it shows. Inputs of layers
    are float; `int8-train+qat` rounds them, too. The optimizer has to be plain SGD: momentum would
    be float32 memory of the network's size. It trains device by device.

    Reference: Lin, Zhu, Chen, Wang, Gan, Han, "On-Device Training Under 256KB Memory", NeurIPS
    2022, arXiv:2206.15472, sections 2.1 and 2.2. We differ: weights are rounded after each step,
    where the authors' simulation keeps a float32 value and rounds it in the forward pass; biases
    are float32, where theirs are int32 and scaled by (s s_x)^-2; gradients are float32; layers are
    named (`scope`), not searched for; torch computes in float32, so this shows accuracy and
    declares memory, and saves no time.

    Args:
        rounding: R: "stochastic" or "nearest".
        is_scaled: Whether QAS is on. Off is an ablation: the codes then do not train.
        scope: What trains ("sparse update"): "all", "biases" (each parameter with that name), names
            of modules, such as "2" or "features.conv", or a list of these. The rest stays as it is.
        headroom: How far the largest weight of a channel can grow in a round, at least 1; the grid
            is coarser by as much.
    """

    needs_plain_sgd = True

    def __init__(
        self,
        *,
        rounding: str = "stochastic",
        is_scaled: bool = True,
        scope: str | Sequence[str] = ALL,
        headroom: float = 1.5,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}; allowed: {', '.join(ROUNDINGS)}")
        parts = (scope,) if isinstance(scope, str) else tuple(scope)
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise ValueError(f"scope is {scope!r}; allowed: {ALL}, {BIASES}, or names of modules")
        if not 1 <= headroom < float("inf"):
            raise ValueError(f"headroom is {headroom}; at least 1 is allowed")
        self.rounding = rounding
        self.is_scaled = is_scaled
        self.scope = parts
        self.headroom = headroom

    def overrides(self, hook: str) -> bool:
        """Whether this strategy changes a hook; scaled, the gradient of a weight is SGD's."""
        return super().overrides(hook) and (hook != "adjust" or not self.is_scaled)

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the network as codes, for the time of a round."""
        return declaration_of(table_of(model, self.scope))

    def view(self, model: FlatModel) -> FlatModel:
        """Return the network: it sees the weights of codes anyway, and goes device by device."""
        return model

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Put the global parameters on the grid."""
        table = table_of(model, self.scope)
        codes, scales, rest = [], [], []
        for row, piece in cut(table, params):
            if row.is_coded:
                scale = grid(piece, headroom=self.headroom)
                scales.append(scale)
                codes.append(nearest_codes(piece, scale).flatten())
            else:
                rest.append(piece.flatten())
        memory = memory.replace(
            codes=joined(codes, torch.int8),
            scales=joined(scales),
            rest=joined(rest),
            begun=_fingerprint(codes),
            table=torch.tensor([row.numbers for row in table], dtype=torch.int32).view(-1, 4),
        )
        trained = torch.cat([piece.weights().flatten() for piece in pieces_of(memory)])
        return torch.cat([trained, params[len(trained) :]]), memory

    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        """Leave gradients of codes unscaled, if asked: of weights, they are s^2 times SGD's."""
        if self.is_scaled:
            return gradients
        pieces = pieces_of(memory)
        table = [piece.row for piece in pieces]
        unscaled = [
            gradient * piece.scale[:, None].square() if row.is_coded else gradient
            for piece, (row, gradient) in zip(pieces, cut(table, gradients), strict=True)
        ]
        return torch.cat([part.flatten() for part in unscaled])

    def proximal(self, params: Tensor, memory: Memory, *, lr: float) -> Tensor:  # noqa: ARG002
        """Round what a step made of weights to codes.

        Raises:
            DivergenceError: If the step is not finite: clipped to codes, it would look sound.
        """
        if not bool(torch.isfinite(params).all()):
            raise DivergenceError("training diverged: a step on int8 codes is not finite")
        pieces = pieces_of(memory)
        moved = []
        for piece, (row, target) in zip(pieces, cut([p.row for p in pieces], params), strict=True):
            own = piece.weights()
            if not row.is_trained:
                moved.append(own)
            elif not row.is_coded:
                moved.append(target)
            else:
                steps = (target - own) / piece.scale[:, None]
                codes = moved_codes(piece.values, steps, rounding=self.rounding)
                moved.append(weights(codes, piece.scale))
        return torch.cat([part.flatten() for part in moved])

    def after_step(
        self,
        before: Tensor,  # noqa: ARG002
        after: Tensor,
        gradients: Tensor,  # noqa: ARG002
        memory: Memory,
    ) -> Memory:
        """Keep the codes."""
        pieces = pieces_of(memory)
        codes, rest = [], []
        for piece, (row, value) in zip(pieces, cut([p.row for p in pieces], after), strict=True):
            if row.is_coded:
                codes.append(nearest_codes(value, piece.scale).flatten())
            else:
                rest.append(value.flatten())
        return memory.replace(codes=joined(codes, torch.int8), rest=joined(rest))

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Send what codes changed by.

        Raises:
            StrategyError: If another strategy changed the weights on the way in or out.
        """
        pieces = pieces_of(memory)
        table = [piece.row for piece in pieces]
        given, local = (list(cut(table, p)) for p in (passage.given, passage.local))
        sent, begun = [], []
        for piece, (row, start), (_, end) in zip(pieces, given, local, strict=True):
            if not row.is_coded:
                sent.append(end)
                continue
            codes = nearest_codes(end, piece.scale)
            if not torch.equal(end, weights(codes, piece.scale)):
                raise StrategyError(
                    "int8-train holds weights as codes, and something moved them off these after "
                    "the last step; name it before int8-train, if it can be joined at all"
                )
            begun.append(nearest_codes(start, piece.scale))
            change = codes.to(torch.int16) - begun[-1]
            sent.append(start + weights(change, piece.scale))
        if not torch.equal(memory["begun"], _fingerprint(begun)):
            raise StrategyError(
                "int8-train has to begin with the global parameters, and something put others in "
                "their place; name it behind int8-train, if it can be joined at all"
            )
        trained = torch.cat([part.flatten() for part in sent])
        return torch.cat([trained, passage.local[len(trained) :]]), memory


def _fingerprint(codes: Sequence[Tensor]) -> Tensor:
    """Return a number [1], int64, that other codes hardly have."""
    flat = joined([part.flatten() for part in codes], torch.int8)
    return (flat.long() * torch.arange(1, len(flat) + 1)).sum().view(1)
