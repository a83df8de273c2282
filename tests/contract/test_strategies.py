"""The contract checks, over installed strategies, the template, and strategies that break them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from edgelearn import plugins
from edgelearn.continual.buffers import reservoir
from edgelearn.continual.ewc import EWC
from edgelearn.continual.lwf import LwF
from edgelearn.continual.mas import MAS
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.path import PathIntegral
from edgelearn.continual.replay import Replay
from edgelearn.continual.si import SI
from edgelearn.continual.strategy import ClientStrategy, Pull, Update, make_strategy
from edgelearn.errors import PluginError
from edgelearn.scenario.samples import Batch, Samples
from edgelearn.testing.checks import CHECKS
from edgelearn.testing.contract import Finding, check_strategy, format_findings
from edgelearn.testing.template import class_name, module_name, write_strategy

NAMES = [check.name for check in CHECKS]


def failed(findings: list[Finding]) -> dict[str, str]:
    assert [finding.check for finding in findings] == NAMES
    return {finding.check: finding.message for finding in findings if finding.passed is False}


# -- strategies that keep the contract -------------------------------------------------------------


# Strategies that make as many samples, in as many steps, as no toy needs.
SMALLER: dict[str, dict[str, Any]] = {"target": {"capacity": 20, "steps": 4}}


@pytest.mark.parametrize("name", plugins.names(plugins.CLIENT_STRATEGIES))
def test_installed_strategies_keep_the_contract(name: str) -> None:
    kind = plugins.resolve(name, plugins.CLIENT_STRATEGIES)
    assert failed(check_strategy(kind, **SMALLER.get(name, {}))) == {}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (EWC, {"mode": "separate"}),
        (EWC, {"step": "explicit", "strength": 1.0}),
        (EWC, {"mode": "separate", "step": "explicit", "strength": 1.0, "max_fisher_samples": 3}),
        (EWC, {"decay": 0.5}),
        (EWC, {"strength": 0.0}),
        (EWC, {"fisher": "true", "storage": "int8"}),
        (EWC, {"fisher": "exact", "storage": "float16", "mode": "separate"}),
        (SI, {"step": "explicit", "storage": "float16"}),
        (SI, {"storage": "int8"}),
        (MAS, {"step": "explicit", "strength": 0.1, "storage": "float16"}),
        (MAS, {"storage": "int8", "max_samples": 3}),
        (LwF, {"storage": "float16"}),
        (LwF, {"storage": "int8", "alpha": 0.5, "temperature": 1.0}),
        (Replay, {"capacity": 5, "policy": "herding"}),
        (Replay, {"capacity": 4, "policy": "class-balanced"}),
        (Replay, {"capacity": 4, "policy": "reservoir"}),
        (Replay, {"memory_kib": 0.1, "policy": "reservoir", "share": 0.5}),
        (Replay, {"capacity": 1, "share": 0.9, "replay_batch": 3}),
        (Replay, {"capacity": 6, "share": 0.0}),
    ],
)
def test_built_in_strategies_pass_every_check_with_any_arguments(
    kind: type[ClientStrategy], arguments: dict[str, Any]
) -> None:
    findings = check_strategy(kind, **arguments)
    assert [f for f in findings if f.passed is not True] == []


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        ("ewc+replay", {"ewc": {"storage": "int8"}}),
        ("si+lwf", {"lwf": {"storage": "float16"}}),  # bool tensors beside an account of steps
        ("mas+lwf+replay", {"replay": {"policy": "herding", "capacity": 4}}),
    ],
)
def test_combinations_of_built_in_strategies_pass_every_check(
    names: str, arguments: dict[str, Any]
) -> None:
    findings = check_strategy(lambda: make_strategy(names, arguments))
    assert [f for f in findings if f.passed is not True] == []


def test_a_factory_is_as_good_as_a_class() -> None:
    findings = check_strategy(lambda: Replay(capacity=3))
    assert failed(findings) == {}
    assert findings[0].message == "Replay()"


# -- strategies that break it, each in one way -----------------------------------------------------


class NeedsArguments(ClientStrategy):
    def __init__(self, *, strength: float) -> None:
        self.strength = strength


class NotAStrategy:
    pass


class ShapeOfText(ClientStrategy):
    def declare(self, model: Any, facts: Any) -> Any:
        return {"anchor": (3, 4)}


class PullOfNothing(ClientStrategy):
    def pull(self) -> Pull:
        return Pull("fisher", "anchor", 1.0)


class PathOfAnotherSize(ClientStrategy):
    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"charge": TensorSpec((3,))}

    def path(self) -> PathIntegral:
        return PathIntegral("charge")


class UndeclaredByReplace(ClientStrategy):
    def finish(self, model: Any, params: Any, data: Any, memory: Memory, generator: Any) -> Memory:
        return memory.replace(anchor=params)


class UndeclaredByHand(ClientStrategy):
    def finish(self, model: Any, params: Any, data: Any, memory: Memory, generator: Any) -> Memory:
        return Memory({**memory, "anchor": params.clone()}, memory.store)


class Declares(ClientStrategy):
    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"anchor": TensorSpec((model.layout.num_trained,)), "steps": TensorSpec((1,))}


class WrongDtype(Declares):
    def finish(self, model: Any, params: Any, data: Any, memory: Memory, generator: Any) -> Memory:
        return memory.replace(anchor=params.double())


class WrongShape(Declares):
    def start(self, model: Any, params: Tensor, memory: Memory, experience: Any) -> Memory:
        return memory.replace(anchor=params[:3].clone())


class Raises(ClientStrategy):
    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients * {"a": 1}["scale"]  # the line that is to be named


class ReturnsNothing(ClientStrategy):
    def finish(self, model: Any, params: Any, data: Any, memory: Memory, generator: Any) -> Any:
        memory.replace()


class LossIgnoresParams(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return torch.nn.functional.cross_entropy(model.module(batch.x), batch.y)


class LossIsNotScalar(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return torch.nn.functional.cross_entropy(model(params, batch.x), batch.y, reduction="none")


class LossIsNaN(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return super().loss(model, params, batch, memory) + (params * 0).sum().sqrt()


class HalfTheGradient(ClientStrategy):
    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients[: len(gradients) // 2]


class CountsOnSelf(ClientStrategy):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        self.steps.append(len(batch))
        return super().loss(model, params, batch, memory)


class KeepsATensorOnSelf(ClientStrategy):
    def __init__(self) -> None:
        self.anchor = torch.zeros(172)

    def start(self, model: Any, params: Tensor, memory: Memory, experience: Any) -> Memory:
        self.anchor.copy_(params)
        return memory


class CountsOnTheClass(ClientStrategy):
    steps = 0

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        CountsOnTheClass.steps += 1
        return batch


_clock = [0.0]


class ImpureLoss(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        _clock[0] += 1.0
        return super().loss(model, params, batch, memory) * _clock[0]


class MutatesMemory(Declares):
    def after_step(self, before: Any, after: Any, gradients: Any, memory: Memory) -> Memory:
        memory["steps"].add_(1)
        return memory


class MutatesBatch(ClientStrategy):
    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        batch.x[0] = 0
        return batch


class MutatesGradients(ClientStrategy):
    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients.clamp_(-0.1, 0.1)


class MutatesTheStore(ClientStrategy):
    def finish(self, model: Any, params: Any, data: Samples, memory: Memory, generator: Any) -> Any:
        data.store.y[data.ids.long()] = 0
        return memory


class MutatesTheModel(ClientStrategy):
    def start(self, model: Any, params: Tensor, memory: Memory, experience: Any) -> Memory:
        with torch.no_grad():
            next(model.module.parameters()).zero_()
        return memory


class GlobalGenerator(Declares):
    def finish(self, model: Any, params: Any, data: Any, memory: Memory, generator: Any) -> Memory:
        return memory.replace(anchor=params + torch.randn(len(params)))


class PythonsGenerator(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return super().loss(model, params, batch, memory) * (1 + 1e-3 * random.random())


class OtherInAStack(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        try:
            factor = 1.0 if float(params.detach().sum()) < 1e9 else 0.0
        except RuntimeError:
            factor = 2.0
        return factor * super().loss(model, params, batch, memory)


class IdsInAPlainTensor(ClientStrategy):
    """Replay whose buffer is not declared as samples: a real device forgets them."""

    def declare(self, model: Any, facts: Any) -> Declaration:
        return {"buffer": TensorSpec((6,), torch.int32), "seen": TensorSpec((1,), torch.int64)}

    def extend(self, batch: Batch, memory: Memory, generator: Generator) -> Batch:
        if int(memory["seen"]) == 0:
            return batch
        return batch.join(memory.store.batch(memory["buffer"]))

    def finish(
        self, model: Any, params: Any, data: Samples, memory: Memory, generator: Generator
    ) -> Memory:
        seen = memory["seen"]
        buffer = reservoir(memory["buffer"], int(seen), data.ids, generator)
        return memory.replace(buffer=buffer, seen=seen + len(data))


class LeaksASample(ClientStrategy):
    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        sample = data.batch(slice(0, 1)).x.flatten().tolist()
        return Update(update.arrays, {**update.metrics, "sample": sample})


class LeaksWhenAlone(ClientStrategy):
    def upload(self, update: Update, data: Samples, memory: Memory) -> Update:
        if len(data) != 1:
            return update
        return Update({**update.arrays, "label": data.labels.float()}, update.metrics)


class NeedsSamples(ClientStrategy):
    def finish(self, model: Any, params: Any, data: Samples, memory: Memory, generator: Any) -> Any:
        assert int(data.labels.max()) >= 0
        return memory


class NaNWhenAlone(Declares):
    def finish(self, model: Any, params: Any, data: Samples, memory: Memory, generator: Any) -> Any:
        spread = data.batch().x.flatten(1).std(0).mean() if len(data) == 1 else torch.zeros(())
        return memory.replace(steps=spread.reshape(1))


class WasNeverAway(Declares):
    """Breaks where a device makes up for an experience that it never trained on."""

    def after_step(self, before: Any, after: Any, gradients: Any, memory: Memory) -> Memory:
        return memory.replace(steps=memory["steps"] + 1)

    def finish(self, model: Any, params: Any, data: Samples, memory: Memory, generator: Any) -> Any:
        if len(data) and not memory["steps"]:
            raise RuntimeError("never trained")
        return memory


BROKEN: list[tuple[Any, str, str]] = [
    (NeedsArguments, "builds", "missing 1 required keyword-only argument: 'strength'"),
    (NotAStrategy, "builds", "expected a subclass of edgelearn.ClientStrategy"),
    (ShapeOfText, "builds", "expected a name with a TensorSpec"),
    (PullOfNothing, "builds", "`pull` names 'fisher', which `declare` has as None"),
    (PathOfAnotherSize, "builds", "`path` names 'charge', which `declare` has as TensorSpec"),
    (UndeclaredByReplace, "memory", "memory has no anchor"),
    (UndeclaredByHand, "memory", "after `finish`, memory has anchor, which is not declared"),
    (WrongDtype, "memory", "'anchor' is (172,) torch.float64, declared (172,) torch.float32"),
    (WrongShape, "memory", "after `start`, memory 'anchor' is (3,) torch.float32"),
    (Raises, "hooks", "KeyError: 'scale'"),
    (ReturnsNothing, "hooks", "finish returned NoneType, expected a Memory"),
    (LossIgnoresParams, "hooks", "does not depend on the `params`"),
    (LossIsNotScalar, "hooks", "expected a scalar"),
    (LossIsNaN, "hooks", "not finite"),
    (HalfTheGradient, "hooks", "`adjust` returned (86,)"),
    (CountsOnSelf, "stateless", "self.steps changed"),
    (KeepsATensorOnSelf, "stateless", "self.anchor changed"),
    (CountsOnTheClass, "stateless", "CountsOnTheClass.steps changed"),
    (ImpureLoss, "pure", "`loss`, called twice with the same inputs, gave two results"),
    (MutatesMemory, "pure", "`after_step` changed its input memory"),
    (MutatesBatch, "pure", "`extend` changed its input batch"),
    (MutatesGradients, "pure", "`adjust` changed its input gradients"),
    (MutatesTheStore, "pure", "`finish` changed the samples of the device"),
    (MutatesTheModel, "pure", "`start` changed its input model"),
    (GlobalGenerator, "seeded", "`finish` drew from the process-wide generator of torch"),
    (PythonsGenerator, "seeded", "`loss` drew from the process-wide generator of Python's random"),
    (OtherInAStack, "stacked", "`loss` gives device 0 another value in a stack of 3"),
    (IdsInAPlainTensor, "durable", "as SampleSpec"),
    (LeaksASample, "upload", "'sample'"),
    (LeaksWhenAlone, "upload", "a tensor that is not declared"),
    (NeedsSamples, "odd data", "on a device with no samples"),
    (NaNWhenAlone, "odd data", "not finite on a device with a single sample"),
    (WasNeverAway, "whole run", "RuntimeError: never trained"),
]


@pytest.mark.filterwarnings("ignore:std\\(\\). degrees of freedom")
@pytest.mark.parametrize(
    ("kind", "check", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None)
)
def test_a_broken_contract_is_caught_by_exactly_its_check(
    kind: type[Any], check: str, message: str
) -> None:
    found = failed(check_strategy(kind))
    assert list(found) == [check]
    assert message in found[check]


def test_every_check_has_a_strategy_that_fails_it() -> None:
    # Who learns nothing is told so, without a verdict.
    assert {check for _, check, _ in BROKEN} == set(NAMES) - {"learns"}


class ClimbsUp(ClientStrategy):
    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        return -super().loss(model, params, batch, memory)


def test_who_does_not_learn_is_told_so_without_a_verdict() -> None:
    findings = {finding.check: finding for finding in check_strategy(ClimbsUp)}
    assert findings["learns"].passed is None
    assert "look at the loss and its sign" in findings["learns"].message
    assert all(f.passed for name, f in findings.items() if name != "learns")


class CannotBeStacked(ClientStrategy):
    def adjust(self, gradients: Tensor, params: Tensor, memory: Memory) -> Tensor:
        return gradients / max(1.0, float(gradients.norm()))


def test_who_cannot_be_stacked_runs_device_by_device_and_has_not_failed() -> None:
    findings = {finding.check: finding for finding in check_strategy(CannotBeStacked)}
    assert findings["stacked"].passed is None
    assert "device by device, since `adjust`" in findings["stacked"].message
    assert all(f.passed for name, f in findings.items() if name != "stacked")


class NoisyLoss(ClientStrategy):
    """Draws from torch's generator within the loss, which the learner seeds, as dropout does."""

    def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
        noisy = batch.x + 0.01 * torch.randn(batch.x.shape)
        return super().loss(model, params, Batch(noisy, batch.y), memory)


