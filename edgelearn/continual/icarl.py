"""iCaRL: herded exemplars, binary cross-entropy with distillation, and nearest class means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgelearn.continual.buffers import herding
from edgelearn.continual.features import features, last_linear
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, Rehearsal
from edgelearn.errors import StrategyError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Batch, Samples
from edgelearn.scenario.stream import Experience

_ROWS = 256  # samples in one forward pass
_NEEDS_A_BIAS = "icarl needs a bias in the last linear layer, to leave out what it has not seen"
_NEVER = -1e6  # bias of a class without a mean; mu . phi is at least -|phi|


@final
class ICaRL(ClientStrategy):
    r"""Learn features with exemplars of the past, and answer with the nearest class mean.

    **Training.** Every class has an output of its own, g_c(x) = sigmoid(h_c(x)), and a step lowers

        sum_c BCE(g_c(x), t_c)  over the classes seen so far, mean over samples,

    where t_c is g_c of the old network for classes of earlier experiences, and 1 or 0 for those of
    the present one (equation in algorithm 3). The old network is the global one at the end of the
    last experience, in eval mode; a class that is present again counts as present. Exemplars join
    every batch.

    **Exemplars.** When an experience ends, each of the m classes that the device has had samples of
    keeps capacity / m exemplars: those of old classes are the first of their order, those of its
    classes are herded (algorithms 4 and 5, `herding`) from its samples and the exemplars of the
    same class.

    **Answer.** A device answers with the class whose mean mu_c is nearest to the features phi(x),
    where phi is normalized, mu_c is the mean of the normalized features of the class's exemplars,
    normalized again, and phi(x) is what the last linear layer is given (algorithm 1). Both have
    norm 1, so

        argmin_c |phi/|phi| - mu_c|^2 = argmin_c 2 - 2 mu_c . phi/|phi| = argmax_c mu_c . phi,

    the last step because |phi| is the same for all classes. That is a linear layer with the weights
    mu_c and no bias: `serve` puts the means in its place, and the int8 model of the device answers
    by nearest means without knowing. A class that the device has no sample of is never answered:
    its bias lies below all that the others can reach. Classes of the present experience that are
    not among the exemplars yet have the mean of the device's present samples; a device that has no
    sample at all answers with the network as it is.

    Reference: Rebuffi, Kolesnikov, Sperl, Lampert, "iCaRL: Incremental Classifier and
    Representation Learning", CVPR 2017, arXiv:1611.07725. We differ: exemplars are replayed in
    equal numbers to what arrives, where they are mixed into the experience there; means are taken
    without mirrored images; each device has its own exemplars and means.

    Args:
        memory_kib: Size of the exemplars on a device, in KiB of stored samples.
        capacity: The same in samples; give one of the two, or none for 200 samples. At least one
            for each class of the scenario.
        replay_batch: Exemplars replayed per step; 0 replays as many as arrive.
    """

    replaces_loss = True

    def __init__(
        self, *, memory_kib: float = 0.0, capacity: int = 0, replay_batch: int = 0
    ) -> None:
        if memory_kib < 0 or capacity < 0 or (memory_kib > 0 and capacity > 0):
            raise ValueError("give memory_kib or capacity, not both, and not below 0")
        if replay_batch < 0:
            raise ValueError(f"replay_batch is {replay_batch}; at least 0 is allowed")
        self.memory_kib = memory_kib
        self.capacity = capacity
        self.replay_batch = replay_batch

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare exemplars, the old network, and the classes before and of the experience.

        Raises:
            StrategyError: If there is not room for an exemplar of each class, or the network does
                not end in a linear layer with a bias.
        """
        capacity = self.capacity or 200
        if self.memory_kib > 0:
            capacity = int(self.memory_kib * 1024) // facts.sample_bytes
        if capacity < facts.num_classes:
            raise StrategyError(
                f"icarl has room for {capacity} exemplars; at least one for each of the "
                f"{facts.num_classes} classes is needed: raise capacity or memory_kib"
            )
        if last_linear(model).bias is None:
            raise StrategyError(_NEEDS_A_BIAS)
        return {
            "buffer": SampleSpec(capacity),
            "old": TensorSpec((model.layout.num_trained,)),
            "known": TensorSpec((facts.num_classes,), torch.bool),
            "present": TensorSpec((facts.num_classes,), torch.bool),
        }

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,
    ) -> Memory:
        """Take note of the classes that begin."""
        present = torch.zeros_like(memory["present"])
        present[list(experience.classes)] = True
        return memory.replace(known=memory["known"] | memory["present"], present=present)

    def rehearsal(self) -> Rehearsal:
        """Declare that exemplars join every batch."""
        return Rehearsal("buffer", self.replay_batch)

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        """Return the binary cross-entropy, summed over classes."""
        logits = model(params, batch.x)
        known, present = memory["known"], memory["present"]
        answers = torch.sigmoid(_old_logits(model, memory["old"], batch.x))
        labels = (batch.y[:, None] == torch.arange(logits.shape[1])).to(logits.dtype)
        targets = torch.where(known & ~present, answers, labels)
        counted = (known | present).expand_as(logits)
        if batch.mask is not None:
            counted = counted & batch.mask
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        per_sample = (each * counted).sum(1)
        if batch.weight is None:
            return per_sample.mean()
        return (per_sample * batch.weight).sum()

    @torch.no_grad()
    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,  # noqa: ARG002
    ) -> Memory:
        """Choose exemplars anew, and keep the network as the old one."""
        memory = memory.replace(old=params.clone())
        if len(data) == 0:
            return memory
        store, ids = memory.store, memory["buffer"]
        kept = ids[ids != EMPTY]
        kept_labels, arriving_labels = store.labels(kept), data.labels
        classes = sorted({*kept_labels.tolist(), *arriving_labels.tolist()})
        chosen = []
        for index, label in enumerate(classes):
            # Of capacity - k * m places left over, the first classes get one each.
            quota = (len(ids) - index + len(classes) - 1) // len(classes)
            own = kept[kept_labels == label]
            new = data.ids[arriving_labels == label]
            if len(new):
                own = torch.cat([own, new[~torch.isin(new, own)]])
                unit = F.normalize(_features(model, params, Samples(store, own)).double(), dim=1)
                own = own[herding(unit, quota)]
            chosen.append(own[:quota])
        exemplars = torch.cat(chosen)
        buffer = torch.full_like(ids, EMPTY)
        buffer[: len(exemplars)] = exemplars
        return memory.replace(buffer=buffer)

    @torch.no_grad()
    def serve(
        self,
        model: FlatModel,
        params: Tensor,
        memory: Memory,
        data: Samples,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        """Return the parameters with class means in place of the last layer's weights."""
        ids = memory["buffer"]
        exemplars = Samples(memory.store, ids[ids != EMPTY])
        means = dict(_means(model, params, data)) | dict(_means(model, params, exemplars))
        if not means:
            return params
        head, own = last_linear(model), params.clone()
        weights, biases = head.weights(own), head.biases(own)
        if biases is None:
            raise StrategyError(_NEEDS_A_BIAS)
        weights.zero_()
        biases.fill_(_NEVER)
        for label, mean in means.items():
            weights[label] = mean
            biases[label] = 0.0
        return own


def _old_logits(model: FlatModel, old: Tensor, x: Tensor) -> Tensor:
    """Return what the old network answers; in eval mode, so that it leaves no trace in the new."""
    module = model.module
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return model(old, x)
    finally:
        module.train(was_training)


def _features(model: FlatModel, params: Tensor, samples: Samples) -> Tensor:
    """Return the features of samples [n, D]."""
    parts = torch.split(torch.arange(len(samples)), _ROWS)
    return torch.cat([features(model, params, samples.batch(places).x) for places in parts])


def _means(model: FlatModel, params: Tensor, samples: Samples) -> Iterator[tuple[int, Tensor]]:
    """Yield each label that occurs with the mean of its normalized features, of norm 1 [D]."""
    if len(samples) == 0:
        return
    unit, labels = F.normalize(_features(model, params, samples), dim=1), samples.labels
    for label in sorted(set(labels.tolist())):
        yield label, F.normalize(unit[labels == label].mean(0), dim=0)
