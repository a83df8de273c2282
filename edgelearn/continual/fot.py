"""FOT: what a fleet learns changes nothing of what its layers made of earlier experiences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from edgelearn.continual.layers import Layer, layers_of
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.continual.subspace import principal_subspace, project_out, sketches
from edgelearn.params import FlatModel
from edgelearn.scenario.stream import Experience

_AGE, _ROUNDS, _TOTAL = range(3)  # of the shared counts


@final
class FOT(ClientStrategy):
    r"""Federated orthogonal training: project updates out of the subspace of earlier inputs.

    A layer's outputs for an input a stay as they are if the change of its matrix maps a to nothing.
    So with an orthonormal basis U of the principal subspace of all inputs that the layer had in
    earlier experiences, anywhere in the fleet, a device sends

        Delta - Delta U U^T

    in place of its update Delta. The bias counts as the weight of a constant input, so that its
    change is bound too. A device stores 8 bytes: what is past travels beside the network.

    U comes from sketches Y = C Omega of each layer's second moment C (`subspace`), two of each
    layer [D, min(D, rank)]: `past`, the sum over completed experiences, and `present`. In every
    round a device adds its samples' sketch, taken with the global parameters that it got, at rate
    max(1 / (rounds + 1), 1 / 2); FedAvg averages. Who first trains on a new experience adds
    `present` to `past`. All devices of a cohort do so from the same values and so propose the same
    change, whose mean is that change. That takes a server that averages (FedAvg, FedProx): one that
    rescales changes, as FedAdam does, or picks among them, would scramble the counts.

    Sent beside the network, each way and in each round: 8 bytes x sum over layers of
    D min(D, rank), and 12; D counts the inputs of one output unit, and the bias.

    **Privacy.** The sketch of the first layer is one of the samples' own second moment: that of a
    device with a single sample shows it. A device with fewer than `min_samples` adds nothing; the
    paper has the server see only the sum over devices, by secure aggregation.

    Reference: Bakman, Yaldiz, Ezzeldin, Avestimehr, "Federated Orthogonal Training: Mitigating
    Global Catastrophic Forgetting in Continual Federated Learning", ICLR 2024, arXiv:2309.01289. We
    differ: the device projects its update, not the server the mean, which for a mean is the same;
    sketches of C with a common Omega are averaged where the paper sums A G with random G of each
    device's own, and all experiences together have to reach `energy`, not each one (as in Wang et
    al., "Training Networks in Null Space of Feature Covariance for Continual Learning", CVPR 2021,
    arXiv:2103.07113); the moments are of the rounds of an experience, the last one round older than
    the final parameters; each experience counts alike.

    What other layers than linear ones and convolutions train, such as scales of norms, stays free.
    The projected layers include the last: new classes then can't be learned along features of old
    ones, which is what keeps the old logits. So `energy` trades old for new.

    Args:
        energy: Part of the trace of the earlier moments that is held on to, in [0, 1].
        rank: Columns of a sketch, at least 1: the most directions that a layer can hold on to.
        min_samples: Fewest samples with which a device adds its sketch, at least 1.
    """

    def __init__(self, *, energy: float = 0.95, rank: int = 64, min_samples: int = 16) -> None:
        if not 0 <= energy <= 1:
            raise ValueError(f"energy is {energy}; allowed: 0 to 1")
        if rank < 1:
            raise ValueError(f"rank is {rank}; at least 1 is allowed")
        if min_samples < 1:
            raise ValueError(f"min_samples is {min_samples}; at least 1 is allowed")
        self.energy = energy
        self.rank = rank
        self.min_samples = min_samples

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare where the device is in its stream."""
        return {"position": TensorSpec((1,), torch.int64)}

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:  # noqa: ARG002
        """Declare the sketches, and the counts that say what they are of.

        Raises:
            ValueError: If the network has no layer to project.
        """
        layers = layers_of(model)
        if not layers:
            raise ValueError("fot needs a network with linear layers or convolutions")
        shapes = [(layer.width, min(layer.width, self.rank)) for layer in layers]
        return {
            # experience of `present`, rounds in it, experiences in `past`
            "counts": TensorSpec((3,)),
            **{f"past{i}": TensorSpec(shape) for i, shape in enumerate(shapes)},
            **{f"present{i}": TensorSpec(shape) for i, shape in enumerate(shapes)},
        }

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,  # noqa: ARG002
        memory: Memory,
        experience: Experience,
    ) -> Memory:
        """Note the position."""
        return memory.replace(position=torch.tensor([experience.position]))

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Project the update, and add the device's sketches."""
        model, layout = passage.model, passage.model.layout
        layers = layers_of(model)
        local = passage.local.clone()
        past, present, counts = self._at(int(memory["position"]), layout.shared(passage.given))
        if counts[_TOTAL] > 0.5:
            trained = slice(0, layout.num_trained)
            change = passage.local[trained] - passage.given[trained]
            projected = self._project(layers, change, past, float(counts[_TOTAL]))
            local[trained] = passage.given[trained] + projected
        is_late = counts[_AGE] > int(memory["position"]) + 0.5  # the fleet has gone on without it
        if len(passage.samples) >= self.min_samples and not is_late:
            rate = max(1.0 / (float(counts[_ROUNDS]) + 1.0), 0.5)
            given = passage.given[: layout.num_trained]
            new = sketches(model, given, passage.samples, layers, self.rank)
            present = [y.lerp(z, rate) for y, z in zip(present, new, strict=True)]
            counts[_ROUNDS] += 1
        beside = layout.shared(local)
        beside["counts"].copy_(counts)
        for i, (old, own) in enumerate(zip(past, present, strict=True)):
            beside[f"past{i}"].copy_(old)
            beside[f"present{i}"].copy_(own)
        return local, memory

    def _at(
        self, position: int, beside: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return past, present and counts, as they are once an experience has begun."""
        count = sum(name.startswith("past") for name in beside)
        past = [beside[f"past{i}"] for i in range(count)]
        present = [beside[f"present{i}"] for i in range(count)]
        counts = beside["counts"].clone()
        if position > counts[_AGE] + 0.5:
            if counts[_ROUNDS] > 0.5:
                past = [old + new for old, new in zip(past, present, strict=True)]
                counts[_TOTAL] += 1
            present = [torch.zeros_like(new) for new in present]
            counts[_AGE], counts[_ROUNDS] = position, 0
        return past, present, counts

    def _project(
        self, layers: tuple[Layer, ...], change: Tensor, past: list[Tensor], total: float
    ) -> Tensor:
        """Return a change [T] without what the earlier inputs would see of it."""
        out = change.clone()
        for layer, sketch in zip(layers, past, strict=True):
            basis = principal_subspace(sketch, trace=total, energy=self.energy)
            layer.write(out, project_out(layer.read(change), basis))
        return out
