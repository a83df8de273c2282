"""Every touch point of flwr that is not public API; tested against each supported version.

- A message gets its id from the SuperLink; an in-process grid has to set it.
- Instruction messages read the identity of the running task from a process-wide class.
- `Grid.run` is a `Run`, for which there is no public constructor.
- Codes of errors in replies are not exported.
"""

from __future__ import annotations

import enum
import logging

import edgelearn  # noqa: F401 - switches Flower's telemetry off before flwr is imported

from flwr.app import Message  # isort: skip
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


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
