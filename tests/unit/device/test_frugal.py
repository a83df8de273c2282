"""Training in less memory gives what it should, and moves nothing that is not to be moved."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelearn.continual.ewc import EWC
from edgelearn.continual.gdumb import GDumb
from edgelearn.continual.gem import GEM
from edgelearn.continual.lwf import LwF
from edgelearn.continual.memory import Memory
from edgelearn.continual.naive import Naive
from edgelearn.continual.qat import QAT
from edgelearn.continual.replay import Replay
from edgelearn.continual.scaffold import Scaffold
from edgelearn.continual.si import SI
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.device.counting import Count
from edgelearn.device.learner import Learner
from edgelearn.device.state import Fit
from edgelearn.device.training import Training
from edgelearn.errors import ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import Batch
from edgelearn.scenario.spec import ClientSpec
from edgelearn.testing.toy import NUM_CLASSES, toy_devices, toy_facts, toy_model

SIZE = {"epochs": 2, "batch_size": 4, "lr": 0.1}


class Plain(ClientStrategy):
    """The default loss, but by autograd: an overridden loss can't be written out."""

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return super().loss(model, params, batch, memory)


class Pulled(ClientStrategy):
    """A loss that looks at parameters itself."""

    def loss(self, model: FlatModel, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return super().loss(model, params, batch, memory) + 0.5 * params.square().sum()


class Noting(ClientStrategy):
    """Changes nothing, but has to be told of each step: so steps are not taken at once."""

    def after_step(
        self, before: Tensor, after: Tensor, gradients: Tensor, memory: Memory
    ) -> Memory:
        assert before.shape == after.shape == gradients.shape == (172,)
        assert bool((gradients[:136] == 0).all())  # the first layer
        assert torch.equal(before[:136], after[:136])
        assert not torch.equal(before[136:], after[136:])
        return memory


def convolutional(*, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        nn.Dropout(dropout),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


def learner_of(strategy: ClientStrategy, module: nn.Module | None = None, **spec: Any) -> Learner:
    model = toy_model() if module is None else FlatModel(module)
    client = ClientSpec(strategy="toy", **{**SIZE, **spec})
    return Learner(model=model, strategy=strategy, spec=client, facts=toy_facts(), seed=0)


def fit(learner: Learner, *, position: int = 0, mu: float = 0.0) -> Fit:
    device, params = toy_devices(1)[0], learner.model.initial()
    state = learner.initial_state(device.store)
    state = learner.consolidate(state, params, device, upto=position)
    elsewhere = params + 0.05 if position else params  # so that there is something to pull back
    return learner.fit(state, elsewhere, device, position=position, server_round=1, proximal_mu=mu)


def moved(done: Fit) -> set[str]:
    return {name for name, delta in done.update.arrays.items() if bool((delta != 0).any())}


# -- which parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("last:1", {"6.weight", "6.bias"}),
        ("last:2", {"3.weight", "3.bias", "6.weight", "6.bias"}),
        ("bias", {"0.1.bias", "3.bias", "6.bias"}),
        ("norm", {"0.1.weight", "0.1.bias", "3.weight", "3.bias"}),
        (("0", "6.bias"), {"0.0.weight", "0.1.weight", "0.1.bias", "6.bias"}),
        (("2.weight",), {"2.weight"}),
    ],
)
def test_only_what_is_chosen_moves(train: Any, expected: set[str]) -> None:
    done = moved(fit(learner_of(Naive(), convolutional(), train=train)))
    # The gradient of a bias in front of batch norm is 0.
    assert {name for name in done if "running" not in name} - {"0.0.bias", "2.bias"} == expected


def test_statistics_of_norms_that_train_nothing_stay() -> None:
    done = moved(fit(learner_of(Naive(), convolutional(), train=("3", "6"))))
    assert {"3.running_mean", "3.running_var"} <= done
    assert not {"0.1.running_mean", "0.1.running_var"} & done


