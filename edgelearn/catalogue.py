"""`edgelearn strategies`: what there is to learn with, and what each costs in a scenario."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from edgelearn import plugins
from edgelearn.api import with_client
from edgelearn.device.learners import make_learner
from edgelearn.errors import ScenarioError
from edgelearn.fleet.plan import make_plan
from edgelearn.scenario.load import load
from edgelearn.scenario.spec import Scenario
from edgelearn.scenario.world import build


@dataclass(frozen=True, slots=True)
class Entry:
    """A client strategy in a scenario, with its default arguments.

    Attributes:
        name: Its name.
        summary: The first line of its documentation.
        memory_bytes: What a device remembers between and within rounds, stored samples included.
        sent_bytes: What an update holds beside that of the network.
        engine: The tier that would train it here.
        obstacle: Why it can't learn this scenario, with no costs then; empty if it can.
    """

    name: str
    summary: str
    memory_bytes: int = 0
    sent_bytes: int = 0
    engine: str = ""
    obstacle: str = ""


def catalogue(scenario: Scenario | str = "split-digits") -> list[Entry]:
    """Return all installed client strategies, by name.

    Args:
        scenario: What they are asked to learn; its own strategy keeps its arguments.

    Raises:
        ScenarioError: If the scenario is faulty.
    """
    if isinstance(scenario, str):
        scenario = load(scenario)
    entries = []
    for name in plugins.names(plugins.CLIENT_STRATEGIES):
        world = build(with_client(scenario, name))
        kind = plugins.resolve(name, plugins.CLIENT_STRATEGIES)
        summary = (inspect.getdoc(kind) or "").partition("\n")[0]
        try:
            learner = make_learner(world)
        except ScenarioError as error:
            entries.append(Entry(name, summary, obstacle=error.faults[0].message))
            continue
        layout = learner.model.layout
        entries.append(
            Entry(
                name,
                summary,
                learner.memory_bytes,
                4 * (layout.size - layout.num_network),
                make_plan(world, learner).tier,
            )
        )
    return entries
