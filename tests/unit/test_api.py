"""The public functions that scripts call."""

from __future__ import annotations

from typing import Any

import pytest

from edgelearn.api import check_plugins
from edgelearn.errors import ScenarioError
from edgelearn.testing.toy import toy_scenario


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"client": {"args": {"size": 1}}}, "[client.args] size: "),
        ({"wire": {"codec": "top-k", "args": {"shares": 1}}}, "[wire.args] shares: "),
        ({"wire": {"codec": "int4+lzma", "args": {"bits": 1}}}, "[wire.args] bits: "),
        ({"runtime": {"args": {"bits": 4}}}, "[runtime.args] bits: "),
        (
            {"fleet": {"runtime_args": {"phone-mid": {"bits": 4}}}},
            "[fleet.runtime_args] phone-mid: bits: ",
        ),
    ],
)
def test_arguments_of_every_plugin_are_checked(tables: dict[str, Any], told: str) -> None:
    check_plugins(toy_scenario())
    with pytest.raises(ScenarioError) as caught:
        check_plugins(toy_scenario(**tables))
    assert told in str(caught.value)