@pytest.mark.parametrize(
    ("strategy", "spec", "mu"),
    [
        (Naive(), {"momentum": 0.9, "weight_decay": 0.1}, 0.5),
        (Naive(), {"optimizer": "adamw", "weight_decay": 0.1}, 0.0),
        (Replay(capacity=8), {}, 0.0),
        (EWC(strength=10.0), {"momentum": 0.9}, 0.0),
        (EWC(strength=1.0, step="explicit"), {}, 0.5),
        (Scaffold(), {}, 0.0),
        (SI(), {}, 0.0),
        (LwF(), {}, 0.0),
        (QAT(), {"weight_decay": 0.1}, 0.0),
        (Pulled(), {}, 0.5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ClientStrategy) else None,
)
def test_nothing_else_moves_whatever_the_strategy(
    strategy: ClientStrategy, spec: dict[str, Any], mu: float
) -> None:
    done = fit(learner_of(strategy, train="last:1", **spec), position=1, mu=mu)
    assert moved(done) & {"1.weight", "1.bias"} == set()
    assert moved(done) >= {"3.weight", "3.bias"}


def reference(
    learner: Learner, names: set[str], *, momentum: float, decay: float, mu: float, own: float
) -> Tensor:
    """Train by torch's own means."""
    model, device = learner.model, toy_devices(1)[0]
    plain = ClientSpec(strategy="toy", **SIZE)
    batches = Training(model, Naive(), plain).steps(device.samples(0), Memory({}), _seed(learner))
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))
    layers.load_state_dict(model.layout.views(model.initial()))
    start = [p.detach().clone() for p in layers.parameters()]
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(name in names)
    trained = [p for p in layers.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=momentum, weight_decay=decay)
    for step in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(layers(step.batch.x), step.batch.y)
        for parameter, before in zip(layers.parameters(), start, strict=True):
            loss = loss + mu / 2 * (parameter - before).square().sum()
            loss = loss + own * parameter.square().sum()
        loss.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in layers.parameters()])


def _seed(learner: Learner) -> int:
    from edgelearn.device.learner import steps_seed

    return steps_seed(learner.seed, 1, 0)


@pytest.mark.parametrize("strategy", [Naive(), Pulled()], ids=["Naive", "Pulled"])
@pytest.mark.parametrize("train", ["last:1", "bias", ("1.weight", "3.bias")])
def test_steps_are_those_of_torch_with_the_rest_frozen(
    strategy: ClientStrategy, train: Any
) -> None:
    learner = learner_of(strategy, train=train, momentum=0.9, weight_decay=0.1)
    names = {"last:1": {"3.weight", "3.bias"}, "bias": {"1.bias", "3.bias"}}
    chosen = names[train] if isinstance(train, str) else set(train)
    own = 0.5 if isinstance(strategy, Pulled) else 0.0
    expected = reference(learner, chosen, momentum=0.9, decay=0.1, mu=0.3, own=own)
    delta = learner.model.layout.flatten(fit(learner, mu=0.3).update.arrays)
    torch.testing.assert_close(learner.model.initial() + delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_a_step_taken_at_once_has_the_bits_of_one_taken_later(spec: dict[str, Any]) -> None:
    at_once = fit(learner_of(Naive(), train="last:1", **spec), mu=0.1)
    later = fit(learner_of(Noting(), train="last:1", **spec), mu=0.1)
    for name, delta in at_once.update.arrays.items():
        assert torch.equal(delta, later.update.arrays[name])


def test_below_the_first_chosen_layer_nothing_is_differentiated() -> None:
    learner = learner_of(Naive(), convolutional(dropout=0.0), train="last:1")
    training = Training(learner.model, learner.strategy, learner.spec)
    seen: list[str] = []

    class Listening(Count):
        def __torch_dispatch__(self, func: Any, *arguments: Any) -> Any:
            seen.append(str(func))
            return super().__torch_dispatch__(func, *arguments)

    with Listening():
        training.run(learner.model.initial(), Memory({}), toy_devices(1)[0].samples(0), seed=0)
    assert "aten.convolution.default" in seen
    assert not any("convolution_backward" in name or "threshold_back" in name for name in seen)


@pytest.mark.parametrize("spec", [{}, {"checkpoint": True}, {"accumulate": 2}])
def test_all_but_the_result_is_freed_at_once(spec: dict[str, Any]) -> None:
    learner = learner_of(Naive(), train="last:1", optimizer="adam", **spec)
    training = Training(learner.model, learner.strategy, learner.spec)
    device, params = toy_devices(1)[0], learner.model.initial()
    gc.collect()
    gc.disable()
    try:
        with Count() as count:
            trained = training.run(params, Memory({}), device.samples(0), seed=0)
            assert {s.num_bytes for s in count.alive} == {4 * learner.model.layout.size}
            assert len(count.alive) == 1
            del trained
            assert count.alive == []
    finally:
        gc.enable()


# -- blocks computed again -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_blocks_computed_again_give_the_same_bits(spec: dict[str, Any]) -> None:
    plain = fit(learner_of(Plain(), convolutional(), **spec))
    again = fit(learner_of(Naive(), convolutional(), checkpoint=True, **spec))
    assert plain.update.metrics == again.update.metrics
    for name, delta in plain.update.arrays.items():
        assert torch.equal(delta, again.update.arrays[name]), name


def test_a_network_that_is_left_is_as_it_was() -> None:
    module = convolutional()
    fit(learner_of(Naive(), module, checkpoint=True))
    assert not any("forward" in vars(part) for part in module.modules())
    assert module[3].momentum == 0.1
    assert int(module[3].num_batches_tracked) == 0


def test_blocks_of_a_network_that_is_not_a_sequence_are_found() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()
            )
            self.head = nn.Linear(16, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1) + self.body(x))

    torch.manual_seed(0)
    plain = fit(learner_of(Plain(), Residual()))
    torch.manual_seed(0)
    again = fit(learner_of(Naive(), Residual(), checkpoint=True))
    for name, delta in plain.update.arrays.items():
        assert torch.equal(delta, again.update.arrays[name]), name


