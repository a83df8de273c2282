"""The empirical Fisher of 60 samples on the 2NN: edgelearn's, vmap of grad, and a loop of grads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from clock import argument, finish
from torch import Tensor
from torch.func import grad, vmap

from edgelearn.continual.fisher import empirical_fisher
from edgelearn.scenario.load import load
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.world import build


def cpu_ms(function: Callable[[], Tensor], repeats: int) -> float:
    """Return the median CPU milliseconds of a call, after one to warm up."""
    function()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(1e3 * (time.process_time() - started))
    return statistics.median(found)


def main() -> None:
    asked = argument()
    torch.set_num_threads(1)
    world = build(load(asked["scenario"]))
    model = world.model()
    model.module.eval()
    params = model.initial()
    data = Samples(world.train, torch.arange(asked["samples"], dtype=torch.int32))
    batch = data.batch()

    def loss(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(p, x[None]), y[None])

    def ours() -> Tensor:
        return empirical_fisher(model, params, data)

    def mapped() -> Tensor:
        total = torch.zeros_like(params)
        for x, y in zip(batch.x.split(32), batch.y.split(32), strict=True):
            total += vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y).square().sum(0)
        return total / len(batch)

    def looped() -> Tensor:
        p, total = params.clone().requires_grad_(), torch.zeros_like(params)
        for x, y in zip(batch.x, batch.y, strict=True):
            total += torch.autograd.grad(loss(p, x, y), p)[0].square()
        return total / len(batch)

    expected = looped()
    error = max(float((f() - expected).norm() / expected.norm()) for f in (ours, mapped))
    found = {f.__name__: cpu_ms(f, asked["repeats"]) for f in (ours, mapped, looped)}
    finish({**{f"{name}_ms": value for name, value in found.items()}, "relative_error": error})


if __name__ == "__main__":
    main()
