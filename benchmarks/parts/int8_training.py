"""One device that adapts without float weights: with and without quantization-aware scaling.

A CNN that knows Fashion-MNIST upright sees it turned by 90 degrees, and takes 200 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from harness import results
from harness.results import Options
from torch import Tensor

from edgelearn.continual.strategy import ClientStrategy, Facts, make_strategy
from edgelearn.device.learner import Learner
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.scenario.datasets import fashion_mnist
from edgelearn.scenario.models import cnn
from edgelearn.scenario.samples import Encoding, Samples, SampleStore, SharedSamples
from edgelearn.scenario.spec import ClientSpec, DataSpec
from edgelearn.scenario.stream import Experience
from edgelearn.seeds import derive, permutation
from parts.quantization import difference, each, percent

PART = "int8-training"
SCOPES: Mapping[str, list[str]] = {
    "all layers": ["0", "3", "7", "9"],
    "second convolution and output": ["3", "9"],
    "output layer": ["9"],
}
IN_FLOAT = "float"
UPDATES: Mapping[str, Mapping[str, Any]] = {
    IN_FLOAT: {},
    "codes, unscaled": {"is_scaled": False},
    "codes, QAS, stochastic": {},
}
# Only of all layers.
MORE: Mapping[str, Mapping[str, Any]] = {
    "codes, QAS, to the nearest": {"rounding": "nearest"},
    "codes, QAS, stochastic, headroom 1": {"headroom": 1.0},
    "codes, QAS, stochastic, int8 inputs": {},
}
SIZES = {"upright": 10_000, "turned": 2_000, "test": 3_000, "steps": 200}
QUICK_SIZES = {"upright": 400, "turned": 100, "test": 100, "steps": 5}
LR, BATCH_SIZE, EPOCHS = 0.05, 32, 2


@dataclass(frozen=True)
class Device:
    """A device with some samples."""

    store: SampleStore
    ids: Tensor
    device: int = 0

    def experience(self, position: int) -> Experience:
        """Return its only experience: all classes."""
        return Experience(position, position, tuple(range(10)))

    def samples(self, position: int, *, server_round: int | None = None) -> Samples:  # noqa: ARG002
        """Return its samples."""
        return Samples(self.store, self.ids)


def measure(options: Options, *, num_seeds: int) -> dict[str, Any]:
    """Adapt in every way with every seed; a turn is a seed."""
    sizes = QUICK_SIZES if options.quick else SIZES

    def runs(seed: int) -> dict[str, results.Run]:
        ways: dict[str, results.Run] = {"before": partial(_before, seed, sizes)}
        for scope in SCOPES:
            for update, args in UPDATES.items():
                ways[_name(update, scope)] = partial(_adapted, update, args, scope, seed, sizes)
        first = next(iter(SCOPES))
        for update, args in MORE.items():
            ways[_name(update, first)] = partial(_adapted, update, args, first, seed, sizes)
        return ways

    config = {
        "sizes": sizes,
        "lr": LR,
        "batch_size": BATCH_SIZE,
        "epochs_before": EPOCHS,
        "seeds": num_seeds,
        "command": "python benchmarks/quantization.py",
    }
    return results.repeat(PART, runs, options, config=config, repetitions=num_seeds)


def _name(update: str, scope: str) -> str:
    return f"{update}; {scope}"


def _network(seed: int, scope: str) -> FlatModel:
    """Return the CNN with 206,922 parameters, of which those of a scope are trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "network"))
        module = cnn(input_shape=(1, 28, 28), num_classes=10, channels=(16, 32), hidden=128)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in SCOPES[scope])
    return FlatModel(module)


@cache
def _stores() -> tuple[SharedSamples, SharedSamples, SharedSamples]:
    """Return training samples upright, the same turned by 90 degrees, and test samples turned."""
    found = fashion_mnist(DataSpec(dataset="fashion-mnist"))
    encoding = Encoding(scale=found.scale, mean=found.mean, std=found.std)
    train, test = torch.from_numpy(found.x_train), torch.from_numpy(found.x_test)
    labels, test_labels = torch.from_numpy(found.y_train), torch.from_numpy(found.y_test)
    return (
        SharedSamples(train, labels, encoding),
        SharedSamples(_turned(train), labels, encoding),
        SharedSamples(_turned(test), test_labels, encoding),
    )


def _turned(images: Tensor) -> Tensor:
    return torch.rot90(images, dims=(2, 3)).contiguous()