# -- batches in parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize(
    "strategy", [Naive(), Replay(capacity=8), EWC(strength=1.0)], ids=["naive", "replay", "ewc"]
)
def test_parts_of_a_batch_add_up_to_it(strategy: ClientStrategy, accumulate: int) -> None:
    whole = fit(learner_of(strategy, momentum=0.9), position=1)
    parts = fit(learner_of(strategy, momentum=0.9, accumulate=accumulate), position=1)
    assert parts.update.metrics["loss"] == pytest.approx(whole.update.metrics["loss"], rel=1e-5)
    for name, delta in whole.update.arrays.items():
        torch.testing.assert_close(delta, parts.update.arrays[name], rtol=1e-4, atol=1e-6)


def test_parts_keep_the_weights_of_samples() -> None:
    strategy = Replay(capacity=8, share=0.8)
    whole, parts = (fit(learner_of(strategy, accumulate=n), position=1) for n in (1, 3))
    for name, delta in whole.update.arrays.items():
        torch.testing.assert_close(delta, parts.update.arrays[name], rtol=1e-4, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "module", "spec", "message"),
    [
        (Naive(), None, {"train": "last:3"}, "the network has 2 layers with parameters"),
        (Naive(), None, {"train": "norm"}, "the network has no such parameters"),
        (Naive(), None, {"train": ("1.wieght",)}, "did you mean '1.weight'"),
        (GDumb(), None, {"train": "bias"}, "trains by itself"),
        (GEM(), None, {"checkpoint": True}, "takes the gradient by itself"),
        (LwF(), None, {"accumulate": 2}, "has a loss of its own"),
        (Naive(), convolutional(), {"accumulate": 2}, "batch norm takes its statistics"),
        (Naive(), convolutional(), {"accumulate": 2, "train": "bias"}, "batch norm takes"),
        (Naive(), nn.Linear(16, 4), {"checkpoint": True}, "no nn.Sequential"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(
    strategy: ClientStrategy, module: nn.Module | None, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScenarioError, match=message):
        learner_of(strategy, module, **spec)


def test_parts_go_with_batch_norm_that_is_frozen() -> None:
    whole, parts = (
        fit(learner_of(Naive(), convolutional(dropout=0.0), train="last:1", accumulate=n))
        for n in (1, 2)
    )
    for name, delta in whole.update.arrays.items():
        torch.testing.assert_close(delta, parts.update.arrays[name], rtol=1e-4, atol=1e-6)
