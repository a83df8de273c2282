"""Central training for stages of compression: a network, samples, and what keeps it in line.

Plain minibatch training on one machine, with what a stage may add: a teacher to answer like, a mask
of weights that stay zero, and rounding as the int8 runtime does it. The same seed gives the same
bits. How a fleet trains is in `edgelearn.device`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.compress.distill import hard_distillation, soft_distillation
from edgelearn.compress.fake_quantized import FakeQuantized
from edgelearn.errors import DivergenceError, RunError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Encoding, Samples, SharedSamples
from edgelearn.seeds import derive, torch_generator

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")
TEACHINGS = ("soft", "hard")
_ROWS = 256  # of a batch that is only asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        epochs: Passes over the samples, at least 0.
        steps: Steps in all, whatever the epochs; 0 goes by epochs.
        batch_size: Samples per step, at least 1; what is left at the end of a pass, if it is more
            than one sample, is a smaller batch.
        optimizer: "adam" or "sgd".
        lr: Learning rate, above 0.
        schedule: "constant", or "cosine", which falls to 0 at the end.
        momentum: Of sgd, in [0, 1).
        weight_decay: L2 penalty, at least 0.
    """

    epochs: int = 1
    steps: int = 0
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value, is_right, allowed in (
            ("epochs", self.epochs, self.epochs >= 0, "at least 0"),
            ("steps", self.steps, self.steps >= 0, "at least 0"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, ", ".join(OPTIMIZERS)),
            ("lr", self.lr, self.lr > 0, "above 0"),
            ("schedule", self.schedule, self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "0 to less than 1"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
        ):
            if not is_right:
                raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """Whom to answer like: (1 - alpha) cross-entropy to labels + alpha distillation.

    Attributes:
        teacher: The network that knows; it is asked in eval mode.
        alpha: Weight of the distillation, in [0, 1].
        temperature: T of soft labels, above 0; their loss is multiplied by T^2.
        kind: "soft" or "hard"; see `edgelearn.compress.distill`.
    """

    teacher: nn.Module
    alpha: float = 0.5
    temperature: float = 4.0
    kind: str = "soft"

    def __post_init__(self) -> None:
        for name, value, is_right, allowed in (
            ("alpha", self.alpha, 0 <= self.alpha <= 1, "0 to 1"),
            ("temperature", self.temperature, self.temperature > 0, "above 0"),
            ("kind", self.kind, self.kind in TEACHINGS, ", ".join(TEACHINGS)),
        ):
            if not is_right:
                raise ValueError(f"{name} is {value!r}; allowed: {allowed}")

    def loss(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row [B], in nats."""
        if self.kind == "hard":
            taught = hard_distillation(logits, teacher_logits)
        else:
            taught = soft_distillation(logits, teacher_logits, temperature=self.temperature)
        told = F.cross_entropy(logits, labels, reduction="none")
        return (1 - self.alpha) * told + self.alpha * taught


def samples_of(x: Tensor, y: Tensor, encoding: Encoding | None = None) -> Samples:
    """Return tensors as samples to train on.

    Args:
        x: [N, ...]; inputs as they are, or as they are stored.
        y: Labels [N], int64.
        encoding: How stored samples become inputs; None: they are inputs.
    """
    store = SharedSamples(x, y, Encoding() if encoding is None else encoding)
    return Samples(store, torch.arange(len(y), dtype=torch.int32))


def tune(
    module: nn.Module,
    data: Samples,
    how: Training,
    *,
    seed: int,
    teaching: Teaching | None = None,
    stays: Tensor | None = None,
    bits: int | None = None,
    rounds_inputs: bool = True,
) -> nn.Module:
    """Return a trained copy of a network, in eval mode.

    Args:
        module: The network; it stays as it is.
        data: Samples to train on.
        how: For how long, and how.
        seed: Of the order of samples, and of layers that draw (dropout).
        teaching: Whom to answer like; None trains on labels.
        stays: Mask [T] over the trained parameters (`edgelearn.compress.prune`): what is False is 0
            in the network returned, and at every step.
        bits: Of a weight while training (quantization-aware training); None trains in float.
        rounds_inputs: With `bits`, whether layers' inputs are rounded to 8 bits too.

    Raises:
        ValueError: If there are no samples, or the mask is of another network.
        RunError: If batches are too small for batch norm.
        DivergenceError: If a loss, or a weight at the end, is not finite.
    """
    if not len(data):
        raise ValueError("there are no samples to train on")
    model = FlatModel(copy.deepcopy(module))
    layout = model.layout
    if stays is not None and tuple(stays.shape) != (layout.num_trained,):
        raise ValueError(f"the mask is {tuple(stays.shape)}; expected {(layout.num_trained,)}")
    params = model.initial()
    model.carry(params)  # what a forward pass writes (statistics of norms) lands in `params`
    taught = None if teaching is None else logits_of(teaching.teacher, data)
    seen = model if bits is None else FakeQuantized(model, bits, rounds_inputs=rounds_inputs)
    trained = params[: layout.num_trained].clone().requires_grad_()
    gone = None if stays is None else ~stays
    if gone is not None:
        trained.data[gone] = 0
    num_steps = how.steps or how.epochs * _num_batches(len(data), how.batch_size)
    optimizer = _optimizer(trained, how)
    model.module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "compress-layers"))
        for step, places in enumerate(_batches(len(data), how.batch_size, num_steps, seed)):
            if how.schedule == "cosine":
                share = torch.tensor(step / num_steps * torch.pi)
                optimizer.param_groups[0]["lr"] = how.lr * float(1 + torch.cos(share)) / 2
            batch = data.batch(places)
            try:
                logits = seen(trained, batch.x)
            except ValueError as error:  # batch norm of one value a channel
                raise RunError(
                    f"step {step + 1} of {num_steps}, a batch of {len(batch)}: {error}"
                ) from error
            loss = _loss(logits, batch, teaching, taught, places)
            if not bool(torch.isfinite(loss)):
                raise DivergenceError(
                    f"step {step + 1} of {num_steps}: the loss is {float(loss.detach())}; a lower "
                    f"lr than {how.lr:g} may help"
                )
            (trained.grad,) = torch.autograd.grad(loss, trained)
            optimizer.step()
            if gone is not None:
                trained.data[gone] = 0
    if not bool(torch.isfinite(trained).all()):  # no loss has seen the last step
        raise DivergenceError(
            f"step {num_steps} of {num_steps}: weights are not finite after it; a lower lr than "
            f"{how.lr:g} may help"
        )
    params[: layout.num_trained] = trained.detach()
    counters = {n: b for n, b in model.module.named_buffers() if not b.is_floating_point()}
    return loaded(module, {**layout.views(params), **counters})


def loaded(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with other values in some of its tensors, in eval mode."""
    made = copy.deepcopy(module).eval()
    state = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)
    return made


def logits_of(module: nn.Module, data: Samples) -> Tensor:
    """Return a network's answers to samples [n, C], in eval mode; it stays as it is."""
    asked = copy.deepcopy(module).eval()
    with torch.no_grad():
        places = torch.split(torch.arange(len(data)), _ROWS)
        return torch.cat([asked(data.batch(some).x) for some in places])


def _loss(
    logits: Tensor,
    batch: Batch,
    teaching: Teaching | None,
    taught: Tensor | None,
    places: Tensor,
) -> Tensor:
    if teaching is None or taught is None:
        return F.cross_entropy(logits, batch.y)
    return teaching.loss(logits, taught[places], batch.y).mean()


def _num_batches(count: int, size: int) -> int:
    """Return the batches of a pass; one sample alone is none, as batch norm can't have it."""
    full, rest = divmod(count, size)
    return full + (rest > 1 or full == 0)


def _batches(count: int, size: int, num_steps: int, seed: int) -> list[Tensor]:
    """Return the places of samples in each step."""
    found: list[Tensor] = []
    epoch = 0
    while len(found) < num_steps:
        order = torch.randperm(count, generator=torch_generator(seed, "compress-shuffle", epoch))
        found += torch.split(order, size)[: _num_batches(count, size)]
        epoch += 1
    return found[:num_steps]


def _optimizer(trained: Tensor, how: Training) -> torch.optim.Optimizer:
    if how.optimizer == "adam":
        return torch.optim.Adam([trained], lr=how.lr, weight_decay=how.weight_decay)
    return torch.optim.SGD(
        [trained], lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay
    )
