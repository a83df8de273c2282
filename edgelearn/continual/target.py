"""TARGET, on the device: samples made from the global model stand in for stored ones."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Generator, Tensor

from edgelearn.continual.generator import Known, Synthesis, input_statistics, synthesize
from edgelearn.continual.layers import layers_of
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.scenario.stream import Experience

_OUT_OF_QUESTION = -1e9  # logit of a class that is not to be answered
_FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}


@final
class Target(ClientStrategy):
    r"""Distil from the last global model on samples that a generator made of it.

    When an experience has ended, the device takes the global model as a teacher and makes
    `capacity` samples of the classes seen so far: a generator is trained, without data, so that the
    teacher takes its images for given classes, the inputs of the teacher's layers have the
    statistics of real ones, and a student that learns from the images still differs from the
    teacher (`generator`). It keeps the images and the teacher's logits for them; the generator is
    dropped. In later experiences a step's loss is

        CE(f(x), y | classes of the experience) + distill * KD(f(x'), logits(x') | classes before),

    with KD the cross-entropy of softmaxes at `temperature`. The separate softmax keeps new classes
    from pushing the old ones down.

    A device stores, for each made sample, as many bytes as a real sample takes, and 4 C; for each
    feature or channel that a layer has as input, 8 bytes of statistics, of its own samples, which
    at the first layer are a mean image and its variance. Nothing but the update is sent. The work
    is `capacity` / 64 x `steps` passes of generator, teacher and student, once in an experience.

    Reference: Zhang, Chen, Zhuang, Lyu, "TARGET: Federated Class-Continual Learning via
    Exemplar-Free Distillation", ICCV 2023, arXiv:2303.06937. This is a variant for devices: the
    paper's **server** makes the samples once and sends them to all devices; here each device makes
    its own, far fewer, from the same model, which sends no samples over the wire and costs every
    device the work. Also different: a fully connected generator, carried on from batch to batch in
    place of the meta-learned one of the paper's code; no augmentation; statistics of layers' inputs
    that the device keeps, where the paper reads those of batch norm, which small networks lack; the
    teacher's logits are kept, not the teacher, for images that stay the same.

    It mixes its samples into the batch by itself, so it can't be combined with replay.

    Args:
        memory_kib: Bytes of the made samples with their logits, in KiB.
        capacity: The same in samples; give one of the two, or none for 200 samples.
        distill: Factor of the distillation, at least 0; the paper's code has 25, at a learning
            rate of 0.01.
        temperature: Of the softmaxes, above 0.
        replay_batch: Made samples per step; 0 takes as many as arrive.
        steps: Steps of the generator for each 64 samples, at least 1.
        one_hot: Factor of the classes in making samples, at least 0.
        statistics: Factor of the layers' statistics, at least 0.
        adversarial: Factor of the student, at least 0; 0 does without one.
    """

    replaces_loss: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_kib: float = 0.0,
        capacity: int = 0,
        distill: float = 5.0,
        temperature: float = 2.0,
        replay_batch: int = 0,
        steps: int = 30,
        one_hot: float = 0.5,
        statistics: float = 10.0,
        adversarial: float = 1.0,
    ) -> None:
        if memory_kib < 0 or capacity < 0 or (memory_kib > 0 and capacity > 0):
            raise ValueError(
                f"memory_kib is {memory_kib} and capacity {capacity}; give one of the two, not "
                "below 0"
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; allowed: above 0")
        if replay_batch < 0:
            raise ValueError(f"replay_batch is {replay_batch}; at least 0 is allowed")
        if steps < 1:
            raise ValueError(f"steps is {steps}; at least 1 is allowed")
        for name, value in (
            ("distill", distill),
            ("one_hot", one_hot),
            ("statistics", statistics),
            ("adversarial", adversarial),
        ):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; at least 0 is allowed")
        self.memory_kib = memory_kib
        self.capacity = capacity
        self.distill = distill
        self.temperature = temperature
        self.replay_batch = replay_batch
        self.steps = steps
        self.one_hot = one_hot
        self.statistics = statistics
        self.adversarial = adversarial

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare made samples and their logits, and what is known of real ones."""
        sample_bytes = facts.sample_bytes - 1  # a made sample has no label
        capacity = self.capacity or 200
        if self.memory_kib > 0:
            each = sample_bytes + 4 * facts.num_classes
            capacity = max(1, int(self.memory_kib * 1024) // each)
        channels = [layer.num_channels for layer in layers_of(model)]
        return {
            "made": TensorSpec((capacity, sample_bytes), torch.uint8),
            "logits": TensorSpec((capacity, facts.num_classes)),
            "current": TensorSpec((facts.num_classes,), torch.bool),
            "past": TensorSpec((facts.num_classes,), torch.bool),
            "bounds": TensorSpec((2,)),
            "learned": TensorSpec((1,)),  # experiences that the statistics are of
            **{f"mean.{i}": TensorSpec((size,)) for i, size in enumerate(channels)},
            **{f"square.{i}": TensorSpec((size,)) for i, size in enumerate(channels)},
        }

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,
    ) -> Memory:
        """Note the classes of the experience."""
        current = torch.zeros_like(memory["current"])
        current[list(experience.classes)] = True
        return memory.replace(current=current)

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        """Let made samples join the batch."""
        if not bool(memory["past"].any()):
            return batch
        count = min(self.replay_batch or len(batch), len(memory["made"]))
        places = torch.randperm(len(memory["made"]), generator=generator)[:count]
        x = unpack(memory["made"][places], memory.store.sample_shape, memory["bounds"])
        y = memory["logits"][places].masked_fill(~memory["past"], _OUT_OF_QUESTION).argmax(1)
        mask = None if batch.mask is None else torch.ones(count, batch.mask.shape[1]).bool()
        return batch.join(Batch(x, y, None, mask, places))

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return cross-entropy of the present samples, and the distillation of the made ones."""
        logits, num_past = model(params, batch.x), batch.num_past
        present = batch.present
        allowed = memory["current"].expand(len(present), -1)
        if present.mask is not None:
            allowed = allowed & present.mask
        now = Batch(present.x, present.y, None, allowed)
        loss = supervised_loss(logits[: len(present)], now)
        if batch.places is None or num_past == 0:
            return loss
        given = memory["logits"][batch.places].masked_fill(~memory["past"], _OUT_OF_QUESTION)
        own = logits[len(present) :].masked_fill(~memory["past"], _OUT_OF_QUESTION)
        soft = torch.softmax(given / self.temperature, 1)
        log_own = torch.log_softmax(own / self.temperature, 1)
        return loss - self.distill * (soft * log_own).sum(1).mean()

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Make samples anew of all classes seen so far."""
        memory = self._with_statistics(model, params, data, memory)
        if float(memory["learned"]) == 0:  # the device has had no samples yet
            return memory
        past, layers = memory["past"] | memory["current"], layers_of(model)
        count, shape = len(memory["made"]), memory.store.sample_shape
        known = Known(
            past,
            shape,
            memory["bounds"],
            [memory[f"mean.{i}"] for i in range(len(layers))],
            [memory[f"square.{i}"] for i in range(len(layers))],
        )
        spec = Synthesis(
            count,
            steps=self.steps,
            one_hot=self.one_hot,
            statistics=self.statistics,
            adversarial=self.adversarial,
            temperature=self.temperature,
        )
        images = synthesize(model, params, layers, known, spec, generator)
        made = pack(images, memory["made"].shape[1], memory["bounds"])
        with torch.no_grad():  # of the images as they are kept
            logits = model(params, unpack(made, shape, memory["bounds"]))
        return memory.replace(made=made, logits=logits, past=past)

    def _with_statistics(
        self, model: FlatModel, params: Tensor, data: Samples, memory: Memory
    ) -> Memory:
        """Take the experience's samples into bounds and statistics, each experience alike."""
        if len(data) == 0:
            return memory
        before = float(memory["learned"])
        found = torch.stack(data.batch().x.aminmax())
        if before:
            low, high = torch.stack([memory["bounds"], found]).unbind(1)
            found = torch.stack([low.min(), high.max()])
        means, squares = input_statistics(model, params, data, layers_of(model))
        rate = 1.0 / (before + 1.0)
        changed = {
            f"{kind}.{i}": memory[f"{kind}.{i}"].lerp(new, rate)
            for kind, news in (("mean", means), ("square", squares))
            for i, new in enumerate(news)
        }
        return memory.replace(bounds=found, learned=memory["learned"] + 1, **changed)


