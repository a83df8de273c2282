"""Central training: what stays zero, who teaches, what rounds, and the same bits again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.compress.fake_quantized import FakeQuantized
from edgelearn.compress.prune import largest, prunable
from edgelearn.compress.tune import Teaching, Training, loaded, logits_of, samples_of, tune
from edgelearn.errors import DivergenceError, RunError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Samples
from edgelearn.testing.toy import toy_model, toy_samples


def data() -> Samples:
    store = toy_samples()
    return Samples(store, torch.arange(len(store.y), dtype=torch.int32))


def flat(module: nn.Module) -> Tensor:
    return FlatModel(module).initial()


def right(module: nn.Module, labels: Tensor | None = None) -> float:
    labels = data().labels if labels is None else labels
    return float((logits_of(module, data()).argmax(1) == labels).float().mean())


def test_it_learns_and_leaves_the_given_network_alone() -> None:
    module = toy_model().module
    before = flat(module)
    tuned = tune(module, data(), Training(epochs=20, lr=0.02), seed=0)
    assert right(module) < 0.6
    assert right(tuned) == 1.0
    assert not tuned.training
    assert torch.equal(flat(module), before)
    again = tune(module, data(), Training(epochs=20, lr=0.02), seed=0)
    assert torch.equal(flat(again), flat(tuned))
    other = tune(module, data(), Training(epochs=20, lr=0.02), seed=1)
    assert not torch.equal(flat(other), flat(tuned))


@pytest.mark.parametrize(
    "how",
    [
        Training(epochs=5, lr=0.05),
        Training(epochs=5, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
def test_what_the_mask_takes_is_zero_ever_after(how: Training) -> None:
    model = toy_model()
    layout = model.layout
    stays = largest(model.initial()[: layout.num_trained], layout, 0.7)
    tuned = flat(tune(model.module, data(), how, seed=0, stays=stays))
    assert bool((tuned[~stays] == 0).all())
    assert bool((tuned[stays] != 0).all())
    assert int((~stays).sum()) == round(0.7 * int(prunable(layout).sum()))
    with pytest.raises(ValueError, match=r"the mask is \(3,\); expected"):
        tune(model.module, data(), how, seed=0, stays=torch.ones(3, dtype=torch.bool))


def test_one_step_is_the_gradient_of_the_declared_loss() -> None:
    torch.manual_seed(0)
    model, teacher = toy_model(), nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    batch, params = data().batch(), model.initial()
    how = Training(steps=1, batch_size=len(data()), optimizer="sgd", lr=0.5)
    told = F.cross_entropy(model(params.requires_grad_(), batch.x), batch.y)
    with torch.no_grad():
        taught = teacher(batch.x)
    T = 3.0
    soft = F.kl_div(
        F.log_softmax(model(params, batch.x) / T, 1),
        F.log_softmax(taught / T, 1),
        reduction="batchmean",
        log_target=True,
    )
    loss = 0.25 * told + 0.75 * T**2 * soft
    (expected,) = torch.autograd.grad(loss, params)
    teaching = Teaching(teacher=teacher, alpha=0.75, temperature=T)
    found = flat(tune(model.module, data(), how, seed=0, teaching=teaching))
    torch.testing.assert_close(found, (params - 0.5 * expected).detach())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_alone_passes_on_what_it_answers(kind: str) -> None:
    turned = samples_of(data().batch().x, (data().labels + 1) % 4)  # labels that only it knows
    teacher = tune(toy_model().module, turned, Training(epochs=30, lr=0.02), seed=0)
    before = copy.deepcopy(teacher.train())
    teaching = Teaching(teacher=teacher, alpha=1.0, kind=kind)
    pupil = tune(
        toy_model().module, data(), Training(epochs=30, lr=0.02), seed=1, teaching=teaching
    )
    assert right(pupil, turned.labels) == 1.0
    assert torch.equal(flat(teacher), flat(before))
    assert teacher.training


@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_with_bits_a_step_is_that_of_the_rounded_network(rounds_inputs: bool) -> None:
    model, batch = toy_model(), data().batch()
    params = model.initial().requires_grad_()
    seen = FakeQuantized(model, 4, rounds_inputs=rounds_inputs)
    (expected,) = torch.autograd.grad(F.cross_entropy(seen(params, batch.x), batch.y), params)
    how = Training(steps=1, batch_size=len(data()), optimizer="sgd", lr=0.5)
    found = tune(model.module, data(), how, seed=0, bits=4, rounds_inputs=rounds_inputs)
    torch.testing.assert_close(flat(found), (params - 0.5 * expected).detach())
    plain = tune(model.module, data(), how, seed=0)
    assert not torch.allclose(flat(plain), flat(found))


def test_norms_keep_their_statistics_and_dropout_its_seed() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), norm, nn.Dropout(), nn.Linear(8, 4))
    state = torch.random.get_rng_state()
    how = Training(epochs=2, batch_size=59)  # one sample is left of 60, and is no batch
    tuned = tune(module, data(), how, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert int(tuned[2].num_batches_tracked) == 2
    assert bool((tuned[2].running_mean != 0).any())
    assert bool((norm.running_mean == 0).all())
    assert torch.equal(flat(tune(module, data(), how, seed=0)), flat(tuned))
    # no value of the result lies in memory of another
    assert all(b.untyped_storage().nbytes() == 8 * 4 for b in (tuned[2].running_mean,))


def test_the_cosine_falls_to_zero() -> None:
    module = toy_model().module
    steps: dict[str, Tensor] = {}
    for schedule in ("constant", "cosine"):
        how = Training(steps=10, batch_size=60, optimizer="sgd", lr=0.01, schedule=schedule)
        steps[schedule] = flat(tune(module, data(), how, seed=0)) - flat(module)
    # Along an almost straight way: 10 steps of (1 + cos(pi t / 10)) / 2 are 5.5 whole ones.
    share = float(steps["cosine"].norm() / steps["constant"].norm())
    assert share == pytest.approx(0.55, abs=0.02)


def test_a_loss_that_is_not_finite_has_a_name() -> None:
    how = Training(steps=50, optimizer="sgd", lr=1e30)
    with pytest.raises(DivergenceError, match=r"step \d+ of 50: the loss is (nan|inf)"):
        tune(toy_model().module, data(), how, seed=0)
    last = Training(steps=1, optimizer="sgd", lr=3e38, weight_decay=1e30)
    with pytest.raises(DivergenceError, match="step 1 of 1: weights are not finite"):
        tune(toy_model().module, data(), last, seed=0)
    nobody = Samples(toy_samples(), torch.empty(0, dtype=torch.int32))
    with pytest.raises(ValueError, match="no samples"):
        tune(toy_model().module, nobody, Training(), seed=0)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Training, {"epochs": -1}, "epochs is -1; allowed: at least 0"),
        (Training, {"batch_size": 0}, "batch_size is 0"),
        (Training, {"optimizer": "lbfgs"}, "optimizer is 'lbfgs'; allowed: adam, sgd"),
        (Training, {"lr": 0.0}, "lr is 0.0; allowed: above 0"),
        (Training, {"momentum": 1.0}, "momentum is 1.0"),
        (Training, {"schedule": "step"}, "schedule is 'step'; allowed: constant, cosine"),
        (Teaching, {"alpha": 1.5}, "alpha is 1.5; allowed: 0 to 1"),
        (Teaching, {"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
        (Teaching, {"kind": "warm"}, "kind is 'warm'; allowed: soft, hard"),
    ],
)
def test_arguments_are_checked(kind: Any, arguments: dict[str, Any], message: str) -> None:
    if kind is Teaching:
        arguments = {"teacher": nn.Identity(), **arguments}
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_a_batch_that_is_too_small_for_a_norm_is_named() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))
    with pytest.raises(RunError, match=r"step 1 of 60, a batch of 1: Expected more than 1 value"):
        tune(module, data(), Training(batch_size=1), seed=0)


def test_loaded_changes_a_copy() -> None:
    layer = nn.Linear(2, 1)
    made = loaded(layer, {"weight": torch.ones(1, 2)})
    assert made.weight.tolist() == [[1.0, 1.0]]
    assert torch.equal(made.bias, layer.bias)
    assert layer.weight.tolist() != [[1.0, 1.0]]