def test_the_loss_may_draw_as_dropout_does() -> None:
    assert failed(check_strategy(NoisyLoss)) == {}


class OwnNamesOfArguments(ClientStrategy):
    def extend(self, b: Batch, m: Memory, g: Generator) -> Batch:  # type: ignore[override]
        return b.join(m.draw("kept", len(b), g))

    def declare(self, network: Any, known: Any) -> Declaration:  # type: ignore[override]
        return {"kept": SampleSpec(3)}


def test_arguments_may_be_named_as_one_likes() -> None:
    assert failed(check_strategy(OwnNamesOfArguments)) == {}


# -- the checker itself ----------------------------------------------------------------------------


def test_an_exception_names_the_line_of_the_plugin() -> None:
    message = failed(check_strategy(Raises))["hooks"]
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "the line that is to be named" in text)
    assert f"{__file__}:{line}, in adjust" in message


def test_an_exception_in_torch_names_the_line_of_the_plugin_that_called_it() -> None:
    class Misfit(ClientStrategy):
        def loss(self, model: Any, params: Tensor, batch: Batch, memory: Memory) -> Tensor:
            return torch.nn.functional.cross_entropy(params, batch.y)

    message = failed(check_strategy(Misfit))["hooks"]
    assert re.search(re.escape(__file__) + r":\d+, in loss", message)


