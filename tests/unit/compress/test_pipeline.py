"""Stages one after the other: what each leaves behind for the next."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgelearn.compress.distill import soft_distillation
from edgelearn.compress.fake_quantized import on_grid
from edgelearn.compress.pipeline import State, run_stages
from edgelearn.compress.prune import largest, prunable, sparsity_of
from edgelearn.compress.quantize import quantize_weight
from edgelearn.compress.stored import read
from edgelearn.compress.tune import logits_of
from edgelearn.errors import RunError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.models import mlp
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.stages import parse
from edgelearn.testing.toy import NUM_CLASSES, SHAPE, toy_model, toy_samples

TRAIN = "train(10, lr=0.02)"


def data() -> Samples:
    store = toy_samples()
    return Samples(store, torch.arange(len(store.y), dtype=torch.int32))


def factory(name: str, args: Mapping[str, Any]) -> nn.Module:
    assert name in ("", "mlp")
    torch.manual_seed(0)
    return mlp(input_shape=SHAPE, num_classes=NUM_CLASSES, **args)


def run(pipeline: str, **options: Any) -> list[State]:
    """Return the network after each stage."""
    module = toy_model().module
    options = {"seed": 0, "factory": factory, **options}
    return [state for _, state in run_stages(module, parse(pipeline), data(), **options)]


def flat(module: nn.Module) -> Tensor:
    return FlatModel(module).initial()


def test_stages_begin_where_the_last_one_ended_and_change_nothing_behind_them() -> None:
    module = toy_model().module
    before = flat(module)
    stages = parse(f"{TRAIN} | train(0) | prune(0.5, epochs=0)")
    states = [state for _, state in run_stages(module, stages, data(), seed=0)]
    assert torch.equal(flat(module), before)
    assert torch.equal(flat(states[1].module), flat(states[0].module))
    trained = flat(states[0].module)
    stays = states[2].stays
    assert stays is not None
    assert torch.equal(flat(states[2].module), torch.where(stays, trained, torch.zeros(())))
    assert states[2].teacher is states[1].module


def test_the_same_seed_gives_the_same_bits_and_stages_draw_their_own() -> None:
    line = f"{TRAIN} | prune(0.5) | quantize(8, epochs=1) | pack"
    one, same, other = run(line)[-1], run(line)[-1], run(line, seed=1)[-1]
    assert one.packed == same.packed != other.packed
    sgd = "train(1, optimizer='sgd', lr=0.1, batch_size=7)"
    twice = run(f"{sgd} | {sgd}")
    again = next(s for _, s in run_stages(twice[0].module, parse(sgd), data(), seed=0))
    assert not torch.equal(flat(twice[1].module), flat(again.module))  # another order of samples


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_are_zero_through_all_that_follows(scope: str) -> None:
    stages = f"{TRAIN} | prune(0.6, scope='{scope}', num_prunings=3, epochs=1)"
    states = run(f"{stages} | train(2) | distill(epochs=2) | quantize(4, epochs=2) | pack")
    layout = toy_model().layout
    stays = states[1].stays
    assert stays is not None
    assert int((~stays).sum()) == round(0.6 * int(prunable(layout).sum()))
    for state in states[1:]:
        assert state.stays is stays
        assert bool((flat(state.module)[~stays] == 0).all())
    assert not torch.equal(flat(states[2].module), flat(states[1].module))  # the rest was trained


def test_several_prunings_take_more_each_time() -> None:
    trained = run(TRAIN)[0].module
    once = next(run_stages(trained, parse("prune(0.8, epochs=0)"), data(), seed=0))[1]
    line = parse("prune(0.8, epochs=0, num_prunings=4)")
    slowly = next(run_stages(trained, line, data(), seed=0))[1]
    assert once.stays is not None
    assert slowly.stays is not None
    layout = toy_model().layout
    assert torch.equal(once.stays, largest(flat(trained), layout, 0.8))
    assert torch.equal(slowly.stays, once.stays)  # without training between, the same in the end
    again = parse("prune(0.3, epochs=0) | prune(0.8, epochs=0)")
    twice = [s for _, s in run_stages(trained, again, data(), seed=0)]
    assert torch.equal(twice[1].stays, once.stays)
    assert sparsity_of(flat(twice[0].module), layout) == pytest.approx(0.3, abs=0.01)


def test_a_pupil_is_taught_by_what_train_gave() -> None:
    states = run(f"{TRAIN} | distill(args={{hidden=[6]}}, alpha=1.0, epochs=60, lr=0.02)")
    teacher, pupil = states
    assert flat(pupil.module).numel() == 16 * 6 + 6 + 6 * 4 + 4
    assert pupil.teacher is teacher.module
    assert pupil.facts == {"args": '{"hidden": [6]}'}
    agree = logits_of(pupil.module, data()).argmax(1) == logits_of(teacher.module, data()).argmax(1)
    assert float(agree.float().mean()) > 0.9
    named = run("distill('mlp', args={hidden=[3]}, epochs=0)", facts={"model": "cnn", "x": "y"})
    assert named[0].facts == {"model": "mlp", "args": '{"hidden": [3]}', "x": "y"}
    with pytest.raises(RunError, match="needs a factory"):
        run("distill(args={hidden=[3]})", factory=None)


def test_a_pupil_without_a_name_is_of_the_present_network_s_kind() -> None:
    asked: list[str] = []

    def noting(name: str, args: Mapping[str, Any]) -> nn.Module:
        asked.append(name)
        return factory("", args)

    line = "distill('cnn', epochs=0) | distill(args={hidden=[3]}, epochs=0)"
    states = run(line, factory=noting, facts={"model": "mlp"})
    assert asked == ["cnn", "cnn"]
    assert states[1].facts == {"model": "cnn", "args": '{"hidden": [3]}'}


def test_the_teacher_of_a_pruned_network_is_the_one_before() -> None:
    states = run(f"{TRAIN} | prune(0.7, epochs=0) | distill(alpha=1.0, epochs=30, lr=0.02)")

    def distance(state: State) -> float:
        taught = logits_of(states[0].module, data())
        each = soft_distillation(logits_of(state.module, data()), taught, temperature=4.0)
        return float(each.mean())

    assert distance(states[2]) < 0.5 * distance(states[1])


@pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="needs edgelearn[prune]"
)
def test_channels_go_and_the_rest_is_trained() -> None:
    states = run(f"{TRAIN} | prune_channels(0.5, epochs=10, lr=0.02) | distill(epochs=2)")
    assert states[1].module[1].out_features == 4
    assert states[1].module[3].out_features == NUM_CLASSES
    right = logits_of(states[1].module, data()).argmax(1) == data().labels
    assert float(right.float().mean()) > 0.9
    assert states[2].module[1].out_features == 4  # the pupil is the present network


def test_four_bits_are_on_their_grid_and_eight_are_the_runtime_s() -> None:
    trained, eight = run(f"{TRAIN} | quantize")
    assert eight.bits == 8
    assert torch.equal(flat(eight.module), flat(trained.module))
    four = run(f"{TRAIN} | quantize(4)")[1]
    model = FlatModel(trained.module)
    assert torch.equal(flat(four.module), on_grid(model, model.initial(), bits=4))
    aware = run(f"{TRAIN} | quantize(4, epochs=1)")[1]
    assert not torch.equal(flat(aware.module), flat(four.module))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_packed_answers_as_what_was_quantized(bits: int) -> None:
    _, _, quantized, packed = run(f"{TRAIN} | prune(0.5) | quantize({bits}) | pack")
    assert packed.packed is not None
    x = data().batch().x

    def codes(module: nn.Module) -> Tensor:
        layers = (module[1].weight, module[3].weight)
        return torch.cat([quantize_weight(w.detach())[0].flatten() for w in layers])

    def answers(module: nn.Module) -> Tensor:
        model = FlatModel(module)
        return Int8Runtime().prepare(model, model.initial()).calibrated(x)(x)

    assert torch.equal(codes(packed.module), codes(quantized.module))
    # The ranges of activations are those of rounded weights now, so the last digits may differ.
    one, other = answers(packed.module), answers(quantized.module)
    assert float((one - other).abs().max()) < 0.01 * float(other.abs().max())
    found = read(packed.packed, source="x").tensors
    views = FlatModel(packed.module).layout.views(flat(packed.module))
    for name, value in views.items():
        assert torch.equal(found[name], value), name
