"""Samples made from a network alone: a generator that is asked for what the network knows.

Images x = G(z, y) are sought that the network (the teacher) takes for given classes, whose layers'
inputs have the statistics of real ones, and on which a student that learns from them still differs
from the teacher. Networks with batch norm carry such statistics anyway; for others they are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgelearn.continual.layers import Layer, observe
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples

_ROWS = 256
_LATENT = 64
_HIDDEN = 128
_OUT_OF_QUESTION = -1e9  # logit of a class that is not to be answered


@dataclass(frozen=True, slots=True)
class Synthesis:
    """How samples are made.

    Attributes:
        count: Samples to make.
        batch_size: Samples made at once.
        steps: Steps of the generator for a batch.
        student_steps: Steps of the student after a batch.
        one_hot: Factor of the cross-entropy to the class that a sample is to be of.
        statistics: Factor of the distance of the layers' statistics.
        adversarial: Factor of the difference between student and teacher, from the second batch on.
        temperature: Of the softmax in what the student learns.
        lr: Step size of the generator (Adam); that of z is 5 times as large, that of the student
            also.
    """

    count: int
    batch_size: int = 64
    steps: int = 50
    student_steps: int = 20
    one_hot: float = 0.5
    statistics: float = 10.0
    adversarial: float = 1.0
    temperature: float = 2.0
    lr: float = 0.01


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the real samples.

    Attributes:
        classes: Classes that the teacher knows [C], bool.
        shape: Shape of a sample.
        bounds: Least and largest number in a sample [2].
        means: Mean of each layer's input by feature or channel, for each layer.
        squares: Mean of its square.
    """

    classes: Tensor
    shape: tuple[int, ...]
    bounds: Tensor
    means: Sequence[Tensor]
    squares: Sequence[Tensor]


@torch.no_grad()
def input_statistics(
    model: FlatModel, params: Tensor, data: Samples, layers: Sequence[Layer]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return mean and mean square of each layer's input, by feature or channel.

    Args:
        model: The network, in eval mode.
        params: Trained parameters [T].
        data: Samples, at least one.
        layers: Layers of the network.
    """
    means = [torch.zeros(layer.num_channels) for layer in layers]
    squares = [torch.zeros(layer.num_channels) for layer in layers]
    for start in range(0, len(data), _ROWS):
        batch = data.batch(slice(start, min(start + _ROWS, len(data))))
        part = len(batch) / len(data)
        for i, seen in enumerate(observe(model, params, batch.x, layers)[1]):
            values = layers[i].by_channel(seen)
            means[i] += part * values.mean(0)
            squares[i] += part * values.square().mean(0)
    return means, squares


def synthesize(
    model: FlatModel,
    teacher: Tensor,
    layers: Sequence[Layer],
    known: Known,
    spec: Synthesis,
    generator: Generator,
) -> Tensor:
    """Return made samples [count, ...], float32, their classes taking turns.

    Args:
        model: The network, in eval mode.
        teacher: Its trained parameters [T].
        layers: Layers whose statistics are known.
        known: What is known of real samples.
        spec: How samples are made.
        generator: Source of randomness.
    """
    size, classes = math.prod(known.shape), known.classes.nonzero().flatten()
    weights = [
        _normal((_HIDDEN, _LATENT), math.sqrt(2 / _LATENT), generator),
        _normal((_HIDDEN, len(known.classes)), 1.0, generator),
        torch.zeros(_HIDDEN),
        _normal((size, _HIDDEN), math.sqrt(1 / _HIDDEN), generator),
        torch.zeros(size),
    ]
    student = _like(model, teacher, generator)
    made: list[Tensor] = []
    with torch.enable_grad():
        for first in range(0, spec.count, spec.batch_size):
            num = min(spec.batch_size, spec.count - first)
            labels = classes[torch.arange(first, first + num) % len(classes)]
            against = student if made and spec.adversarial > 0 else None
            noise = torch.randn(num, _LATENT, generator=generator)
            weights, batch = _batch(
                model, teacher, layers, known, spec, weights, noise, labels, against
            )
            made.append(batch)
            if first + num < spec.count and spec.adversarial > 0:
                pool = torch.cat(made)
                student = _taught(model, teacher, student, pool, known.classes, spec, generator)
    return torch.cat(made)


def _batch(
    model: FlatModel,
    teacher: Tensor,
    layers: Sequence[Layer],
    known: Known,
    spec: Synthesis,
    weights: list[Tensor],
    noise: Tensor,
    labels: Tensor,
    student: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Return the generator's new weights, and the best batch on the way to them."""
    weights = [weight.clone().requires_grad_() for weight in weights]
    noise = noise.requires_grad_()
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": [noise], "lr": 5 * spec.lr}]
    optimizer = torch.optim.Adam(groups, lr=spec.lr, betas=(0.5, 0.999))
    best, kept = torch.tensor(float("inf")), torch.empty(0)
    for _ in range(spec.steps):
        images = _images(weights, noise, labels, known)
        logits, inputs = observe(model, teacher, images, layers)
        answers = logits.masked_fill(~known.classes, _OUT_OF_QUESTION)
        loss = spec.one_hot * F.cross_entropy(answers, labels)
        loss = loss + spec.statistics * _distance(layers, inputs, known)
        if student is not None:
            own = model(student, images).masked_fill(~known.classes, _OUT_OF_QUESTION)
            agree = (own.argmax(1) == answers.argmax(1)).float()
            loss = loss - spec.adversarial * (_divergence(own, answers, 1.0) * agree).mean()
        if float(loss.detach()) < float(best):
            best, kept = loss.detach(), images.detach()
        gradients = torch.autograd.grad(loss, [*weights, noise])
        for tensor, gradient in zip([*weights, noise], gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights], kept


def _taught(
    model: FlatModel,
    teacher: Tensor,
    student: Tensor,
    pool: Tensor,
    classes: Tensor,
    spec: Synthesis,
    generator: Generator,
) -> Tensor:
    """Return the student after some steps on what has been made so far."""
    leaf = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=5 * spec.lr)
    with torch.no_grad():
        answers = model(teacher, pool).masked_fill(~classes, _OUT_OF_QUESTION)
    for _ in range(spec.student_steps):
        rows = torch.randperm(len(pool), generator=generator)[: spec.batch_size]
        own = model(leaf, pool[rows]).masked_fill(~classes, _OUT_OF_QUESTION)
        loss = _divergence(own, answers[rows], spec.temperature).mean()
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        optimizer.step()
    return leaf.detach()


