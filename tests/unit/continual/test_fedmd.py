"""FedMD: what is sent, what is learned from it, and what stays on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgelearn.continual.fedmd import FedMD
from edgelearn.continual.naive import Naive
from edgelearn.continual.strategy import ClientStrategy, Facts, make_strategy
from edgelearn.device.learner import Learner
from edgelearn.device.state import OWN, DeviceState, Fit
from edgelearn.errors import ScenarioError
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import (
    NUM_CLASSES,
    NUM_PUBLIC,
    ToyDevice,
    toy_devices,
    toy_learner,
    toy_model,
)

LOGITS = "shared/logits"


def begun(learner: Learner, device: ToyDevice) -> DeviceState:
    return learner.initial_state(device.store, device.public)


def fitted(
    strategy: ClientStrategy, consensus: Tensor | None = None, **spec: Any
) -> tuple[Learner, ToyDevice, Fit]:
    """Return what the first toy device makes of its first round."""
    learner, device = toy_learner(strategy, **spec), toy_devices()[0]
    params = learner.initial() if consensus is None else consensus.flatten()
    fit = learner.fit(begun(learner, device), params, device, position=0, server_round=1)
    return learner, device, fit


def answers(learner: Learner, fit: Fit, device: ToyDevice) -> Tensor:
    """Return the logits of a device's own network on the public samples [n, C]."""
    assert device.public is not None
    x = device.store.batch(device.public).x
    with torch.no_grad():
        return learner.model(learner.whole(fit.state, learner.initial()), x)


def test_logits_are_all_that_travels() -> None:
    learner, device, fit = fitted(FedMD())
    assert learner.layout.names == (LOGITS,)
    assert learner.layout.shapes == ((NUM_PUBLIC, NUM_CLASSES),)
    assert learner.initial().tolist() == [0.0] * NUM_PUBLIC * NUM_CLASSES
    assert set(fit.update.arrays) == {LOGITS}
    # The first consensus is zeros, so that the update is the answers, bit by bit.
    assert torch.equal(fit.update.arrays[LOGITS], answers(learner, fit, device))


def test_the_network_moves_on_the_device_alone() -> None:
    learner, device, fit = fitted(FedMD())
    start = toy_model().initial()
    before = begun(learner, device)
    assert torch.equal(before.memory[OWN], start)
    assert not torch.equal(fit.state.memory[OWN], start)
    plain, _, naive = fitted(Naive())  # without a consensus it is plain training
    trained = start + plain.layout.flatten(naive.update.arrays)
    torch.testing.assert_close(fit.state.memory[OWN], trained, rtol=0, atol=1e-6)


