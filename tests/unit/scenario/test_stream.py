from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from edgelearn.errors import ScenarioError
from edgelearn.scenario.samples import Domains
from edgelearn.scenario.spec import StreamSpec
from edgelearn.scenario.stream import Experience, Stream


def stream(kind="class-incremental", *, T=5, rounds=3, C=10, seed=0, **kwargs):
    spec = StreamSpec(kind=kind, num_experiences=T, rounds_per_experience=rounds, **kwargs)
    return Stream(spec, num_classes=C, seed=seed)


# -- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class-incremental", "task-incremental"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("T", "C"), [(5, 10), (3, 10), (10, 10), (1, 10), (1, 1), (7, 100)])
def test_experiences_share_out_the_classes(kind, shuffle, T, C):
    s = stream(kind, T=T, C=C, shuffle_classes=shuffle)
    groups = [s.classes(i) for i in range(T)]
    assert sorted(chain(*groups)) == list(range(C))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert all(list(g) == sorted(g) for g in groups)


def test_classes_in_order_and_shuffled():
    assert stream().classes(1) == (2, 3)
    shuffled = [stream(seed=seed, shuffle_classes=True) for seed in (0, 0, 1)]
    first, again, other = ([s.classes(i) for i in range(5)] for s in shuffled)
    assert first == again
    assert first != other
    assert first != [stream().classes(i) for i in range(5)]


def test_domains_have_all_classes():
    assert stream("domain-incremental").classes(3) == tuple(range(10))


def test_more_experiences_than_classes():
    with pytest.raises(ScenarioError, match="11 experiences but only 10 classes"):
        stream(T=11)
    assert stream("domain-incremental", T=11).num_experiences == 11


# -- order -----------------------------------------------------------------------------------------


def test_a_shared_order():
    assert {stream().order(d) for d in range(50)} == {(0, 1, 2, 3, 4)}


