r"""Sine waves from a few points: does a parameter vector adapt in a few steps?

A task is a sine a sin(x + b); ten points of it are given. A network is trained over many tasks by
Reptile, MAML (first and second order), or jointly, on the points of all tasks at once. Then it
takes k steps on ten points of a sine it has never seen, and is measured on all of [-5, 5]. The best
joint answer is the mean over sines, which is zero everywhere, so joint training has next to nothing
to start from; meta-learning finds parameters from which every sine is near.

Published: in both papers the claim is a figure, not a table. Nichol et al., figure 1: after
Reptile (as after MAML) and 32 steps the network fits the sine, where one that starts at random does
not. Finn et al., figures 2 and 3: with ten points MAML is far below the pretrained network after
one step and stays there at ten. So what is to be reproduced is the order

    Reptile, MAML, FOMAML << joint at 5 to 10 steps.

Scaled down: Reptile's demonstration has 30 000 iterations of one sine with outer steps of 0.1; here
`ITERATIONS` = 6 000 of five sines and 0.5 show it as many (unscaled, seed 0 gives 0.61, 0.11, 0.11,
0.12 for the 0.62, 0.11, 0.11, 0.12 below). The other methods have 6 000 iterations of 25 sines.
Mean squared error over 600 new sines after k steps, seeds 0 and 1:

    =======  ==========  ==========  ==========  ==========  ==========
    method   k = 0       1           5           10          32
    =======  ==========  ==========  ==========  ==========  ==========
    reptile  4.16, 4.34  0.62, 0.70  0.11, 0.13  0.11, 0.12  0.12, 0.13
    fomaml   4.19, 4.36  1.14, 1.22  0.08, 0.11  0.05, 0.07  0.04, 0.06
    maml     4.19, 4.35  1.11, 1.19  0.09, 0.10  0.05, 0.06  0.05, 0.05
    joint    4.16, 4.35  4.16, 4.38  4.25, 4.53  4.24, 4.45  3.47, 3.17
    =======  ==========  ==========  ==========  ==========  ==========

With the network and the tasks of Finn et al. (`FINN`), seed 0, after 1, 5 and 10 steps: Reptile
0.74, 0.28, 0.20; FOMAML 0.60, 0.25, 0.22; MAML 0.51, 0.21, 0.16; joint 2.56, 2.24, 2.05.

References: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018,
arXiv:1803.02999, section 4 (tasks, network, Reptile's steps; their sizes are those of the authors'
published demonstration); Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast
Adaptation of Deep Networks", ICML 2017, arXiv:1703.03400, section 5.1 (MAML's steps).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from edgelearn.continual.adapt import Loss, descend, meta_gradient
from edgelearn.errors import DivergenceError, RunError, nearest
from edgelearn.params import FlatModel
from edgelearn.seeds import derive, torch_generator

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"tanh": torch.tanh, "relu": F.relu}
)


@dataclass(frozen=True, slots=True)
class SineSetting:
    """Tasks, network and steps.

    The defaults are Nichol et al.'s for all methods, with MAML's steps from Finn et al., whose own
    network and tasks are `FINN`. Adaptation after training takes steps of the size that the method
    was trained with.

    Attributes:
        hidden: Units of each of two hidden layers; 64, and 40 in Finn et al.
        activation: "tanh", and "relu" in Finn et al.
        amplitude: Range of a.
        largest_phase: b is in [0, this]; 2 pi, and pi in Finn et al.
        grid: Points of [-5, 5] that a task has.
        shots: Points of an inner step, and those given of a new sine.
        reptile_lr: Size of Reptile's inner steps, one for each `shots` points of the grid.
        reptile_epsilon: Its outer step at first; it falls linearly to 0.
        reptile_batch: Tasks in an outer step.
        maml_lr: alpha, size of MAML's one inner step.
        outer_lr: Adam's, for MAML and joint training.
        meta_batch: Tasks in a step of MAML and of joint training.
        joint_lr: Size of the steps on a new sine after joint training. In `FINN` the best of 0.001
            to 0.05 at 10 steps; here none of them is below 3.8 then, and 0.05 diverges by 32.
        steps: After how many steps on a new sine the error is taken.
        num_test: New sines.
    """

    hidden: int = 64
    activation: str = "tanh"
    amplitude: tuple[float, float] = (0.1, 5.0)
    largest_phase: float = 2 * math.pi
    grid: int = 50
    shots: int = 10
    reptile_lr: float = 0.02
    reptile_epsilon: float = 0.5
    reptile_batch: int = 5
    maml_lr: float = 0.01
    outer_lr: float = 1e-3
    meta_batch: int = 25
    joint_lr: float = 0.02
    steps: tuple[int, ...] = (0, 1, 5, 10, 32)
    num_test: int = 600


FINN = SineSetting(hidden=40, activation="relu", largest_phase=math.pi, joint_lr=0.005)
ITERATIONS = 6000


@dataclass(frozen=True, slots=True)
class Sines:
    """K tasks.

    Attributes:
        amplitude: [K, 1].
        phase: [K, 1].
    """

    amplitude: Tensor
    phase: Tensor

    @classmethod
    def draw(cls, setting: SineSetting, count: int, generator: Generator) -> Sines:
        """Draw tasks."""
        low, high = setting.amplitude
        share, turn = torch.rand(2, count, 1, generator=generator)
        return cls(low + (high - low) * share, setting.largest_phase * turn)

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [K, B] at x [K, B]."""
        return self.amplitude * torch.sin(x + self.phase)