def _ids(seed: int, sizes: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    upright, _, test = _stores()
    order = torch.from_numpy(permutation(derive(seed, "train"), len(upright.y))).to(torch.int32)
    others = torch.from_numpy(permutation(derive(seed, "test"), len(test.y))).to(torch.int32)
    first, second = sizes["upright"], sizes["turned"]
    return order[:first], order[first : first + second], others[: sizes["test"]]


def _learner(model: FlatModel, strategy: ClientStrategy, seed: int, **spec: int) -> Learner:
    client = ClientSpec(strategy="naive", lr=LR, batch_size=BATCH_SIZE, **spec)
    return Learner(model, strategy, client, Facts(1, 10, sample_bytes=785), seed)


@cache
def _knows_upright(seed: int, upright: int) -> tuple[FlatModel, Tensor]:
    """Return the network that has learned upright images, in float."""
    model = _network(seed, next(iter(SCOPES)))
    learner = _learner(model, ClientStrategy(), seed, epochs=EPOCHS)
    ids, _, _ = _ids(seed, {**SIZES, "upright": upright})
    device, params = Device(_stores()[0], ids), model.initial()
    fit = learner.fit(
        learner.initial_state(device.store), params, device, position=0, server_round=1
    )
    return model, params + model.layout.flatten(fit.update.arrays)


def _before(seed: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    model, params = _knows_upright(seed, sizes["upright"])
    return _accuracies(model, params, seed, sizes)


def _adapted(
    update: str, args: Mapping[str, Any], scope: str, seed: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    known, learned = _knows_upright(seed, sizes["upright"])
    is_float = update == IN_FLOAT
    # What is not trained is no parameter of the float network; codes are kept of all layers.
    model = _network(seed, scope if is_float else next(iter(SCOPES)))
    params = model.layout.flatten(known.layout.views(learned))
    if is_float:
        strategy = ClientStrategy()
    else:
        own = {**args, "scope": SCOPES[scope]}
        if "int8 inputs" in update:
            strategy = make_strategy("int8-train+qat", {"int8-train": own})
        else:
            strategy = make_strategy("int8-train", own)
    learner = _learner(model, strategy, seed, steps=sizes["steps"])
    device = Device(_stores()[1], _ids(seed, sizes)[1])
    state = learner.initial_state(device.store)
    fit = learner.fit(state, params, device, position=0, server_round=2)
    changes = model.layout.flatten(fit.update.arrays)
    weights = [view for name, view in model.layout.views(changes).items() if "weight" in name]
    return {
        **_accuracies(model, params + changes, seed, sizes),
        "changed": sum(int(view.count_nonzero()) for view in weights),
        "weights": sum(view.numel() for view in weights),
        "memory_bytes": learner.memory_bytes,
        "num_params": model.layout.size,
    }


def _accuracies(
    model: FlatModel, params: Tensor, seed: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the accuracy on turned images, of the int8 model and of the float one."""
    _, own, ids = _ids(seed, sizes)
    batch = Samples(_stores()[2], ids).batch()
    calibration = Samples(_stores()[1], own[:256]).batch().x
    model.carry(params.clone())
    model.module.eval()
    served = Int8Runtime().prepare(model, params).calibrated(calibration)
    with torch.no_grad():
        answers = served(batch.x), model(params, batch.x)
    shares = [float((logits.argmax(1) == batch.y).float().mean()) for logits in answers]
    return {"accuracy": shares[0], "float_accuracy": shares[1]}


def section(result: dict[str, Any]) -> str:
    """Return the table."""
    sizes = result["config"]["sizes"]
    before = results.values(result, "before", "accuracy")
    runs = results.runs_of(result, _name("codes, QAS, stochastic", next(iter(SCOPES))))
    lines = [
        (
            f"A CNN that learned {sizes['upright']:,} upright images of Fashion-MNIST sees "
            f"{sizes['turned']:,} turned by 90 degrees and takes {sizes['steps']} steps of "
            f"{result['config']['batch_size']} with a learning rate of {result['config']['lr']:g}. "
            f"Accuracy of the int8 model then, on {sizes['test']:,} turned test images, in percent "
            f"(before: {percent(before)}): mean ± standard deviation over seeds; the difference is "
            "to float training of the same layers, seed by seed, with its 95 % interval."
        ),
        "",
        "| update | what trains | accuracy | each seed | difference | codes that changed |",
        "|---|---|---|---|---|---|",
    ]
    for scope in SCOPES:
        for update in (*UPDATES, *(MORE if scope == next(iter(SCOPES)) else {})):
            name = _name(update, scope)
            accuracy = results.values(result, name, "accuracy")
            of_float = results.values(result, _name(IN_FLOAT, scope), "accuracy")
            if len(accuracy) < 2 or len(accuracy) != len(of_float):
                continue
            changed = results.median(results.values(result, name, "changed"))
            is_float = update == IN_FLOAT
            lines.append(
                f"| {update} | {scope} | {percent(accuracy)} | {each(accuracy)} "
                f"| {'' if is_float else difference(accuracy, of_float)} "
                f"| {'' if is_float else f'{changed:,.0f}'} |"
            )
    if runs:
        held, count = runs[0]["memory_bytes"], runs[0]["num_params"]
        lines += [
            "",
            (
                f"With codes a device holds {held:,} bytes for the {count:,} parameters while it "
                f"trains, as declared; in float32 they are {4 * count:,}. Codes that changed: the "
                f"median over seeds, of {runs[0]['weights']:,}."
            ),
        ]
    return "\n".join(lines)