def test_orders_per_device_are_permutations_and_differ():
    s = stream(order="per-device")
    orders = [s.order(d) for d in range(200)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 80  # of 120
    firsts = Counter(order[0] for order in orders)
    assert min(firsts.values()) > 20  # about 40 each
    assert orders == [stream(order="per-device").order(d) for d in range(200)]
    assert orders != [stream(order="per-device", seed=1).order(d) for d in range(200)]


def test_an_experience_of_a_device():
    s = stream(order="per-device")
    order = s.order(7)
    assert s.experience(7, 2) == Experience(2, order[2], s.classes(order[2]))


@pytest.mark.parametrize("order", ["shared", "per-device"])
def test_the_experience_at_a_position(order):
    s = stream(order=order)
    assert tuple(s.experience_id(7, p) for p in range(5)) == s.order(7)
    with pytest.raises(IndexError):
        s.experience_id(7, 5)


def test_positions_and_rounds():
    s = stream(T=3, rounds=2)
    assert [s.position(r) for r in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    assert [s.ends_experience(r) for r in range(1, 7)] == [False, True] * 3
    one = stream(T=3, rounds=1)
    assert [one.position(r) for r in (1, 2, 3)] == [0, 1, 2]
    assert all(one.ends_experience(r) for r in (1, 2, 3))


# -- which experience a label belongs to -----------------------------------------------------------


def test_each_label_belongs_to_the_experience_that_lists_it():
    s = stream()
    table = s.experience_of_label()
    for experience_id in range(5):
        assert tuple(np.flatnonzero(table == experience_id)) == s.classes(experience_id)


# -- task masks ------------------------------------------------------------------------------------


def test_task_masks_allow_the_classes_of_the_task():
    s = stream("task-incremental", T=3, C=7)
    masks = s.task_masks()
    assert masks.dtype == torch.bool
    for i in range(3):
        for label in s.classes(i):
            assert tuple(masks[label].nonzero().flatten().tolist()) == s.classes(i)


def test_only_task_incremental_streams_have_masks():
    assert stream().task_masks() is None
    assert stream("domain-incremental").task_masks() is None


# -- domains ---------------------------------------------------------------------------------------


def apply(domains: Domains, x: torch.Tensor, domain: int) -> torch.Tensor:
    return domains.apply(x, torch.full((len(x),), domain))


def images(count=6, depth=2, height=5, width=7, high=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, high, (count, depth, height, width), generator=generator, dtype=torch.uint8
    )


def test_only_domain_incremental_streams_have_domains():
    assert stream().domains((1, 8, 8)) is None
    assert stream("task-incremental").domains((1, 8, 8)) is None


@pytest.mark.parametrize("transform", ["permute", "rotate"])
def test_domain_0_is_the_data_as_it_is(transform):
    x = images()
    domains = stream("domain-incremental", transform=transform).domains((2, 5, 7))
    assert torch.equal(apply(domains, x, 0), x)
    assert not torch.equal(apply(domains, x, 1), x)


def test_permutations_permute_all_samples_of_a_domain_alike():
    domains = stream("domain-incremental", T=4).domains((2, 5, 7))
    assert domains.index.shape == (4, 1, 70)
    x = torch.arange(70, dtype=torch.uint8).reshape(1, 2, 5, 7).repeat(3, 1, 1, 1)
    seen = [apply(domains, x, d) for d in range(4)]
    for out in seen:
        assert out.shape == x.shape
        assert out.dtype == torch.uint8
        assert out[0].flatten().sort().values.tolist() == list(range(70))
        assert torch.equal(out[0], out[1])
    assert len({tuple(out[0].flatten().tolist()) for out in seen}) == 4
    again = stream("domain-incremental", T=4).domains((2, 5, 7))
    assert torch.equal(again.index, domains.index)
    other = stream("domain-incremental", T=4, seed=1).domains((2, 5, 7))
    assert not torch.equal(other.index, domains.index)


def test_permutations_take_samples_that_are_not_images():
    domains = stream("domain-incremental", T=2).domains((12,))
    x = torch.arange(12, dtype=torch.uint8).reshape(1, 12)
    assert sorted(apply(domains, x, 1)[0].tolist()) == list(range(12))


def test_only_images_rotate():
    with pytest.raises(ScenarioError, match=r"rotation needs images \[C, H, W\], samples are \(12"):
        stream("domain-incremental", transform="rotate").domains((12,))


@pytest.mark.parametrize("side", [4, 5, 8])
def test_half_of_180_degrees_is_a_quarter_turn_clockwise(side):
    domains = stream("domain-incremental", T=2, transform="rotate").domains((2, side, side))
    x = images(height=side, width=side)
    assert torch.equal(apply(domains, x, 1), torch.rot90(x, -1, (2, 3)))


@pytest.mark.parametrize("T", [2, 3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (1, 28, 28)])
def test_weights_sum_to_one_inside(T, shape):
    domains = stream("domain-incremental", T=T, transform="rotate").domains(shape)
    total = domains.weight.sum(1).reshape(T, *shape)
    assert (domains.weight >= 0).all()
    assert total.max() <= 1 + 1e-6
    assert domains.index.min() >= 0
    assert domains.index.max() < np.prod(shape)
    # What is nearer to the centre than the nearest edge has its source inside, at any angle.
    _, height, width = shape
    rows, columns = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    inside = rows**2 + columns**2 <= ((min(height, width) - 1) / 2) ** 2
    inner = total[:, :, inside]
    torch.testing.assert_close(inner, torch.ones_like(inner))
    torch.testing.assert_close(total[0], torch.ones_like(total[0]))


def test_channels_do_not_mix():
    domains = stream("domain-incremental", T=3, transform="rotate").domains((2, 6, 6))
    x = images(height=6, width=6)
    x[:, 1] = 0
    assert not apply(domains, x, 1)[:, 1].any()
    alone = stream("domain-incremental", T=3, transform="rotate").domains((1, 6, 6))
    assert torch.equal(apply(domains, x, 1)[:, :1], apply(alone, x[:, :1], 1))


def test_a_flat_image_stays_flat_inside():
    domains = stream("domain-incremental", T=5, transform="rotate").domains((1, 9, 9))
    x = torch.full((1, 1, 9, 9), 200, dtype=torch.uint8)
    for d in range(5):
        assert (apply(domains, x, d)[0, 0, 2:7, 2:7] == 200).all()
    assert apply(domains, x, 1)[0, 0, 0, 0] == 0  # outside is black


def test_floating_point_samples_are_not_rounded():
    domains = stream("domain-incremental", T=3, transform="rotate").domains((1, 6, 6))
    x = torch.rand(4, 1, 6, 6)
    out = apply(domains, x, 1)
    assert out.dtype == torch.float32
    assert ((out > 0) & (out < 1)).any()


def test_samples_of_different_domains_in_one_call():
    domains = stream("domain-incremental", T=3, transform="rotate").domains((2, 5, 7))
    x = images(count=3)
    together = domains.apply(x, torch.tensor([2, 0, 1]))
    alone = [apply(domains, x[i : i + 1], d) for i, d in enumerate((2, 0, 1))]
    assert torch.equal(together, torch.cat(alone))