def run(
    seed: int, method: str, iterations: int, *, setting: SineSetting | None = None
) -> dict[str, float]:
    """Train with one method and measure it on new sines.

    Args:
        seed: Of the network, and of the tasks that it is trained on and measured with.
        method: One of `METHODS`.
        iterations: Outer steps of training.
        setting: Tasks, network and steps.

    Returns:
        Mean squared error after k steps, averaged over points and new sines, by "mse@k".

    Raises:
        RunError: If there is no such method.
        DivergenceError: If steps on a new sine lead to numbers that are not finite.
    """
    if method not in METHODS:
        allowed = ", ".join(METHODS)
        raise RunError(f"no method {method!r}{nearest(method, METHODS)}; allowed: {allowed}")
    setting = setting or SineSetting()
    start = initial(setting, seed)
    generator = torch_generator(seed, "sine-training")
    trained = METHODS[method](setting, start, iterations, generator)
    lr = {"reptile": setting.reptile_lr, "joint": setting.joint_lr}.get(method, setting.maml_lr)
    return measure(setting, trained, lr=lr, generator=torch_generator(seed, "sine-test"))


def initial(setting: SineSetting, seed: int) -> Tensor:
    """Return the network's initial parameters [T], drawn as torch does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "sine-network"))
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(_sizes(setting))]
    return FlatModel(nn.Sequential(*layers)).initial()


def predict(setting: SineSetting, params: Tensor, x: Tensor) -> Tensor:
    """Return y [K, B] of K networks with parameters [K, T] at x [K, B]."""
    activation = ACTIVATIONS[setting.activation]
    z, start = x.unsqueeze(2), 0
    for before, after in itertools.pairwise(_sizes(setting)):
        if start:
            z = activation(z)
        middle = start + before * after
        weight = params[:, start:middle].view(-1, after, before)
        bias = params[:, middle : middle + after]
        z = torch.baddbmm(bias.unsqueeze(1), z, weight.transpose(1, 2))
        start = middle + after
    return z.squeeze(2)


def measure(
    setting: SineSetting, params: Tensor, *, lr: float, generator: Generator
) -> dict[str, float]:
    """Return the error on new sines after steps of size `lr` from parameters [T]; see `run`."""
    tasks = Sines.draw(setting, setting.num_test, generator)
    x = _grid(setting, setting.num_test)
    given = _loss(setting, tasks, _shuffled(x, generator)[:, : setting.shots])
    whole = _loss(setting, tasks, x)
    own, taken = params.expand(setting.num_test, -1), 0
    errors: dict[str, float] = {}
    for steps in setting.steps:
        own = descend(given, own, steps=steps - taken, lr=lr)
        taken = steps
        with torch.no_grad():
            error = float(whole(own)) / setting.num_test
        if not math.isfinite(error):
            raise DivergenceError(
                f"{steps} steps of size {lr} on a new sine have the error {error}"
            )
        errors[f"mse@{steps}"] = error
    return errors


# -- training --------------------------------------------------------------------------------------


def _reptile(setting: SineSetting, params: Tensor, iterations: int, generator: Generator) -> Tensor:
    """One task in an iteration; its grid is passed through once, in batches of `shots` points."""
    for iteration in range(iterations):
        tasks = Sines.draw(setting, setting.reptile_batch, generator)
        own = params.expand(setting.reptile_batch, -1)
        x = _shuffled(_grid(setting, setting.reptile_batch), generator)
        for some in torch.split(x, setting.shots, dim=1):
            own = descend(_loss(setting, tasks, some), own, steps=1, lr=setting.reptile_lr)
        epsilon = setting.reptile_epsilon * (1 - iteration / iterations)
        params = params.lerp(own.mean(0), epsilon)
    return params


def _maml(
    setting: SineSetting,
    params: Tensor,
    iterations: int,
    generator: Generator,
    *,
    is_second_order: bool = True,
) -> Tensor:
    """One inner step on `shots` points, and the error on as many others; Adam outside."""

    def gradient(now: Tensor, tasks: Sines) -> Tensor:
        x = _shuffled(_grid(setting, setting.meta_batch), generator)
        support, query = x[:, : setting.shots], x[:, setting.shots : 2 * setting.shots]
        _, gradients = meta_gradient(
            _loss(setting, tasks, support),
            _loss(setting, tasks, query),
            now.expand(setting.meta_batch, -1),
            steps=1,
            lr=setting.maml_lr,
            is_second_order=is_second_order,
        )
        return gradients.mean(0)

    return _by_adam(setting, params, iterations, generator, gradient)


def _fomaml(setting: SineSetting, params: Tensor, iterations: int, generator: Generator) -> Tensor:
    return _maml(setting, params, iterations, generator, is_second_order=False)


def _joint(setting: SineSetting, params: Tensor, iterations: int, generator: Generator) -> Tensor:
    """As many points of as many tasks as MAML's query; no inner steps."""

    def gradient(now: Tensor, tasks: Sines) -> Tensor:
        x = _shuffled(_grid(setting, setting.meta_batch), generator)[:, : setting.shots]
        loss = _loss(setting, tasks, x)
        own = now.expand(setting.meta_batch, -1)
        _, gradients = meta_gradient(loss, loss, own, steps=0, lr=0.0)
        return gradients.mean(0)

    return _by_adam(setting, params, iterations, generator, gradient)


