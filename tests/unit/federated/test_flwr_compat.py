"""The private touch points of flwr still are what edgelearn takes them for."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode as FlowersCode

from edgelearn.federated import _flwr_compat as compat


def test_codes_are_flowers() -> None:
    assert compat.ErrorCode.RAISED == FlowersCode.CLIENT_APP_RAISED_EXCEPTION
    assert compat.ErrorCode.EXPIRED == FlowersCode.MESSAGE_UNAVAILABLE
    assert compat.ErrorCode.REPLY_EXPIRED == FlowersCode.REPLY_MESSAGE_UNAVAILABLE
    assert compat.ErrorCode.NODE_UNAVAILABLE == FlowersCode.NODE_UNAVAILABLE


def test_a_process_can_take_on_an_identity_and_name_its_messages() -> None:
    compat.assume_identity(77)
    message = Message(RecordDict({"config": ConfigRecord()}), 5, "train")
    assert message.metadata.run_id == 77
    compat.set_message_id(message, "abc")
    assert message.metadata.message_id == "abc"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "abc"
    assert reply.metadata.src_node_id == 5
    assert compat.empty_run(9).run_id == 9


def test_telemetry_and_the_look_for_updates_are_off() -> None:
    code = (
        "import edgelearn.federated.messages, os, flwr.supercore.telemetry as t\n"
        "assert os.environ['FLWR_DISABLE_UPDATE_CHECK'] == '1'\n"
        "print(t.FLWR_TELEMETRY_ENABLED)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0", done.stderr


def test_the_version_is_a_supported_one() -> None:
    minor = tuple(int(part) for part in importlib.metadata.version("flwr").split(".")[:2])
    assert (1, 41) <= minor < (1, 43)
