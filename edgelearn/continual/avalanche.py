"""Avalanche (avalanche-lib 0.6), met here and nowhere else.

This is the only file that imports it, and only when something of it is asked for: the import costs
0.8 GiB of memory. What a device runs is in `avalanche_client`.

Reference: Carta, Pellegrini, Cossu, Hemati, Lomonaco, "Avalanche: A PyTorch Library for Deep
Continual Learning", JMLR 24, 2023, arXiv:2302.01766.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from edgelearn import plugins
from edgelearn.errors import ExtraMissingError, Fault, ScenarioError, StrategyError, nearest
from edgelearn.scenario import avalanche_names
from edgelearn.scenario.world import World

# What a strategy gets from the scenario, not from its arguments.
GIVEN = {
    "model": "the [model] table",
    "optimizer": "client.optimizer, lr, momentum and weight_decay",
    "criterion": "cross-entropy, always",
    "train_mb_size": "client.batch_size",
    "train_epochs": "client.epochs",
    "eval_mb_size": "the [evaluate] table",
    "eval_every": "the [evaluate] table",
    "peval_mode": "the [evaluate] table",
    "evaluator": "the [evaluate] table",
    "device": "the processor, always",
}
# What holds the samples that a strategy or plug-in takes in when an experience begins.
TAKES_IN = {"ER_ACE": "storage_policy", "Cumulative": "dataset", "GDumbPlugin": "storage_policy"}
# What counts the samples of an experience when it begins.
COUNTS = ("CWRStar", "CWRStarPlugin")
MASKED = -1e4  # a logit that no softmax sees; -inf would be NaN in a squared difference


@cache
def library() -> SimpleNamespace:
    """Import Avalanche.

    Raises:
        ExtraMissingError: If it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the 4,000 modules that it imports: theirs to mend
        try:
            importlib.import_module("avalanche")
        except ModuleNotFoundError as error:
            if error.name != "avalanche":
                raise
            raise ExtraMissingError(
                package="avalanche-lib", extra="avalanche", needed_for="what begins with avalanche:"
            ) from None
        named = {
            "benchmarks": "avalanche.benchmarks",
            "utils": "avalanche.benchmarks.utils",
            "attributes": "avalanche.benchmarks.utils.data_attribute",
            "supervised": "avalanche.training.supervised",
            "plugins": "avalanche.training.plugins",
            "core": "avalanche.core",
            "models": "avalanche.models",
            "modules": "avalanche.models.dynamic_modules",
            "templates": "avalanche.training.templates.base",
        }
        return SimpleNamespace(**{k: importlib.import_module(v) for k, v in named.items()})


@cache
def offered() -> dict[str, type[Any]]:
    """Return the strategies and plug-ins that Avalanche exports, by name."""
    lib = library()
    wanted = (lib.templates.BaseTemplate, lib.core.BasePlugin)
    bases = (*wanted, lib.core.SupervisedPlugin)
    return {
        name: value
        for module in (lib.supervised, lib.plugins)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, wanted) and value not in bases
    }


def find(name: str, reference: str) -> type[Any]:
    """Return the class of a strategy or plug-in.

    Args:
        name: One of Avalanche's, or `module:Class` or `file.py:Class` of one's own.
        reference: What the user wrote, for errors.

    Raises:
        PluginError: If nothing stands at the place.
        ScenarioError: If there is none of that name, or it does not work here.
    """
    lib = library()
    if ":" in name:
        found = plugins.resolve(name, plugins.CLIENT_STRATEGIES)
    elif (wrong := avalanche_names.fault(name)) is not None:
        raise ScenarioError(reference, [Fault("client", "strategy", wrong)])
    else:
        found = offered()[name]
    if not isinstance(found, type) or not issubclass(
        found, (lib.templates.BaseTemplate, lib.core.BasePlugin)
    ):
        message = f"{name} is neither a strategy (BaseTemplate) nor a plug-in of Avalanche"
        raise ScenarioError(reference, [Fault("client", "strategy", message)])
    return found


def is_plugin(kind: type[Any]) -> bool:
    """Whether a class is a plug-in, to be run by plain fine-tuning, and not a strategy."""
    return issubclass(kind, library().core.BasePlugin)


