from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from edgelearn.cli import main
from edgelearn.doctor import examine
from edgelearn.fleet import native
from edgelearn.scenario.spec import ENGINES


def test_every_tier_is_named_and_one_is_chosen() -> None:
    found = examine()
    assert [tier.name for tier in found.tiers] == [*ENGINES[1:]]
    (chosen,) = (tier for tier in found.tiers if tier.is_chosen)
    assert chosen.rate is not None
    assert chosen.rate > 0
    assert all(tier.rate or tier.note for tier in found.tiers)


def test_without_kernels_it_says_so_and_another_tier_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def hidden(name: str, *rest: Any) -> Any:
        return None if name == "edgelearn_native" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setenv("COLUMNS", "200")
    assert not native.is_installed()
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # columns are as wide as the longest name
    assert "native missing: compiled training; pip install 'edgelearn[native]'" in out
    assert f"not native: {native.MISSING}" in out
    assert "can't run this scenario: edgelearn-native is not installed" in out
