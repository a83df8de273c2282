"""GDumb: store greedily, learn from nothing but what is stored."""

from __future__ import annotations

from collections import defaultdict
from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.local import LocalTask, Trained
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Samples
from edgelearn.scenario.spec import ClientSpec
from edgelearn.scenario.stream import Experience
from edgelearn.seeds import derive, permutation, split


@final
class GDumb(ClientStrategy):
    r"""Keep a balanced buffer, and train a network from scratch on it alone.

    A yardstick: whatever a method that learns from the stream achieves beyond it is due to more
    than its buffer. A sample is stored if its class has fewer than capacity / classes; a random
    one of the largest class gives way.

    In a federation, the network that is trained from scratch is the fleet's. In the first round of
    an experience each device takes its samples into the buffer (where each round brings a part of
    them, that part, and in later rounds the others), forgets the global parameters and
    begins again from those that the run began with (`FlatModel.initial`: the same on all devices,
    known from the scenario, so nothing has to be stored); the mean of what they send is then a
    network without a past, which the rounds that follow train on, on buffers alone. For a single
    device that is the method itself, with epochs times rounds as its training. That a device did
    this in `serve` instead would train a whole network for each evaluation, on its own samples
    alone, and make the federation useless.

    A device has to know whether the network that it got has begun again already: those that come
    only in a later round must not undo it. So one number travels beside the network, the count of
    experiences that it has begun. It needs a server strategy that averages (FedAvg and its like);
    one with moments moves network and count by other steps.

    Reference: Prabhu, Torr, Dokania, "GDumb: A Simple Approach that Questions Our Progress in
    Continual Learning", ECCV 2020. We differ: samples of an experience arrive in random order at
    its first round, and training is that of the scenario, without cutmix or a schedule.

    Args:
        memory_kib: Size of the buffer on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples.
    """

    def __init__(self, *, memory_kib: float = 0.0, capacity: int = 0) -> None:
        if memory_kib < 0 or capacity < 0 or (memory_kib > 0 and capacity > 0):
            raise ValueError("give memory_kib or capacity, not both, and not below 0")
        self.memory_kib = memory_kib
        self.capacity = capacity

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the buffer, how many experiences have begun, and what was taken in last."""
        capacity = self.capacity or 200
        if self.memory_kib > 0:
            capacity = max(1, int(self.memory_kib * 1024) // facts.sample_bytes)
        return {
            "buffer": SampleSpec(capacity),
            "begun": TensorSpec((1,), torch.int64),
            "taken": TensorSpec((1,), torch.int64),  # fingerprint; 0 is nothing of the experience
        }

    def shares(self, model: FlatModel, facts: Facts) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Declare the count of experiences for which the network has begun again."""
        return {"begun": TensorSpec((1,))}

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,  # noqa: ARG002
    ) -> Memory:
        """Count the experience."""
        return memory.replace(begun=memory["begun"] + 1, taken=torch.zeros(1, dtype=torch.int64))

    def fit(self, task: LocalTask) -> Trained:
        """Take in what is new, begin again if nobody has, and train on the buffer."""
        generator = torch.Generator().manual_seed(derive(task.seed, "gdumb"))
        memory, layout = task.memory, task.model.layout
        if int(memory["taken"]) != task.samples.fingerprint:  # another part of an experience, too
            memory = _take_in(memory, task.samples, generator)
        begun = float(memory["begun"])
        # The count is a mean of whole numbers: equal to one but for rounding.
        has_begun = float(layout.shared(task.params)["begun"]) > begun - 0.5
        params = task.params.clone() if has_begun else task.model.initial()
        layout.shared(params)["begun"].fill_(begun)
        ids = memory["buffer"]
        return _train(task, params, memory, Samples(memory.store, ids[ids != EMPTY]))

    def finish(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Take in an experience that the device did not train on."""
        return memory if bool(memory["taken"]) else _take_in(memory, data, generator)


def greedy_balanced(
    ids: Tensor,
    labels: Tensor,
    arriving: Tensor,
    arriving_labels: Tensor,
    generator: Generator,
) -> Tensor:
    """Store a sample if its class has less than its part; the largest class gives way.

    Args:
        ids: Buffer [capacity], int32, -1 where empty.
        labels: Labels of the buffer [capacity], int64; ignored where empty.
        arriving: Ids of new samples [n], int32.
        arriving_labels: Their labels [n], int64.
        generator: Source of randomness.

    Returns:
        The new buffer [capacity].
    """
    out = ids.tolist()
    held: dict[int, list[int]] = defaultdict(list)  # places by class
    for place, label in enumerate(labels.tolist()):
        if out[place] != EMPTY:
            held[label].append(place)
    free = [place for place, sample in enumerate(out) if sample == EMPTY][::-1]
    draws = torch.rand(len(arriving), generator=generator, dtype=torch.float64).tolist()
    for sample, label, draw in zip(arriving.tolist(), arriving_labels.tolist(), draws, strict=True):
        count = len(held[label])
        if count and count * len(held) >= len(out):
            continue
        if free:
            place = free.pop()
        else:
            largest = max(held.values(), key=len)
            place = largest.pop(int(draw * len(largest)))
        held[label].append(place)
        out[place] = sample
    return torch.tensor(out, dtype=torch.int32)


def _take_in(memory: Memory, data: Samples, generator: Generator) -> Memory:
    """Return the memory with samples in its buffer."""
    ids = memory["buffer"]
    order = torch.randperm(len(data), generator=generator)
    arriving, arriving_labels = data.ids[order], data.labels[order]
    labels = memory.store.labels(ids.clamp(min=0)) if (ids != EMPTY).any() else ids.long()
    buffer = greedy_balanced(ids, labels, arriving, arriving_labels, generator)
    return memory.replace(buffer=buffer, taken=torch.tensor([data.fingerprint]))


def _train(task: LocalTask, params: Tensor, memory: Memory, samples: Samples) -> Trained:
    """Train from `params` [P], which is changed, on some samples."""
    model, spec = task.model, task.spec
    num_trained = model.layout.num_trained
    carried = params.clone()
    model.carry(carried)  # apart from `params`, since a forward pass writes into it
    begin, current = params[:num_trained].clone(), params[:num_trained].clone().requires_grad_()
    optimizer = _optimizer(spec, current)
    total, count, passed = 0.0, 0, 0
    for epoch in range(spec.epochs):
        order = torch.from_numpy(permutation(split(task.seed, epoch), len(samples)))
        for places in torch.split(order, spec.batch_size):
            batch = samples.batch(places)
            loss = supervised_loss(model(current, batch.x), batch)
            (gradients,) = torch.autograd.grad(loss, current)
            current.grad = gradients + task.proximal_mu * (current.detach() - begin)
            optimizer.step()
            total += float(loss.detach())
            count, passed = count + 1, passed + len(batch)
    trained = torch.cat([current.detach(), carried[num_trained:]])
    return Trained(trained, memory, total / count, count, passed)


def _optimizer(spec: ClientSpec, params: Tensor) -> torch.optim.Optimizer:
    if spec.optimizer == "sgd":
        return torch.optim.SGD(
            [params], lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
    return kind([params], lr=spec.lr, weight_decay=spec.weight_decay)