def argument_faults(kind: type[Any], arguments: Mapping[str, Any], table: str) -> list[Fault]:
    """Return what is wrong with the arguments of a strategy or plug-in."""
    own = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in (*GIVEN, "plugins")
    }
    faults = []
    for name in arguments:
        if name in GIVEN:
            faults.append(Fault(table, name, f"is given by {GIVEN[name]}"))
        elif name not in own:
            allowed = ", ".join(own) or "nothing"
            message = f"{kind.__name__} does not take it{nearest(name, own)}; allowed: {allowed}"
            faults.append(Fault(table, name, message))
    faults += [
        Fault(table, name, f"is missing; {kind.__name__} needs it")
        for name, parameter in own.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    return faults


def build(
    kind: type[Any],
    arguments: Mapping[str, Any],
    beside: Sequence[Any],
    given: Mapping[str, Any],
) -> Any:
    """Build a strategy.

    Args:
        kind: Its class, or that of a plug-in, which `Naive` then runs.
        arguments: Its own arguments.
        beside: Plug-ins that run beside it.
        given: The network, optimizer and so on.
    """
    lib = library()
    more = list(beside)
    if is_plugin(kind):
        more.insert(0, build_plugin(kind, arguments, given["model"]))
        kind, arguments = lib.supervised.Naive, {}
    parameters = inspect.signature(kind).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    fitting = {k: v for k, v in given.items() if takes_all or k in parameters}
    return kind(plugins=more, **fitting, **copy.deepcopy(dict(arguments)))


def build_plugin(kind: type[Any], arguments: Mapping[str, Any], network: nn.Module) -> Any:
    """Build a plug-in; those that ask for the network get it."""
    given = {"model": network} if "model" in inspect.signature(kind).parameters else {}
    return kind(**given, **copy.deepcopy(dict(arguments)))


def taken_in(strategy: Any) -> dict[tuple[int, str], Any]:
    """Return what took in samples when the experience began, by who holds it.

    That is the place among the plug-ins, or -1 for the strategy itself, and the attribute.
    """
    lib = library()
    found = {}
    for place, holder in enumerate((strategy, *strategy.plugins), start=-1):
        for name, attribute in TAKES_IN.items():
            kind = getattr(lib.supervised, name, None) or getattr(lib.plugins, name)
            if isinstance(holder, kind):
                found[place, attribute] = getattr(holder, attribute)
    return found


def put_in(strategy: Any, held: Mapping[tuple[int, str], Any]) -> None:
    """Give a strategy and its plug-ins what `taken_in` returned."""
    for (place, attribute), value in held.items():
        setattr(strategy if place < 0 else strategy.plugins[place], attribute, value)


def no_evaluation() -> Any:
    """Return an evaluator that measures nothing: edgelearn does, with the model that is served."""
    return library().plugins.EvaluationPlugin(collect_all=False)


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Keep what Avalanche says of itself from a user who can't change it.

    It announces at each call that a function of its own is deprecated, whatever the filters say,
    and changes them for the whole process. Other warnings come through.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", "No loggers specified")
        yield
    for warning in caught:
        is_own = f"{os.sep}avalanche{os.sep}" in warning.filename
        if not (is_own and issubclass(warning.category, DeprecationWarning)):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


# -- data ------------------------------------------------------------------------------------------


def dataset(x: Tensor, labels: Sequence[int], tasks: Sequence[int]) -> Any:
    """Return a data set that knows classes and tasks: only such a one suits every strategy.

    Args:
        x: Inputs [n, ...].
        labels: [n].
        tasks: Task of each sample [n]; 0 where there are none.
    """
    pairs = TensorDataset(x, torch.tensor(labels, dtype=torch.int64))
    make = library().utils._make_taskaware_classification_dataset
    return make(pairs, targets=list(labels), task_labels=list(tasks))


def reduce_dataset(data: Any) -> tuple[Any, ...]:
    """Tell how a data set is stored: its samples as tensors, and what it knows of each of them.

    A subset of Avalanche's refers to all that it was taken from; this holds what is in it.
    """
    if len(data) == 0:
        return _empty_dataset, ()
    items = [data[index] for index in range(len(data))]
    x = torch.stack([torch.as_tensor(item[0]) for item in items])
    known = {a.name: (a.use_in_getitem, list(a)) for a in data._data_attributes.values()}
    labels = [int(y) for y in known.pop("targets")[1]]
    tasks = [int(t) for t in known.pop("targets_task_labels")[1]]
    return _dataset_again, (x, labels, tasks, known)


def _empty_dataset() -> Any:
    return library().utils.AvalancheDataset([])


def _dataset_again(
    x: Tensor, labels: list[int], tasks: list[int], known: Mapping[str, tuple[bool, list[Any]]]
) -> Any:
    plain = dataset(x, labels, tasks)
    if not known:
        return plain
    lib = library()
    attributes = [
        lib.attributes.DataAttribute(values, name, use_in_getitem=in_batch)
        for name, (in_batch, values) in known.items()
    ]
    return lib.utils.make_avalanche_dataset(plain, data_attributes=attributes)


def experience(data: Any, index: int, seen: Sequence[int]) -> Any:
    """Return what a strategy is given as its experience.

    Args:
        data: A `dataset`.
        index: How many experiences there were before.
        seen: Classes of these.
    """
    made = library().benchmarks.DatasetExperience(dataset=data, current_experience=index)
    made.origin_stream = SimpleNamespace(name="train", benchmark=None)  # some ask for its name
    _describe(made, seen)
    return made


def _describe(made: Any, seen: Sequence[int]) -> None:
    made.task_labels = sorted(int(task) for task in made.dataset.targets_task_labels.uniques)
    made.task_label = made.task_labels[0]
    made.classes_in_this_experience = sorted(int(y) for y in made.dataset.targets.uniques)
    made.previous_classes = sorted(set(seen))
    made.classes_seen_so_far = sorted({*seen, *made.classes_in_this_experience})


def task_masked(network: nn.Module, masks: Mapping[int, Tensor]) -> nn.Module:
    """Return a network that answers within the classes of each sample's task.

    Args:
        network: Logits of all classes.
        masks: Classes that a task allows [C], bool, by its label.
    """
    module: nn.Module = _task_masked_class()()
    module.network = network
    vars(module)["masks"] = dict(masks)
    return module


@cache
def _task_masked_class() -> type[nn.Module]:
    missing = object()

    def single(self: Any, x: Tensor, task_label: int) -> Tensor:
        logits: Tensor = self.network(x)
        return logits.masked_fill(~self.masks[task_label], MASKED)

    def forward(self: Any, x: Tensor, task_labels: Any = missing) -> Any:
        if task_labels is missing:
            raise StrategyError(
                "this strategy of Avalanche asks for logits without saying of which task: it can't "
                "learn a task-incremental stream"
            )
        if task_labels is None:
            return self.forward_all_tasks(x)
        if isinstance(task_labels, int):
            return single(self, x, task_labels)
        allowed = torch.stack([self.masks[int(task)] for task in task_labels])
        return self.network(x).masked_fill(~allowed, MASKED)

    base = library().modules.MultiTaskModule
    members = {"forward": forward, "forward_single_task": single, "__module__": __name__}
    made: type[nn.Module] = type("TaskMasked", (base,), members)
    return made


def as_avalanche(world: World, device: int) -> Any:
    """Return a device's stream as a benchmark of Avalanche.

    It has the streams `train` and `test`, with one experience of task-aware data for each position
    of the device's stream. Task labels are the experience's id in task-incremental streams, else 0.

    Args:
        world: A scenario made concrete: `edgelearn.scenario.world.build(scenario)`.
        device: Index of the device in the fleet.

    Raises:
        ScenarioError: If the device has no sample of an experience: Avalanche has no empty ones.
    """
    lib, stream = library(), world.stream
    has_tasks = world.scenario.stream.kind == "task-incremental"
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for position in range(stream.num_experiences):
        found = stream.experience(device, position)
        both = {
            "train": world.train_samples(device, position),
            "test": world.test_samples(device, found.id),
        }
        for name, samples in both.items():
            if len(samples) == 0:
                message = f"device {device} has no {name} samples at position {position}"
                raise ScenarioError(world.scenario.name, [Fault("partition", "kind", message)])
            task = found.id if has_tasks else 0
            labels = samples.labels.tolist()
            parts[name].append(dataset(samples.batch().x, labels, [task] * len(labels)))
    benchmark = lib.benchmarks.benchmark_from_datasets(**parts)
    for name in parts:
        seen: list[int] = []
        for made in benchmark.streams[name]:
            _describe(made, seen)
            seen += made.classes_in_this_experience
    return benchmark