def test_even_a_plugin_that_exits_is_a_finding() -> None:
    class Exits(ClientStrategy):
        def start(self, *arguments: Any) -> Any:
            sys.exit(3)

    assert "SystemExit: 3" in failed(check_strategy(Exits))["hooks"]


def test_what_was_not_checked_says_why() -> None:
    findings = {finding.check: finding for finding in check_strategy(Raises)}
    assert findings["durable"] == Finding("durable", None, "not checked until 'hooks' passes")


def test_the_caller_is_not_disturbed() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    drawn = random.getstate()
    check_strategy(PythonsGenerator)
    check_strategy(GlobalGenerator)
    assert torch.equal(before, torch.get_rng_state())
    assert drawn == random.getstate()
    assert torch.get_num_threads() == threads


def test_findings_as_text() -> None:
    text = format_findings(
        [
            Finding("builds", True, "Naive()"),
            Finding("pure", False, "it is not " * 20),
            Finding("stacked", None, "one by one"),
        ]
    )
    lines = text.splitlines()
    assert lines[0] == "✓ builds   Naive()"
    assert lines[1].startswith("✗ pure     it is not it is not")
    assert lines[2].startswith("           ")
    assert lines[-2] == "– stacked  one by one"  # noqa: RUF001
    assert lines[-1] == "1 passed, 1 failed, 1 without a verdict"
    assert all(len(line) <= 100 for line in lines)


