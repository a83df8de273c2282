from __future__ import annotations

import pytest
import torch

from edgelearn.continual.memory import Memory
from edgelearn.reproduce.exemplars import ExemplarReplay
from edgelearn.reproduce.networks import shared_head
from edgelearn.scenario.samples import EMPTY, Batch
from edgelearn.testing.toy import toy_devices, toy_facts, toy_model


def memory_of(strategy, device):
    return Memory.initial(strategy.declare(toy_model(), toy_facts()), device.store)


def learned(strategy, device, positions):
    memory, params = memory_of(strategy, device), torch.zeros(0)
    for position in positions:
        memory = strategy.start(toy_model(), params, memory, device.experience(position))
        generator = torch.Generator().manual_seed(position)
        samples = device.samples(position)
        memory = strategy.finish(toy_model(), params, samples, memory, generator)
    return memory


def test_each_class_has_its_exemplars():
    (device, *_) = toy_devices(num_per_class=5)
    strategy = ExemplarReplay(per_class=3)
    first = learned(strategy, device, [0])
    both = learned(strategy, device, [0, 1])
    held = first["buffer"][first["buffer"] != EMPTY]
    assert torch.bincount(device.store.labels(held), minlength=4).tolist() == [3, 3, 0, 0]
    assert set(held.tolist()) <= set(device.samples(0).ids.tolist())
    assert torch.bincount(device.store.labels(both["buffer"]), minlength=4).tolist() == [3] * 4
    assert torch.equal(both["buffer"][:6], held), "what is stored stays"
    assert len(set(both["buffer"].tolist())) == 12


def test_a_class_with_fewer_samples_gives_all_of_them():
    (device, *_) = toy_devices(num_per_class=2)
    buffer = learned(ExemplarReplay(per_class=5), device, [0])["buffer"]
    assert sorted(buffer[buffer != EMPTY].tolist()) == sorted(device.samples(0).ids.tolist())


def test_a_class_that_comes_again_is_not_stored_twice():
    (device, *_) = toy_devices(num_per_class=5)
    buffer = learned(ExemplarReplay(per_class=3), device, [0, 0])["buffer"]
    assert int((buffer != EMPTY).sum()) == 6


def test_present_and_past_weigh_as_their_experiences():
    (device, *_) = toy_devices(num_per_class=5)
    strategy = ExemplarReplay(per_class=3)
    memory = learned(strategy, device, [0])
    generator = torch.Generator().manual_seed(0)
    present = device.samples(1).batch(slice(0, 4))
    for experience in (2, 3, 5):
        memory = memory.replace(experiences=torch.tensor(experience))
        batch = strategy.extend(present, memory, generator)
        assert batch.num_past == 4
        assert float(batch.weight[:4].sum()) == pytest.approx(1 / experience)
        assert float(batch.weight[4:].sum()) == pytest.approx(1 - 1 / experience)


def test_the_first_experience_replays_nothing():
    (device, *_) = toy_devices()
    strategy = ExemplarReplay()
    memory = strategy.start(
        toy_model(), torch.zeros(0), memory_of(strategy, device), device.experience(0)
    )
    present = device.samples(0).batch(slice(0, 4))
    found: Batch = strategy.extend(present, memory, torch.Generator().manual_seed(0))
    assert found.num_past == 0
    assert found.weight is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="per_class is 0"):
        ExemplarReplay(per_class=0)
    with pytest.raises(ValueError, match="5 classes can't share 2 outputs"):
        shared_head(input_shape=(4,), num_classes=5)


def test_tasks_share_the_outputs():
    network = shared_head(input_shape=(4,), num_classes=6, hidden=(5,), num_outputs=2)
    logits = network(torch.randn(3, 4))
    assert logits.shape == (3, 6)
    for label in range(6):
        assert torch.equal(logits[:, label], logits[:, label % 2])
    assert sum(p.numel() for p in network.parameters()) == 4 * 5 + 5 + 5 * 2 + 2