def test_the_mean_of_what_devices_send_is_the_weighted_mean_of_their_answers() -> None:
    learner, devices = toy_learner(FedMD()), toy_devices()
    consensus = torch.randn(NUM_PUBLIC, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    fits = [
        learner.fit(begun(learner, d), consensus.flatten(), d, position=0, server_round=1)
        for d in devices
    ]
    weights = torch.tensor([0.5, 0.3, 0.2])
    updates = torch.stack([fit.update.arrays[LOGITS] for fit in fits])
    own = torch.stack([answers(learner, f, d) for f, d in zip(fits, devices, strict=True)])
    assert not torch.allclose(own[0], own[1])
    found = consensus + torch.einsum("k,knc->nc", weights, updates)
    torch.testing.assert_close(found, torch.einsum("k,knc->nc", weights, own))


def by_hand(params: Tensor, consensus: Tensor, strategy: FedMD) -> Tensor:
    """Return parameters after digestion, with torch's own modules and losses."""
    device, module = toy_devices()[0], toy_model().module
    assert device.public is not None
    x = device.store.batch(device.public).x
    torch.nn.utils.vector_to_parameters(params, module.parameters())
    optimizer = torch.optim.Adam(module.parameters(), lr=strategy.digest_lr)
    for _ in range(strategy.digest_epochs):
        for start in range(0, len(x), strategy.digest_batch):
            rows = slice(start, start + strategy.digest_batch)
            logits, wanted, T = module(x[rows]), consensus[rows], strategy.temperature
            if strategy.distance == "l1":
                loss = (logits - wanted).abs().sum() / logits.numel()
            else:
                p = torch.softmax(wanted / T, 1)
                q = torch.softmax(logits / T, 1)
                loss = T**2 * (p * (p / q).log()).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("loss", ["l1", "kl"])
def test_digestion_is_adam_on_the_distance_to_the_consensus(loss: str) -> None:
    strategy = FedMD(digest_epochs=3, digest_lr=0.01, digest_batch=3, loss=loss, temperature=3.0)
    learner, device = toy_learner(strategy), toy_devices()[0]
    consensus = torch.randn(NUM_PUBLIC, NUM_CLASSES, generator=torch.Generator().manual_seed(2))
    state = begun(learner, device)
    params = learner.whole(state, consensus.flatten())
    entered, memory = strategy.enter(learner.model, params, state.memory)
    size = learner.model.layout.num_network
    expected = by_hand(toy_model().initial(), consensus, strategy)
    torch.testing.assert_close(entered[:size], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(entered[size:], consensus.flatten())
    assert strategy.num_beside(memory) == 3 * NUM_PUBLIC + NUM_PUBLIC // 3


def test_digestion_brings_answers_closer_to_the_consensus() -> None:
    consensus = torch.full((NUM_PUBLIC, NUM_CLASSES), 2.0)
    gaps = []
    for epochs in (0, 20):
        strategy = FedMD(digest_epochs=epochs, digest_lr=0.01)
        learner, device, fit = fitted(strategy, consensus, epochs=1, lr=0.001)
        gaps.append(float((answers(learner, fit, device) - consensus).abs().mean()))
    assert gaps[1] < 0.5 * gaps[0]


def test_public_labels_are_learned_once_and_first() -> None:
    strategy = FedMD(transfer_epochs=30, digest_lr=0.02)
    learner, device = toy_learner(strategy), toy_devices()[0]
    state = begun(learner, device)
    params = learner.whole(state, learner.initial())
    entered, memory = strategy.enter(learner.model, params, state.memory)
    assert device.public is not None
    batch = device.store.batch(device.public)
    with torch.no_grad():
        right = [float((learner.model(p, batch.x).argmax(1) == batch.y).float().mean())
                 for p in (params, entered)]  # fmt: skip
    assert right[0] < 0.6
    assert right[1] == 1.0
    again, memory = strategy.enter(learner.model, params, memory)
    assert torch.equal(again, params), "there is no consensus yet, and labels are learned once"
    assert int(memory["passed"]) == 0


def test_a_device_without_samples_learns_from_the_others() -> None:
    learner, device = toy_learner(FedMD(digest_epochs=5)), toy_devices()[0]
    nothing = ToyDevice(0, device.store, tuple(ids[:0] for ids in device.ids), device.public)
    consensus = torch.ones(NUM_PUBLIC * NUM_CLASSES)
    fit = learner.fit(begun(learner, nothing), consensus, nothing, position=0, server_round=1)
    assert fit.update.metrics["num-examples"] == 0
    assert not torch.equal(fit.state.memory[OWN], toy_model().initial())
    assert fit.num_samples == 5 * NUM_PUBLIC + NUM_PUBLIC // 3


def test_a_device_answers_with_its_own_network() -> None:
    learner, device, fit = fitted(FedMD())
    served = learner.served(fit.state, learner.initial(), device.samples(0), position=0, device=0)
    assert torch.equal(served[: learner.model.layout.num_network], fit.state.memory[OWN])
    assert learner.serves_own


def test_what_a_device_stores_is_declared() -> None:
    learner = toy_learner(FedMD())
    size = learner.model.layout.num_network
    public = NUM_PUBLIC * (4 + 17)  # an id, pixels and a label
    assert learner.memory_bytes == 4 * size + public + 1 + 8
    device = toy_devices()[0]
    state = begun(learner, device)
    assert device.public is not None
    assert torch.equal(state.memory["public"], device.public)
    assert set(device.public.tolist()) <= set(
        learner.held_ids(state, device.samples(1)).tolist()
    ), "a real device keeps them"


def test_other_methods_hold_on_to_the_devices_own_network() -> None:
    """EWC's anchor is the network that the device has, not one that travels."""
    strategy = make_strategy("fedmd+ewc", {"ewc": {"strength": 1.0}})
    learner, device = toy_learner(strategy), toy_devices()[0]
    fit = learner.fit(begun(learner, device), learner.initial(), device, position=0, server_round=1)
    state = learner.consolidate(fit.state, learner.initial(), device, upto=1)
    anchor = state.memory["ewc.anchor"]
    assert torch.equal(anchor, fit.state.memory[OWN])


@pytest.mark.parametrize(
    "arguments", [{"digest_epochs": 0}, {"loss": "kl", "transfer_epochs": 1, "digest_batch": 1}]
)
def test_it_keeps_the_contract_with_any_arguments(arguments: dict[str, Any]) -> None:
    findings = check_strategy(FedMD, **arguments)
    assert [f for f in findings if f.passed is not True] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digest_epochs": -1}, "digest_epochs is -1; at least 0"),
        ({"digest_batch": 0}, "digest_batch is 0; at least 1"),
        ({"transfer_epochs": -1}, "transfer_epochs is -1; at least 0"),
        ({"digest_lr": 0.0}, "digest_lr is 0.0; above 0"),
        ({"digest_lr": float("nan")}, "digest_lr is nan; above 0"),
        ({"temperature": 0.0}, "temperature is 0.0; above 0"),
        ({"loss": "mse"}, "loss is 'mse'; allowed: l1, kl"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedMD(**arguments)


def test_without_public_samples_it_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"public.*there are none"):
        FedMD().declare(toy_model(), Facts(1, NUM_CLASSES, 17))


class Silent(ClientStrategy):
    """Keeps the network, and shares nothing."""

    keeps_network = True


def test_a_strategy_that_keeps_all_to_itself_is_refused() -> None:
    with pytest.raises(ScenarioError, match="there is nothing to send"):
        toy_learner(Silent())
