"""Public checks of the contract of codecs, for those that come with edgelearn and for one's own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from edgelearn.compress.codec import Codec, decoded
from edgelearn.errors import EdgelearnError
from edgelearn.params import Layout

# Sizes that are odd, even, 1, and longer than a block; what is trained, carried and shared.
LAYOUT = Layout(
    ("weight", "bias", "running_mean", "shared/control"), ((7, 41), (3,), (1,), (300,)), 2, 1
)
_DRAWS = 400
_SLACK = 1e-6  # of rounding to float32


def check_codec(codec: Codec, layout: Layout = LAYOUT) -> list[str]:
    """Return what a codec does against its contract; empty if nothing.

    Checked for updates of several sizes and shapes: what is declared is what is made, equal draws
    give equal messages, arguments stay as they are, errors stay within what `error` states, and
    the mean is exact where `is_unbiased` says so (within six standard errors of a few hundred
    draws).

    Args:
        codec: What to check.
        layout: Of the parameters.

    Example:
        >>> from edgelearn.compress.half import Float16
        >>> check_codec(Float16())
        []
    """
    findings: list[str] = []
    for name, update in _updates(layout):
        try:
            findings += [f"{name}: {what}" for what in _findings(codec, layout, update)]
        except Exception as error:  # a plug-in's own
            findings.append(f"{name}: it raised {type(error).__name__}: {error}")
    return findings


def _updates(layout: Layout) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(layout.size, generator=generator)
    yield "normal numbers", 0.01 * normal
    yield "zeros", torch.zeros(layout.size)
    yield "equal numbers", torch.full((layout.size,), -0.25)
    yield "tiny numbers", 1e-30 * normal
    last = torch.arange(layout.size) == layout.size - 1
    yield "one large number", torch.where(last, 100.0, 0.0)
    yield "tensors of different sizes", normal * torch.logspace(-4, 1, layout.size)


def _findings(codec: Codec, layout: Layout, update: Tensor) -> Iterator[str]:
    before = update.clone()
    message = _encode(codec, layout, update, 1)
    if not torch.equal(update, before):
        yield "encode changed the update that it was given"
    again = _encode(codec, layout, before, 1)
    if any(not torch.equal(message[key], again[key]) for key in message if key in again):
        yield "the same update and generator gave two messages"
    try:
        sent = decoded(codec, layout, message)
    except EdgelearnError as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        yield f"{error}{cause}"
        return
    kept = {key: value.clone() for key, value in message.items()}
    decoded(codec, layout, message)
    if any(not torch.equal(message[key], kept[key]) for key in kept):
        yield "decode changed the message that it was given"
    bound = codec.error(layout, update)
    if tuple(bound.shape) != (layout.size,):
        yield f"error returned {tuple(bound.shape)}, expected {(layout.size,)}"
        return
    draws = [sent]
    if codec.is_unbiased:
        seeds = range(2, _DRAWS + 1)
        draws += [decoded(codec, layout, _encode(codec, layout, update, seed)) for seed in seeds]
    errors = torch.stack(draws).double() - update.double()
    largest = bound.double() + _SLACK * update.double().abs()
    if bool((errors.abs() > largest).any()):
        place = int((errors.abs() - largest).amax(0).argmax())
        yield (
            f"number {place} is off by {float(errors[:, place].abs().max()):.3g}, more than the "
            f"stated {float(bound[place]):.3g}"
        )
    if codec.is_unbiased:
        # Errors lie in an interval of at most twice the bound, which is their largest deviation.
        spread = errors.std(0).clamp(min=0) + largest / math.sqrt(_DRAWS)
        off = errors.mean(0).abs() > 6 * spread / math.sqrt(_DRAWS) + _SLACK * update.abs()
        if bool(off.any()):
            yield f"the mean of {int(off.sum())} numbers is off, and it says that it is unbiased"


def _encode(codec: Codec, layout: Layout, update: Tensor, seed: int) -> dict[str, Tensor]:
    return dict(codec.encode(layout, update, torch.Generator().manual_seed(seed)))
