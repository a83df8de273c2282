"""Training through the rounding of the model that is served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.compress.quantize import (
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
)
from edgelearn.continual.features import features_and_logits
from edgelearn.continual.memory import Memory
from edgelearn.continual.qat import QAT
from edgelearn.continual.strategy import ClientStrategy, make_strategy
from edgelearn.device.training import Training
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.samples import Batch
from edgelearn.testing.contract import check_strategy
from edgelearn.testing.toy import toy_devices, toy_learner


def conv_network() -> FlatModel:
    torch.manual_seed(1)
    return FlatModel(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
        .append(nn.Linear(8, 4))
        .eval()
    )


def inputs(count: int = 16) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(2))


def rounded_by_hand(weight: Tensor, bits: int) -> Tensor:
    out, most = torch.empty_like(weight), 2 ** (bits - 1) - 1
    for row, own in zip(out, weight, strict=True):
        scale = float(own.abs().max()) / most
        row.copy_(torch.tensor([round(float(w) / scale) * scale for w in own]))
    return out


def at_four_bits(model: FlatModel, params: Tensor) -> Tensor:
    nothing = toy_devices(1)[0].samples(0)
    return QAT(bits=4).serve(model, params, Memory({}), nothing, torch.Generator())


# -- the maths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_on_the_grid_of_their_channel(bits: int) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = fake_quantize_weight(weight, bits=bits)
    torch.testing.assert_close(rounded, rounded_by_hand(weight.detach(), bits))
    codes, scale = quantize_weight(weight.detach(), largest=2 ** (bits - 1) - 1)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    assert torch.equal(rounded, codes * scale[:, None])  # on the grid exactly
    factor = torch.arange(35.0).view(5, 7)
    (gradient,) = torch.autograd.grad((rounded * factor).sum(), weight)
    assert torch.equal(gradient, factor)


def test_four_bits_are_coarser_than_eight() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    four, eight = (float((fake_quantize_weight(weight, bits=b) - weight).norm()) for b in (4, 8))
    assert 10 < four / eight < 30  # steps are 127 / 7 = 18 times as wide


def test_activations_are_rounded_on_the_grid_of_their_range() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.3], [0.301, 1.55, 0.004]], requires_grad=True)
    step = 2.55 / 255
    rounded = fake_quantize_activation(x)
    expected = torch.tensor([[-1.0, 0.0, 0.3], [0.3, 1.55, 0.0]])
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-6)
    assert float((rounded - x).abs().max().detach()) <= step / 2 + 1e-6
    (gradient,) = torch.autograd.grad((rounded * torch.arange(6.0).view(2, 3)).sum(), x)
    assert gradient.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_zeros_stay_zeros() -> None:
    assert not fake_quantize_activation(torch.zeros(3, 2)).any()
    assert not fake_quantize_weight(torch.zeros(3, 2), bits=4).any()


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_no_int8_holds_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        fake_quantize_weight(torch.zeros(2, 2), bits=bits)


# -- what a step sees ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d])
def test_a_layer_sees_what_the_int8_runtime_computes(layer: Any) -> None:
    """On the inputs that it was calibrated on, but for the rounding of biases."""
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    model = FlatModel(nn.Conv2d(1, 3, 3, padding=1) if layer is nn.Conv2d else linear)
    params, x = model.initial(), inputs()
    seen = QAT().view(model)(params, x)
    served = Int8Runtime().prepare(model, params).calibrated(x)(x)
    assert float((served - model(params, x)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(seen, served, rtol=1e-4, atol=1e-4)


def test_a_step_is_as_far_from_float_as_the_runtime_is() -> None:
    """Ranges of deeper layers differ: of the rounded network here, of the float one there."""
    model, x = conv_network(), inputs()
    params = model.initial()
    exact, seen = model(params, x), QAT().view(model)(params, x)
    served = Int8Runtime().prepare(model, params).calibrated(x)(x)
    ours, theirs = (float((y - exact).detach().norm()) for y in (seen, served))
    assert 0.5 < ours / theirs < 2


def test_the_gradient_is_that_of_the_rounded_network() -> None:
    """Of softmax regression, by hand: (p - onehot) x_q / B, with p by rounded weights."""
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
    x, y = inputs(6), torch.tensor([0, 1, 2, 3, 0, 1])
    for activations in ("int8", "float"):
        strategy = QAT(bits=4, activations=activations)
        params = model.initial()
        _, gradient = strategy.gradient(strategy.view(model), params, Batch(x, y), Memory({}))
        rows = x.flatten(1) if activations == "float" else fake_quantize_activation(x.flatten(1))
        weight = rounded_by_hand(params[:64].view(4, 16), 4)
        p = torch.softmax(rows @ weight.T + params[64:], 1)
        delta = (p - F.one_hot(y, 4)) / 6
        expected = torch.cat([(delta.T @ rows).flatten(), delta.sum(0)])
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_layers_that_the_runtime_leaves_float_are_left_so() -> None:
    class Own(nn.Linear):
        pass

    model = FlatModel(nn.Sequential(nn.Flatten(), Own(16, 5), nn.BatchNorm1d(5)).eval())
    params, x = model.initial(), inputs()
    assert torch.equal(QAT(bits=4).view(model)(params, x), model(params, x))


def test_weights_that_are_not_trained_stay_float() -> None:
    model = conv_network()
    model.module[0].weight.requires_grad_(False)
    model = FlatModel(model.module)
    params = model.initial()
    own = at_four_bits(model, params)
    views, rounded = model.layout.views(params), model.layout.views(own)
    assert torch.equal(views["0.weight"], rounded["0.weight"])
    assert not torch.equal(views["3.weight"], rounded["3.weight"])


def test_the_network_is_as_before() -> None:
    model, x = conv_network(), inputs()
    before, plain = model(model.initial(), x), dict(model.module.state_dict())
    QAT().view(model)(model.initial(), x)
    assert all(not layer._forward_pre_hooks for layer in model.module.modules())
    assert all(torch.equal(v, plain[k]) for k, v in model.module.state_dict().items())
    assert torch.equal(model(model.initial(), x), before)


def test_hooks_are_gone_even_after_a_failure() -> None:
    model = conv_network()
    with pytest.raises(RuntimeError):
        QAT().view(model)(model.initial(), torch.zeros(2, 7, 7, 7))
    assert all(not layer._forward_pre_hooks for layer in model.module.modules())


def test_features_are_those_of_the_rounded_network() -> None:
    model, x = conv_network(), inputs()
    params = model.initial()
    seen = QAT(bits=4).view(model)
    found, logits = features_and_logits(seen, params, x)
    assert torch.equal(logits, seen(params, x))
    plain, _ = features_and_logits(model, params, x)
    assert float((found - plain).detach().abs().max()) > 1e-3


# -- joined with others ----------------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Note parameters, inputs and answer whenever the network itself is asked."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = FlatModel.forward

    def spy(self: FlatModel, params: Tensor, x: Tensor) -> Tensor:
        out = forward(self, params, x)
        seen.append((params.detach().clone(), x, out.detach()))
        return out

    monkeypatch.setattr(FlatModel, "forward", spy)
    return seen


COMPOSED: dict[str, dict[str, Any]] = {
    "qat": {},
    "ewc+qat": {"ewc": {"strength": 10.0}},
    "qat+ewc": {"ewc": {"strength": 10.0, "step": "explicit"}},
    "replay+qat": {"replay": {"capacity": 8}},
    "qat+lwf": {},
    "agem+qat": {"agem": {"capacity": 8}},
    "moon+qat": {},
    "pruned+qat": {"pruned": {"num_prunings": 0}},
    "maml+qat": {},
}


def made(name: str, **own: Any) -> ClientStrategy:
    tables = own if name == "qat" else {**COMPOSED[name], "qat": own}
    return make_strategy(name, tables)


@pytest.mark.parametrize("name", COMPOSED)
def test_every_step_goes_through_rounded_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = toy_learner(made(name, bits=4))
    device, layout = toy_devices(1)[0], learner.model.layout
    state = learner.initial_state(device.store)
    first = learner.fit(state, learner.model.initial(), device, position=0, server_round=1)
    params = learner.model.initial() + layout.flatten(first.update.arrays)
    state = learner.consolidate(first.state, params, device, upto=1)
    training: list[tuple[Tensor, Tensor, Tensor]] = []
    run = Training.run

    def watched(self: Training, *args: Any, **kwargs: Any) -> Any:
        seen = spied(monkeypatch)
        done = run(self, *args, **kwargs)
        training.extend(seen)
        return done

    monkeypatch.setattr(Training, "run", watched)
    learner.fit(state, params, device, position=1, server_round=2)
    assert len(training) >= 6
    for asked, _, _ in training:
        for key, view in layout.views(asked).items():
            if key.endswith("weight"):
                codes = view / (view.abs().amax(1, keepdim=True) / 7).clamp(min=1e-20)
                assert float((codes - codes.round()).abs().max()) < 1e-4
    if "replay" in name:  # stored samples, too
        assert max(len(x) for _, x, _ in training) == 8


@pytest.mark.parametrize(
    ("names", "same_as"), [("ewc+qat", "ewc"), ("replay+qat", "replay"), ("qat+lwf", "lwf")]
)
def test_it_trains_otherwise_than_without_but_alike(names: str, same_as: str) -> None:
    ends: dict[str, Tensor] = {}
    for name in (names, same_as):
        tables = COMPOSED[names] if name == names else COMPOSED[names].get(same_as, {})
        learner = toy_learner(make_strategy(name, tables), lr=0.05)
        device = toy_devices(1)[0]
        state, start = learner.initial_state(device.store), learner.model.initial()
        done = learner.fit(state, start, device, position=0, server_round=1)
        ends[name] = learner.model.layout.flatten(done.update.arrays)
    apart = float((ends[names] - ends[same_as]).norm() / ends[same_as].norm())
    assert 1e-4 < apart < 0.2


def test_the_loss_of_parts_is_that_of_the_rounded_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cross-entropy on rounded weights, and what LwF adds to it, on the same answers."""
    learner = toy_learner(made("qat+lwf", bits=4, activations="float"))
    model, strategy = learner.model, learner.strategy
    memory = learner.initial_state(toy_devices(1)[0].store).memory
    batch = toy_devices(1)[0].samples(0).batch()
    params = model.initial()
    seen = spied(monkeypatch)
    loss = strategy.loss(strategy.view(model), params, batch, memory)
    rounded = at_four_bits(model, params)
    assert torch.equal(seen[0][0], rounded)
    torch.testing.assert_close(loss, F.cross_entropy(seen[0][2], batch.y))  # no teacher yet
    asked = [p for p, _, _ in seen if torch.equal(p, rounded)]
    assert len(asked) == 1  # of both parts, once


