"""Networks that published settings need and a device does not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgelearn.scenario.models import mlp


def shared_head(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    hidden: Sequence[int] = (64,),
    num_outputs: int = 2,
) -> nn.Module:
    """`mlp` with few outputs, which all experiences share: class c is output c mod `num_outputs`.

    In a task-incremental stream whose experiences have `num_outputs` successive classes each, that
    makes domain-incremental learning from classes: the sample's task says which of the repeated
    logits are compared, and these are the same ones in all tasks.
    """
    if num_classes % num_outputs:
        raise ValueError(f"{num_classes} classes can't share {num_outputs} outputs evenly")
    network = mlp(input_shape=input_shape, num_classes=num_outputs, hidden=hidden)
    return nn.Sequential(network, _Repeat(num_classes // num_outputs))


class _Repeat(nn.Module):
    """Repeats logits [B, K] so many times [B, times K]."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, logits: Tensor) -> Tensor:
        return logits.repeat(1, self.times)