# -- the file to start from ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("my-strategy", "my_strategy.py", "MyStrategy"),
        ("my_strategy", "my_strategy.py", "MyStrategy"),
        ("MyStrategy", "my_strategy.py", "MyStrategy"),
        ("HTTPReplay2", "http_replay2.py", "HTTPReplay2"),
        ("l2-pull", "l2_pull.py", "L2Pull"),
    ],
)
def test_names_become_a_file_and_a_class(tmp_path: Path, name: str, file: str, kind: str) -> None:
    path = write_strategy(name, tmp_path)
    assert path == tmp_path / file
    assert class_name(name) == kind
    assert module_name(name) + ".py" == file
    text = path.read_text(encoding="utf-8")
    header = text.partition('"""')[0]
    assert f"edgelearn check {file}:{kind}" in header
    assert f"edgelearn run split-digits --client {file}:{kind}" in header
    assert "${" not in text


def test_the_template_keeps_the_contract(tmp_path: Path) -> None:
    path = write_strategy("stay-close", tmp_path)
    findings = check_strategy(plugins.resolve(f"{path}:StayClose", plugins.CLIENT_STRATEGIES))
    assert [f for f in findings if f.passed is not True] == []


def test_the_template_with_its_replay_switched_on_keeps_the_contract(tmp_path: Path) -> None:
    path = write_strategy("with-replay", tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.count("# replay: ") > 10
    path.write_text(text.replace("# replay: ", ""), encoding="utf-8")
    findings = check_strategy(plugins.resolve(f"{path}:WithReplay", plugins.CLIENT_STRATEGIES))
    assert [f for f in findings if f.passed is not True] == []
    assert findings[1].message.startswith("anchor, buffer, seen")


def test_the_template_is_tidy(tmp_path: Path) -> None:
    path = write_strategy("tidy", tmp_path)
    for command in (
        ["check", "--select", "E,F,W,I,B,D", "--ignore", "D107"],
        ["format", "--check"],
    ):
        options = ["--isolated", "--line-length", "100", "--no-cache", str(path)]
        pydocstyle = ["--config", "lint.pydocstyle.convention='google'"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *pydocstyle, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_existing_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("precious", encoding="utf-8")
    with pytest.raises(PluginError, match=r"mine\.py is there already"):
        write_strategy("mine", tmp_path)
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    "name",
    ["", "1st", "my strategy", "a/b", "../up", "größe", "none", "my--x-", "x.py", "-a"],
)
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match="can't be the name"):
        write_strategy(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["memory", "value-error", "torch", "random", "import", "client-strategy"]
)
def test_names_that_are_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match="another"):
        write_strategy(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="can't be written"):
        write_strategy("mine", tmp_path / "nowhere")
