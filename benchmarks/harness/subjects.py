"""Networks whose service is measured: a small CNN and MobileNetV2, and one for time only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import mobilenet_v2

import edgelearn
from edgelearn.params import FlatModel
from edgelearn.scenario.world import World, build
from edgelearn.seeds import torch_generator

CNN, MOBILENET, LARGE = "CNN", "MobileNetV2, 32 x 32", "MobileNetV2, 224 x 224"


@dataclass(frozen=True)
class Subject:
    """A network with parameters, and inputs for it.

    Attributes:
        model: The network.
        params: Its parameters [P].
        calibration: Training inputs [n, ...].
        x: Test inputs [m, ...].
        y: Their labels [m]; None where the parameters are random, so that answers mean nothing.
        how: Where the parameters come from.
        network: "cnn", or "mobilenet_v2" as torchvision has it.
        arguments: Of its factory.
    """

    model: FlatModel
    params: Tensor
    calibration: Tensor
    x: Tensor
    y: Tensor | None
    how: str
    network: str
    arguments: Mapping[str, Any]


def world_of(dataset: str, *, seed: int) -> World:
    """Return a data set and the small CNN; who holds which samples plays no part here."""
    data, model = {"dataset": dataset}, {"name": "cnn", "args": {}}
    return build(edgelearn.load("split-digits", data=data, model=model, seed=seed))


def small(world: World, *, epochs: int, num_calibration: int, num_test: int) -> Subject:
    """Return the small CNN, trained by Adam."""
    model = world.model()
    steps = epochs * -(-len(world.train.y) // 64)
    params = _trained(model, world, steps, as_images=False)
    how = f"{epochs} epochs of Adam on {world.scenario.data.dataset}"
    inputs = _inputs(world, num_calibration, num_test, as_images=False)
    arguments = {"input_shape": world.sample_shape, "num_classes": world.num_classes}
    return Subject(model, params, *inputs, how, "cnn", arguments)


def mobilenet(
    world: World, file: Path | None, *, steps: int, num_calibration: int, num_test: int
) -> Subject:
    """Return MobileNetV2 for the world's images, padded to 32 x 32 and in three equal channels.

    Args:
        world: The data set.
        file: Its state dict as safetensors, names as torchvision has them; None trains here.
        steps: Of Adam with 64 samples, without a file.
        num_calibration: Training inputs for ranges.
        num_test: Test inputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.scenario.seed)
        model = FlatModel(mobilenet_v2(num_classes=world.num_classes))
    if file is not None:
        found = load_file(file)
        params = model.layout.flatten({name: found[name] for name in model.layout.names})
        how = f"weights of {file.name}"
    else:
        params = _trained(model, world, steps, as_images=True)
        how = f"{steps} steps of Adam on {world.scenario.data.dataset}"
    inputs = _inputs(world, num_calibration, num_test, as_images=True)
    arguments = {"num_classes": world.num_classes}
    return Subject(model, params, *inputs, how, "mobilenet_v2", arguments)


def large(*, seed: int, num_calibration: int, num_test: int) -> Subject:
    """Return MobileNetV2 as made for ImageNet, with random weights: for time and bytes only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlatModel(mobilenet_v2())
        x = torch.randn(max(num_test, num_calibration), 3, 224, 224)
    model.module.eval()
    inputs = x[:num_calibration], x[:num_test], None
    return Subject(model, model.initial(), *inputs, "random weights", "mobilenet_v2", {})


def _inputs(
    world: World, num_calibration: int, num_test: int, *, as_images: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs for ranges, test inputs, and the labels of these."""
    train = world.train.batch(torch.arange(min(num_calibration, len(world.train.y))))
    test = world.test.batch(torch.arange(min(num_test, len(world.test.y)) // 32 * 32))
    calibration, x = (_images(b.x) if as_images else b.x for b in (train, test))
    return calibration, x, test.y


def _images(x: Tensor) -> Tensor:
    missing = 32 - x.shape[-1]
    left = missing // 2
    x = F.pad(x, (left, missing - left, left, missing - left), value=float(x.min()))
    return x.expand(-1, 3, -1, -1).contiguous()


def _trained(model: FlatModel, world: World, steps: int, *, as_images: bool) -> Tensor:
    """Return parameters [P] after some steps of Adam, with the buffers that batch norm kept."""
    module = model.module
    views = model.layout.views(model.initial())
    module.load_state_dict(dict(views), strict=False)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    order = torch.empty(0, dtype=torch.int64)
    epoch = 0
    for _ in range(steps):
        if len(order) < 2:  # batch norm can't do with one
            generator = torch_generator(world.scenario.seed, "shuffle", epoch)
            order, epoch = torch.randperm(len(world.train.y), generator=generator), epoch + 1
        ids, order = order[:64], order[64:]
        batch = world.train.batch(ids)
        loss = F.cross_entropy(module(_images(batch.x) if as_images else batch.x), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        return model.layout.flatten(
            {n: t for n, t in module.state_dict().items() if n in model.layout.names}
        )