def test_a_part_that_trains_by_itself_is_refused() -> None:
    with pytest.raises(ScenarioError, match="trains by itself, so qat can't change the steps"):
        make_strategy("gdumb+qat", {})


@pytest.mark.parametrize("name", [n for n in COMPOSED if n != "qat"])
def test_combinations_keep_the_contract(name: str) -> None:
    findings = check_strategy(lambda: made(name))
    assert [f for f in findings if f.passed is False] == []


@pytest.mark.parametrize("own", [{"bits": 4}, {"activations": "float"}])
def test_arguments_keep_the_contract(own: dict[str, Any]) -> None:
    findings = check_strategy(lambda: QAT(**own))
    assert [f for f in findings if f.passed is False] == []


# -- what is served --------------------------------------------------------------------------------


def test_what_is_served() -> None:
    model = conv_network()
    params = model.initial()
    assert not QAT().overrides("serve")
    assert QAT(bits=4).overrides("serve")
    own = at_four_bits(model, params)
    before, after = model.layout.views(params), model.layout.views(own)
    for name, view in before.items():
        if name.endswith("weight"):
            flat = view.reshape(len(view), -1)
            torch.testing.assert_close(after[name].reshape(len(view), -1), rounded_by_hand(flat, 4))
        else:
            assert torch.equal(view, after[name])


def test_weights_of_four_bits_do_better_if_they_were_trained_as_such() -> None:
    """Labels that have to be learned by heart, a learning rate that falls to 0, three seeds."""

    def served_loss(strategy: ClientStrategy, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 16, generator=generator)
        batch = Batch(x, torch.randint(0, 4, (64,), generator=generator))
        torch.manual_seed(seed)
        model = FlatModel(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)))
        params, seen = model.initial(), strategy.view(model)
        for step in range(1500):
            _, gradient = strategy.gradient(seen, params, batch, Memory({}))
            params = params - 0.1 * (1 - step / 1500) * gradient
        return float(F.cross_entropy(model(at_four_bits(model, params), x), batch.y).detach())

    aware = sum(served_loss(QAT(bits=4, activations="float"), seed) for seed in range(3))
    plain = sum(served_loss(ClientStrategy(), seed) for seed in range(3))
    assert aware < 0.9 * plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 6}, "bits is 6; allowed: 4, 8"), ({"activations": "int4"}, "activations is 'int4'")],
)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QAT(**arguments)
