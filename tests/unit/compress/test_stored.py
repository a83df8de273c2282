"""Networks as files: what comes back, how large they are, and damage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgelearn.compress.fake_quantized import quantized_weights
from edgelearn.compress.stored import read, store
from edgelearn.errors import StateError
from edgelearn.params import FlatModel

WAYS = [(None, False), (8, False), (4, False), (8, True), (4, True)]


def network(seed: int, *, channels: int = 3, hidden: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3),
        nn.BatchNorm2d(channels),
        nn.Flatten(),
        nn.Linear(4 * channels, hidden),
        nn.Linear(hidden, 3, bias=False),
    ).eval()


@given(
    seed=st.integers(0, 100),
    channels=st.integers(1, 5),
    hidden=st.integers(1, 7),
    way=st.sampled_from(WAYS),
    sparsity=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_what_comes_back_is_within_half_a_step(
    seed: int, channels: int, hidden: int, way: tuple[int | None, bool], sparsity: float
) -> None:
    module = network(seed, channels=channels, hidden=hidden)
    bits, is_packed = way
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[torch.rand(parameter.shape) < sparsity] = 0
    model = FlatModel(module)
    found = read(store(module, bits=bits, is_packed=is_packed), source="x").tensors
    assert set(found) == set(model.layout.names)
    for name, value in model.layout.views(model.initial()).items():
        if bits is None or name not in quantized_weights(model):
            assert torch.equal(found[name], value), name
            continue
        largest = value.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)  # a step of a channel
        error = (found[name] - value).flatten(1).abs().amax(1)
        assert bool((error <= largest / 2 * (1 + 1e-5)).all()), name
        assert bool((found[name][value == 0] == 0).all()), name


def test_a_file_says_what_it_is_and_is_the_same_again() -> None:
    data = store(network(0), bits=8, facts={"model": "cnn"})
    assert data == store(network(0), bits=8, facts={"model": "cnn"})
    facts = read(data, source="x").facts
    assert (facts["model"], facts["bits"], facts["weights"]) == ("cnn", "8", "dense")


def test_fewer_bits_and_zeros_are_fewer_bytes() -> None:
    module = nn.Linear(100, 100)
    dense = [len(store(module, bits=bits)) for bits in (None, 8, 4)]
    assert dense[0] > 40_400
    assert 10_800 < dense[1] < 11_600  # a byte each, scales and biases, a header
    assert 5_800 < dense[2] < 6_600
    with torch.no_grad():
        module.weight[:, ::2] = 0
    assert len(store(module, bits=8)) == dense[1]  # zeros alone save nothing
    assert len(store(module, bits=8, is_packed=True)) < dense[1] - 4_000


@pytest.mark.parametrize(("bits", "is_packed"), WAYS)
def test_damage_is_noticed(bits: int | None, is_packed: bool) -> None:
    data = store(network(0), bits=bits, is_packed=is_packed)
    for broken in (b"", data[:7], data[:100], data[: len(data) - 3]):
        with pytest.raises(StateError, match=r"file\.safetensors: "):
            read(broken, source="file.safetensors")


@pytest.mark.parametrize("facts", [{}, {"a": "0" * 64, "sha256": "mine", "z": '"sha256": "'}])
def test_one_bit_anywhere_is_noticed(facts: dict[str, str]) -> None:
    data = store(nn.Linear(3, 2), bits=4, facts=facts)
    assert len(read(data, source="x").facts["sha256"]) == 64
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(StateError, match=r"file\.safetensors: "):
            read(bytes(broken), source="file.safetensors")


def test_values_that_changed_are_told_by_the_checksum() -> None:
    data = bytearray(store(nn.Linear(50, 50, bias=False)))
    data[-1] ^= 1
    with pytest.raises(
        StateError, match=r"x: damaged: its \d+ bytes have the SHA-256 [0-9a-f]{12}\.\.\."
    ):
        read(bytes(data), source="x")


def test_files_of_others_are_refused() -> None:
    from safetensors.torch import save

    with pytest.raises(StateError, match=r"format: none, expected edgelearn-network-2"):
        read(save({"a": torch.zeros(1)}), source="x")
    earlier = {"edgelearn": '{"format": "edgelearn-network-1"}'}
    with pytest.raises(StateError, match=r"x: another version of edgelearn wrote it"):
        read(save({"a": torch.zeros(1)}, metadata=earlier), source="x")
    with pytest.raises(ValueError, match="bits is 5"):
        store(network(0), bits=5)
    with pytest.raises(ValueError, match="bits is None"):
        store(network(0), is_packed=True)
