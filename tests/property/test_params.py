"""Laws of flat parameter vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelearn.errors import StateError
from edgelearn.params import Layout

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=6).map(
    tuple
)


@st.composite
def layouts(draw):
    shapes = draw(SHAPES)
    names = tuple(f"layer{i}.weight" for i in range(len(shapes)))
    return Layout(names, shapes, draw(st.integers(0, len(shapes))))


@given(layout=layouts(), seed=st.integers(0, 2**32))
def test_flatten_inverts_views(layout, seed):
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layout.flatten(layout.views(flat)), flat)
    arrays = {name: view.numpy().copy() for name, view in layout.views(flat).items()}
    shuffled = dict(reversed(arrays.items()))  # names decide, not their order
    assert torch.equal(layout.flatten(shuffled), flat)


@given(layout=layouts())
def test_views_cover_the_vector_once(layout):
    flat = torch.zeros(layout.size)
    for view in layout.views(flat).values():
        view += 1
    assert flat.tolist() == [1] * layout.size
    assert layout.size == sum(math.prod(shape) for shape in layout.shapes)


@given(layout=layouts())
def test_the_trained_part_is_a_prefix(layout):
    whole = layout.views(torch.arange(float(layout.size)))
    if layout.num_trained == layout.size:
        return
    part = layout.views(torch.arange(float(layout.num_trained)))
    assert list(part) == list(layout.names[: layout.num_trained_tensors])
    assert all(torch.equal(part[name], whole[name]) for name in part)


@given(layout=layouts(), data=st.data())
def test_a_missing_tensor_is_named(layout, data):
    tensors = layout.views(torch.zeros(layout.size))
    gone = data.draw(st.sampled_from(layout.names))
    del tensors[gone]
    with pytest.raises(StateError, match=gone):
        layout.flatten(tensors)


@given(layout=layouts(), seed=st.integers(0, 2**32))
def test_flattening_is_linear(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, layout.size, generator=generator)
    mixed = {
        name: x + 2 * y
        for (name, x), y in zip(layout.views(a).items(), layout.views(b).values(), strict=True)
    }
    assert torch.equal(layout.flatten(mixed), a + 2 * b)