def pack(images: Tensor, num_bytes: int, bounds: Tensor) -> Tensor:
    """Return images [n, ...], within the bounds, as rows of bytes [n, num_bytes].

    One byte for a number is a level between the bounds, as pixels are; more are a float.

    Raises:
        ValueError: If the bytes are not 1, 2, 4 or 8 for a number.
    """
    numbers = images.flatten(1)
    if num_bytes == numbers.shape[1]:
        low, high = bounds
        levels = (numbers - low) / (high - low).clamp(min=1e-12) * 255
        codes: Tensor = levels.round().clamp(0, 255).to(torch.uint8)
    else:
        floats = numbers.to(_float_of(num_bytes, numbers.shape[1]))
        codes = floats.contiguous().view(torch.uint8)
    return codes


def unpack(rows: Tensor, shape: tuple[int, ...], bounds: Tensor) -> Tensor:
    """Return rows of bytes [n, num_bytes] as images [n, *shape], float32."""
    size = math.prod(shape)
    numbers: Tensor
    if rows.shape[1] == size:
        low, high = bounds
        numbers = low + (high - low) * rows.to(torch.float32) / 255
    else:
        numbers = rows.contiguous().view(_float_of(rows.shape[1], size)).to(torch.float32)
    return numbers.view(len(rows), *shape)


def _float_of(num_bytes: int, size: int) -> torch.dtype:
    kind = _FLOATS.get(num_bytes // size) if num_bytes % size == 0 else None
    if kind is None:
        raise ValueError(f"{num_bytes} bytes for {size} numbers; allowed: 1, 2, 4 or 8 for each")
    return kind
