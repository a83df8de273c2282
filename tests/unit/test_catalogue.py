"""What there is to learn with, and what each costs."""

from __future__ import annotations

from edgelearn import plugins
from edgelearn.catalogue import catalogue
from edgelearn.cli import main


def test_every_installed_strategy_is_listed_with_what_it_costs() -> None:
    entries = {entry.name: entry for entry in catalogue()}
    assert tuple(entries) == plugins.names(plugins.CLIENT_STRATEGIES)
    assert entries["naive"].memory_bytes == 0
    assert entries["naive"].sent_bytes == 0
    network = 4 * 4810  # split-digits: 64-64-10
    assert entries["ewc"].memory_bytes == 2 * network + 4
    assert all(entry.summary.endswith(".") for entry in entries.values())


def test_the_command_prints_a_line_for_each(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["strategies"]) == 0
    out = capsys.readouterr().out
    assert "replay" in out
    assert "1.4 KiB" in out
