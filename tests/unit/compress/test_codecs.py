"""Codecs of updates: the numbers, their bytes, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgelearn.compress.blocks import Blocks, dequantize, quantize
from edgelearn.compress.codec import Codec, decoded, encoded, make_codec
from edgelearn.compress.half import Float16
from edgelearn.compress.quantized import Int4, Int8
from edgelearn.compress.sparse import RandomK, TopK, kept_of
from edgelearn.errors import ScenarioError, StateError
from edgelearn.params import Layout

LAYOUT = Layout(("w", "b"), ((10, 30), (7,)), 2)
P = LAYOUT.size


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int = 0) -> torch.Tensor:
    return torch.randn(P, generator=seeded(seed))


def size_of(codec: Codec, layout: Layout = LAYOUT) -> int:
    return sum(math.prod(p.shape) * p.dtype.itemsize for p in codec.pieces(layout).values())


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (Float16(), 2 * P),
        (Int8(), P + 4 * (2 + 1)),  # 300 = 256 + 44
        (Int8(block=100), P + 4 * (3 + 1)),
        (Int4(), 154 + 4 * 3),  # 307 codes
        (TopK(0.1), 4 * 31 + 39),  # a bit for each of 307 is less than 31 places
        (TopK(0.01), 4 * 4 + 4 * 4),
        (TopK(0.1, values="int8"), 39 + 31 + 4 * 2),
        (RandomK(0.1), 8 + 4 * 31),
        (RandomK(0.1, values="int8"), 8 + 31 + 4 * 2),
        (RandomK(0.1, values="int8", block=10), 8 + 31 + 4 * (3 + 1)),
        (RandomK(0.1, values="int4"), 8 + 16 + 4 * 2),  # 31 codes
        (TopK(0.1, values="int4", block=30), 39 + 16 + 4 * 2),
    ],
)
def test_bytes_are_as_stated(codec: Codec, size: int) -> None:
    assert size_of(codec) == size
    message = codec.encode(LAYOUT, normal(), seeded())
    assert sum(value.numel() * value.element_size() for value in message.values()) == size


def test_blocks_do_not_reach_across_tensors() -> None:
    blocks = Blocks.of([5, 0, 3], 2)
    assert blocks.starts.tolist() == [0, 2, 4, 5, 7]
    assert blocks.lengths.tolist() == [2, 2, 1, 2, 1]
    values = torch.tensor([1.0, -3, 0, 0, 5, 6, -7, 8])
    assert blocks.scales(values).tolist() == [3, 0, 5, 7, 8]


def test_codes_by_hand() -> None:
    values = torch.tensor([1.0, -0.5, 0.0, 0.25])
    codes, scales = quantize(values, Blocks.of([4], 4), levels=2, generator=seeded(3))
    noise = torch.rand(4, generator=seeded(3), dtype=torch.float64)
    expected = [2, -1, 0, int(0.5 + float(noise[3]))]
    assert codes.tolist() == expected
    assert scales.tolist() == [1.0]
    back = dequantize(codes, scales, Blocks.of([4], 4), levels=2)
    assert back.tolist() == [1.0, -0.5, 0.0, expected[3] / 2]


@pytest.mark.parametrize("codec", [Int8(block=16), Int4(block=16)])
def test_the_largest_of_a_block_is_exact_and_the_mean_is_too(codec: Codec) -> None:
    update = normal()
    draws = torch.stack(
        [codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded(s))) for s in range(3000)]
    )
    blocks = Blocks.of(LAYOUT.sizes, 16)
    largest = update.abs().double() == blocks.spread(blocks.scales(update))
    assert int(largest.sum()) == len(blocks)
    assert torch.equal(draws[0][largest], update[largest])
    # The error of one draw is below a step, so its deviation is at most half of one.
    standard_error = codec.error(LAYOUT, update) / 2 / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - update).abs() <= 6 * standard_error).all())
    assert float((draws.std(0) > 0).float().mean()) > 0.8  # it is random, not rounded


def test_no_one_code_is_out_of_range_however_large_the_numbers() -> None:
    update = torch.full((P,), 3.4e38)
    for codec in (Int8(), Int4()):
        assert torch.equal(codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded())), update)


def test_half_precision_rounds_to_nearest_and_overflows_openly() -> None:
    update = torch.zeros(P)
    update[:4] = torch.tensor([1 / 3, 2.0**-25 * 1.5, 70_000.0, -65_504.0])
    found = Float16().decode(LAYOUT, Float16().encode(LAYOUT, update, seeded()))
    assert found[:4].tolist() == [float(np.float16(1 / 3)), 2.0**-24, math.inf, -65_504.0]


def test_top_k_sends_the_largest_of_each_tensor() -> None:
    update = torch.zeros(P)
    update[[3, 200]] = torch.tensor([5.0, -9.0])
    update[300:] = torch.tensor([0.1, -0.3, 0.2, 0, 0, 0, 0])
    codec = TopK(0.01)  # 3 of w, 1 of b
    found = codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded()))
    expected = torch.zeros(P)
    expected[[3, 200, 301]] = torch.tensor([5.0, -9.0, -0.3])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 1.0])
def test_top_k_keeps_more_than_its_share_of_the_energy(share: float) -> None:
    update = normal(1)
    codec = TopK(share)
    found = codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded()))
    for place, count in zip(LAYOUT.places.values(), kept_of(LAYOUT, share), strict=True):
        whole, left = update[place], (update - found)[place]
        assert int((found[place] != 0).sum()) == count
        assert float(left.square().sum()) <= (1 - count / len(whole)) * float(whole.square().sum())


def test_rescaled_top_k_by_hand() -> None:
    layout = Layout(("w", "b"), ((5,), (2,)), 2)
    update = torch.tensor([1.0, -4.0, 2.0, 2.0, 0.0, 0.0, 0.0])
    codec = TopK(0.2, feedback=False, rescale=True)  # 1 of each
    found = codec.decode(layout, codec.encode(layout, update, seeded()))
    assert found.tolist() == [0, -5, 0, 0, 0, 0, 0]  # ||w|| = 5
    assert codec.error(layout, update) == pytest.approx([1, 4, 2, 2, 0, 0, 0])
    update[1] = -1.5  # what is sent, 2, is a number of the same norm as 2, 2, 1.5, 1
    factor = math.sqrt(4 + 4 + 2.25 + 1) / 2
    found = codec.decode(layout, codec.encode(layout, update, seeded()))
    assert found == pytest.approx([0, 0, 2 * factor, 0, 0, 0, 0])
    assert not codec.keeps_residual
    assert not codec.is_unbiased


def test_rescaling_gives_each_tensor_its_norm_and_no_more() -> None:
    update = 1e-25 * normal(3)  # squares of it are no float32
    update[300:] *= 1e6
    plain, codec = TopK(0.05, feedback=False), TopK(0.05, feedback=False, rescale=True)
    found = codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded()))
    other = plain.decode(LAYOUT, plain.encode(LAYOUT, update, seeded()))
    for place, count in zip(LAYOUT.places.values(), kept_of(LAYOUT, 0.05), strict=True):
        whole, sent, unscaled = (v[place].double() for v in (update, found, other))
        assert float(sent.norm()) == pytest.approx(float(whole.norm()))
        factor = float(sent.norm() / unscaled.norm())
        assert 1 < factor <= math.sqrt(len(whole) / count)
        torch.testing.assert_close(sent, factor * unscaled, rtol=1e-6, atol=0)


def test_what_int4_stands_for_is_a_seventh_of_the_largest_in_its_block() -> None:
    update = torch.zeros(P)
    update[:6] = torch.tensor([7.0, 3.0, -2.0, 0.7, 0.1, -0.3])
    codec = TopK(0.02, values="int4", block=3)  # two blocks of w, one of b
    found = codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded()))
    assert found[:4].tolist() == pytest.approx([7, 3, -2, 0.7])
    # 0.1 and 0.3 are one and three sevenths of 0.7.
    assert found[4:6].tolist() == pytest.approx([0.1, -0.3])
    assert not found[6:].any()


@pytest.mark.parametrize("codec", [RandomK(0.1), TopK(0.1), RandomK(0.1, values="int8")])
def test_statistics_are_sent_whole_and_as_they_are(codec: Codec) -> None:
    layout = Layout(
        ("w", "gamma", "frozen", "running_var", "batches", "shared/control"),
        ((20, 5), (20,), (10, 2), (20,), (), (20,)),
        2,
        1,
    )
    assert kept_of(layout, 0.1) == (10, 2, 2, 20, 1, 2)
    update = torch.randn(layout.size, generator=seeded())
    found = decoded(codec, layout, codec.encode(layout, update, seeded()))
    place = layout.places["running_var"]
    step = float(update[place].abs().max()) / 127
    assert float((found[place] - update[place]).abs().max()) <= step
    assert int((found != 0).sum()) <= 37
    sent = found[layout.places["w"]] != 0
    if isinstance(codec, RandomK):  # and what is drawn is scaled as ever
        ratio = found[layout.places["w"]][sent] / update[layout.places["w"]][sent]
        assert float(ratio.median()) == pytest.approx(10, rel=0.1)


def test_random_k_draws_other_places_each_time_and_the_same_on_both_sides() -> None:
    update, codec = normal(), RandomK(0.1, feedback=True)
    found = [codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded(s))) for s in range(2)]
    for one in found:
        sent = one != 0
        assert int(sent[:300].sum()) == 30
        assert int(sent[300:].sum()) == 1
        assert torch.equal(one[sent], update[sent])
    assert not torch.equal(found[0], found[1])


def test_random_k_without_feedback_scales_what_it_sends() -> None:
    update, codec = normal(), RandomK(0.1)
    found = codec.decode(LAYOUT, codec.encode(LAYOUT, update, seeded()))
    sent = found != 0
    factor = torch.cat([torch.full((300,), 10.0), torch.full((7,), 7.0)])
    torch.testing.assert_close(found[sent], (factor * update)[sent])
    assert codec.is_unbiased
    assert not codec.keeps_residual


@pytest.mark.parametrize(
    ("codec", "broken", "reason"),
    [
        (Int8(), {"codes": torch.full((P,), -128, dtype=torch.int8)}, "can't decode"),
        (Int8(), {"codes": torch.zeros(P)}, "is not"),
        (Int4(), {"codes": torch.zeros(154, dtype=torch.uint8)}, "can't decode"),  # -8 is no code
        (TopK(0.01), {"places": torch.tensor([0, 1, 2, P], dtype=torch.int32)}, "can't decode"),
        (TopK(0.01), {"places": torch.tensor([-1, 1, 2, 3], dtype=torch.int32)}, "can't decode"),
        (TopK(0.01), {"places": torch.tensor([0, 1, 1, 3], dtype=torch.int32)}, "can't decode"),
        (TopK(0.1), {"places": torch.full((39,), 255, dtype=torch.uint8)}, "can't decode"),
        (RandomK(), {"word": torch.tensor([-1])}, "can't decode"),
        (RandomK(values="int4"), {"codes": torch.zeros(16, dtype=torch.uint8)}, "can't decode"),
        (TopK(values="int4"), {"codes": torch.zeros(31, dtype=torch.int8)}, "is not"),
        (Float16(), {"more": torch.zeros(1)}, "does not declare"),
    ],
)
def test_a_message_that_no_device_can_have_made_is_refused(
    codec: Codec, broken: dict[str, torch.Tensor], reason: str
) -> None:
    message = {**codec.encode(LAYOUT, normal(), seeded()), **broken}
    with pytest.raises(StateError, match=reason):
        decoded(codec, LAYOUT, message)


def test_a_message_that_lacks_something_is_refused() -> None:
    with pytest.raises(StateError, match="has no 'scales'"):
        decoded(Int8(), LAYOUT, {"codes": torch.zeros(P, dtype=torch.int8)})


def test_seed_round_and_device_decide_the_draw_and_nothing_else() -> None:
    def message(seed: int = 0, server_round: int = 1, device: int = 2) -> torch.Tensor:
        torch.manual_seed(device)
        return encoded(
            Int8(), LAYOUT, normal(), seed=seed, server_round=server_round, device=device
        )["codes"]

    assert torch.equal(message(), message())
    others = (message(seed=1), message(server_round=2), message(device=3))
    assert not any(torch.equal(message(), other) for other in others)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("int8", {"block": 0}, "block is 0; a whole number from 1 is expected"),
        ("int4", {"block": 2.5}, "block is 2.5"),
        ("top-k", {"share": 0}, "share is 0; a number above 0 and at most 1"),
        ("top-k", {"share": 1.5}, "share is 1.5"),
        ("top-k", {"values": "int2"}, "values is 'int2'.*allowed: float32, int8, int4"),
        ("random-k", {"values": "flaot32"}, "did you mean 'float32'"),
        ("random-k", {"values": "int4", "block": 0}, "block is 0; a whole number from 1"),
        ("random-k", {"block": 64}, "block is 64, and values of float32 have no scales"),
        ("top-k", {"rescale": 1, "feedback": False}, "rescale is 1; true or false"),
        ("top-k", {"rescale": True}, "rescale and feedback are both true"),
        ("top-k", {"rescal": True}, "did you mean 'rescale'"),
        ("random-k", {"rescale": True}, "does not take it"),
        ("random-k", {"feedback": 1}, "feedback is 1; true or false"),
        ("float16", {"block": 1}, "does not take it"),
        ("none", {"block": 1}, "sent as they are"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        make_codec(name, arguments)


def test_none_is_no_codec() -> None:
    assert make_codec("none", {}) is None