def _images(weights: Sequence[Tensor], noise: Tensor, labels: Tensor, known: Known) -> Tensor:
    """Return G(z, y) [B, ...], within the bounds."""
    of_noise, of_class, first_bias, outward, last_bias = weights
    hidden = F.leaky_relu(F.linear(noise, of_noise, first_bias) + of_class.t()[labels], 0.2)
    low, high = known.bounds
    images: Tensor = low + (high - low) * torch.sigmoid(F.linear(hidden, outward, last_bias))
    return images.view(len(noise), *known.shape)


def _distance(layers: Sequence[Layer], inputs: Sequence[Tensor], known: Known) -> Tensor:
    """Return the mean over layers of |mean - mean'| + |var - var'|, each by root of its length."""
    terms = []
    for layer, seen, mean, square in zip(layers, inputs, known.means, known.squares, strict=True):
        values = layer.by_channel(seen)
        found, variance = values.mean(0), values.var(0, unbiased=False)
        wanted = (square - mean.square()).clamp(min=0)
        terms += [_length(found - mean), _length(variance - wanted)]
    return torch.stack(terms).sum() / len(layers)


def _length(values: Tensor) -> Tensor:
    return (values.square().mean() + 1e-12).sqrt()  # a root has no slope at 0


def _divergence(own: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence of each row from the teacher's answers."""
    log_own = torch.log_softmax(own / temperature, 1)
    log_answers = torch.log_softmax(answers / temperature, 1)
    return (log_answers.exp() * (log_answers - log_own)).sum(1)


def _like(model: FlatModel, params: Tensor, generator: Generator) -> Tensor:
    """Return parameters [T] as if new: random numbers with each tensor's own deviation."""
    sizes = list(itertools.islice(model.layout.sizes, model.layout.num_trained_tensors))
    parts = [
        _normal((size,), float(part.std(correction=0)), generator)
        for size, part in zip(sizes, torch.split(params.detach(), sizes), strict=True)
    ]
    return torch.cat(parts)


def _normal(shape: tuple[int, ...], deviation: float, generator: Generator) -> Tensor:
    return deviation * torch.randn(shape, generator=generator)
