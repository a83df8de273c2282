"""Every touch point of flwr that is not public API; tested against each supported version.

- A message gets its id from the SuperLink; an in-process grid has to set it.
- Instruction messages read the identity of the running task from a process-wide class.
- `Grid.run` is a `Run`, for which there is no public constructor.
- Codes of errors in replies are not exported, nor is the time that a message lives.
- Strategies build a message for each node in `_construct_messages`; a cohort needs the choice only.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence

import edgelearn  # noqa: F401 - switches Flower's telemetry off before flwr is imported

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict  # isort: skip
from flwr.app.constants import DEFAULT_TTL  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp.strategy import Strategy  # isort: skip
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

DEFAULT_TTL_S = float(DEFAULT_TTL)


class ErrorCode(enum.IntEnum):
    """Codes of errors in replies, as flwr numbers them."""

    RAISED = 2
    EXPIRED = 3
    REPLY_EXPIRED = 4
    NODE_UNAVAILABLE = 5


def assume_identity(run_id: int) -> None:
    """Let this process create instruction messages, as Flower's ServerApp process may."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = 1


def empty_run(run_id: int) -> Run:
    """Return the description of a run for `Grid.run`."""
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id."""
    message.metadata.__dict__["_message_id"] = message_id


def quieten() -> None:
    """Keep Flower's own log to warnings; edgelearn reports progress itself."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


def chosen_nodes(
    strategy: Strategy,
    hook: str,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
) -> tuple[list[int], RecordDict | None]:
    """Return the nodes that a strategy chooses in a hook, and what it would tell all of them.

    The hook runs as it is, but for the messages: building one for each node costs more than a
    small model's training. No content if it asks nobody.
    """
    nodes: list[int] = []
    contents: list[RecordDict] = []

    def construct(record: RecordDict, node_ids: Sequence[int], _type: str) -> list[Message]:
        nodes.extend(node_ids)
        contents.append(record)
        return []

    instance = vars(strategy)
    instance["_construct_messages"] = construct
    try:
        getattr(strategy, hook)(server_round, arrays, config, grid)
    finally:
        del instance["_construct_messages"]
    return nodes, contents[0] if nodes else None
