"""FedSSI: synaptic intelligence along the way of a model between the device and the fleet."""

from __future__ import annotations

from typing import final

import torch
from torch import Generator, Tensor

from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts, Pull, supervised_loss
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stream import Experience


@final
class FedSSI(ClientStrategy):
    r"""Hold on to parameters that earlier learning has used, without storing samples.

    Synaptic intelligence charges each parameter with the drop of the loss along its way in
    training. In a federation that way is a local one, which on skewed data says little of the
    fleet. FedSSI takes the way of a *personalized surrogate* v instead. It trains on the device's
    samples of the experience, from the global parameters w with which the experience began,

        v <- v - lr (grad l(v) + q (v - w)),  q = (1 - l) / (2 l),

    where l (`locality`) near 0 keeps it global and near 1 lets it go local. Its charges are

        s_i = -sum over steps of grad_i l(v) * (change of v_i),
        Omega_i <- Omega_i + max(0, s_i) / ((v_i - w_i)^2 + damping),

    and the next experience trains with the penalty strength * sum_i Omega_i (theta_i - anchor_i)^2
    around the global parameters at its beginning. The penalty is declared, so that compiled engines
    run it, and is taken as a proximal step, which can't diverge (see `Pull`).

    A device stores 8 bytes for each parameter and sends its update alone. The surrogate costs about
    `epochs` epochs of training, once in an experience, when it has ended: it depends on w and the
    samples, not on what the fleet learned meanwhile.

    Reference: Li, Wang, Wang, Qi, Xiao, Li, "FedSSI: Rehearsal-Free Continual Federated Learning
    with Synergistic Synaptic Intelligence", ICML 2025, arXiv:2412.13779; Zenke, Poole, Ganguli,
    "Continual Learning Through Synaptic Intelligence", ICML 2017, arXiv:1703.04200, equations 3
    to 5. We differ: v begins anew at w in each experience and need not be stored; its pull is taken
    implicitly; charges below 0 count as 0, since a negative stiffness has no minimum.

    Args:
        strength: Factor of the penalty, at least 0.
        locality: l, above 0 and at most 1.
        damping: Bounds Omega where a parameter hardly moved, above 0.
        epochs: Passes of the surrogate over the device's samples, at least 1.
        batch_size: Samples in a step of the surrogate, at least 1.
        lr: Step size of the surrogate, above 0.
    """

    def __init__(
        self,
        *,
        strength: float = 1.0,
        locality: float = 0.5,
        damping: float = 0.1,
        epochs: int = 1,
        batch_size: int = 16,
        lr: float = 0.05,
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; at least 0 is allowed")
        if not 0 < locality <= 1:
            raise ValueError(f"locality is {locality}; allowed: above 0, at most 1")
        if not damping > 0:
            raise ValueError(f"damping is {damping}; allowed: above 0")
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; at least 1 is allowed")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is allowed")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; allowed: above 0")
        self.strength = strength
        self.locality = locality
        self.damping = damping
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the importance of parameters, and the anchor."""
        size = model.layout.num_trained
        return {"importance": TensorSpec((size,)), "anchor": TensorSpec((size,))}

    def pull(self) -> Pull:
        """Declare the penalty, for every step of training."""
        return Pull("importance", "anchor", 2 * self.strength)

    def start(
        self,
        model: FlatModel,  # noqa: ARG002
        params: Tensor,
        memory: Memory,
        experience: Experience,
    ) -> Memory:
        """Anchor at the first parameters; later ones are those that `finish` was given."""
        return memory.replace(anchor=params.clone()) if experience.position == 0 else memory

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """Send the surrogate over the experience that has ended, and add what it found."""
        if len(data) == 0:
            return memory.replace(anchor=params.clone())
        begun = memory["anchor"]
        surrogate, charge = self.surrogate(model, begun, data, generator)
        found = charge.clamp(min=0) / ((surrogate - begun).square() + self.damping)
        return memory.replace(importance=memory["importance"] + found, anchor=params.clone())

    def surrogate(
        self, model: FlatModel, params: Tensor, data: Samples, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Train the surrogate; return it and the charges of its way, both [T].

        Args:
            model: The network.
            params: w [T].
            data: The device's samples, at least one.
            generator: Source of the order of samples.
        """
        pull = self.lr * (1 - self.locality) / (2 * self.locality)
        current, charge = params.clone(), torch.zeros_like(params)
        for _ in range(self.epochs):
            order = torch.randperm(len(data), generator=generator)
            for positions in torch.split(order, self.batch_size):
                batch = data.batch(positions)
                with torch.enable_grad():
                    leaf = current.detach().requires_grad_()
                    loss = supervised_loss(model(leaf, batch.x), batch)
                    (gradients,) = torch.autograd.grad(loss, leaf)
                after = (current - self.lr * gradients + pull * params) / (1 + pull)
                charge -= gradients * (after - current)
                current = after
        return current, charge