def _by_adam(
    setting: SineSetting,
    params: Tensor,
    iterations: int,
    generator: Generator,
    gradient: Callable[[Tensor, Sines], Tensor],
) -> Tensor:
    params = params.clone()
    optimizer = torch.optim.Adam([params], lr=setting.outer_lr)
    for _ in range(iterations):
        params.grad = gradient(params, Sines.draw(setting, setting.meta_batch, generator))
        optimizer.step()
    return params


METHODS: Mapping[str, Callable[[SineSetting, Tensor, int, Generator], Tensor]] = MappingProxyType(
    {"reptile": _reptile, "fomaml": _fomaml, "maml": _maml, "joint": _joint}
)


def _loss(setting: SineSetting, tasks: Sines, x: Tensor) -> Loss:
    """Return the sum over tasks of the mean squared error at x [K, B], by parameters [K, T]."""
    y = tasks(x)
    return lambda params: (predict(setting, params, x) - y).square().mean(1).sum()


def _grid(setting: SineSetting, count: int) -> Tensor:
    return torch.linspace(-5, 5, setting.grid).expand(count, -1)


def _shuffled(x: Tensor, generator: Generator) -> Tensor:
    """Return each row in an order of its own."""
    return x.gather(1, torch.rand(x.shape, generator=generator).argsort(1))


def _sizes(setting: SineSetting) -> tuple[int, ...]:
    return (1, setting.hidden, setting.hidden, 1)
