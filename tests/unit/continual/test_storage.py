from __future__ import annotations

import pytest
import torch

from edgelearn.continual.memory import Memory, check, kept
from edgelearn.continual.storage import BLOCK, Storage, check_kind

NAMES = {"fisher": True, "anchor": False}


def vectors(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fisher = torch.randn(size, generator=generator).pow(6)  # a few large ones, most are small
    fisher[: size // 3] = 0
    return {"fisher": fisher, "anchor": torch.randn(size, generator=generator)}


def stored(kind, size, given):
    storage = Storage(kind, size, NAMES)
    memory = storage.put(Memory.initial(storage.declaration()), given)
    check(memory, storage.declaration())
    return storage, memory


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
def test_errors_are_within_their_bounds(size):
    given = vectors(size)
    padding = (0, -size % BLOCK)
    for kind in ("float32", "float16", "int8"):
        storage, memory = stored(kind, size, given)
        for name, x in given.items():
            blocks = torch.nn.functional.pad(x, padding).view(-1, BLOCK)
            m = blocks.abs().amax(1).repeat_interleave(BLOCK)[:size].double()
            found = storage.get(memory, name).double()
            x = x.double()
            if kind == "float32":
                bound = torch.zeros_like(x)
            elif kind == "float16":
                bound = 2**-11 * x.abs() + 2**-25 * m
            elif name == "anchor":
                bound = m / 254
            else:
                e = m.sqrt() / 510
                bound = e * (2 * x.sqrt() + e)
            assert ((found - x).abs() <= bound + 1e-6 * x.abs()).all(), (kind, name)
            if kind != "float32":
                assert size == 1 or not torch.equal(found, x)
    assert (storage.get(memory, "fisher") >= 0).all()


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_size_of_numbers_does_not_matter(kind, factor):
    given = {name: factor * x for name, x in vectors(BLOCK).items()}
    storage, memory = stored(kind, BLOCK, given)
    for name, x in given.items():
        found = storage.get(memory, name)
        assert (found.double() - x.double()).norm() < 0.01 * x.double().norm()


def test_zeros_and_what_was_never_written_are_zeros():
    for kind in ("float32", "float16", "int8"):
        storage = Storage(kind, 5, NAMES)
        memory = Memory.initial(storage.declaration())
        assert not storage.get(memory, "fisher").any()
        memory = storage.put(memory, {name: torch.zeros(5) for name in NAMES})
        assert torch.equal(storage.get(memory, "anchor"), torch.zeros(5))


def test_bytes():
    size = 10 * BLOCK

    def total(kind):
        declaration = Storage(kind, size, NAMES).declaration()
        return sum(spec.stored_bytes for spec in kept(declaration).values())

    assert total("float32") == 8 * size
    assert total("float16") == 4 * size + 80
    assert total("int8") == 2 * size + 80


def test_unpacked_is_for_the_while_of_a_round():
    given = vectors(40)
    for kind in ("float32", "float16", "int8"):
        storage, memory = stored(kind, 40, given)
        unpacked = storage.unpacked(memory)
        assert set(kept(storage.declaration())) == set(memory) - (
            set(NAMES) if storage.is_cheap else set()
        )
        for name in NAMES:
            assert torch.equal(unpacked[name], storage.get(memory, name))
            assert unpacked[name].any()
            assert bool(memory[name].any()) is not storage.is_cheap


def test_other_kinds():
    with pytest.raises(ValueError, match="storage is 'int4'; allowed: float32, float16, int8"):
        check_kind("int4")
