"""The compose file: Flower's own parsers understand its commands, and what they name is there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import parse_config_args
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from edgelearn.deploy import bundle, register
from edgelearn.deploy.compose import compose_text
from edgelearn.deploy.deployment import init_deployment
from edgelearn.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {
    "flower-superlink": _parse_args_run_superlink,
    "flower-supernode": _parse_args_run_supernode,
}


def services(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return found


def parse(command: list[str]) -> argparse.Namespace:
    """Parse a command as the program itself does; an unknown flag ends in SystemExit."""
    if command[:3] == ["python", "-m", "edgelearn.deploy.register"]:
        return register.parser().parse_args(command[3:])
    return PARSERS[command[0]]().parse_args(command[1:])


def test_the_file_in_the_repository_is_what_the_code_writes() -> None:
    text = compose_text(2, folder="./fleet", name="fleet", context=".")
    assert (ROOT / "docker-compose.yml").read_text() == text


def test_every_command_is_understood() -> None:
    found = services(ROOT / "docker-compose.yml")
    assert list(found) == ["superlink", "register", "device-0", "device-1"]
    server = parse(found["superlink"]["command"])
    assert server.enable_supernode_auth
    assert not server.insecure
    assert not server.runtime_dependency_install
    assert server.host == "0.0.0.0"
    for device in range(2):
        node = parse(found[f"device-{device}"]["command"])
        assert not node.insecure
        assert node.superlink == "superlink:8000"
        config = parse_config_args([node.node_config])
        assert config == {"partition-id": device, "state-dir": "/state/device"}
    parse(found["register"]["command"])
    with pytest.raises(SystemExit):
        parse([*found["superlink"]["command"], "--no-such-flag"])


def test_secrets_are_mounted_where_the_commands_look(tmp_path: Path) -> None:
    folder = init_deployment(tmp_path / "fleet", num_devices=3)
    found = services(folder / "docker-compose.yml")
    assert len(found) == 5
    for service in found.values():
        mounts = dict(volume.split(":")[:2][::-1] for volume in service["volumes"])
        for word in service["command"]:
            inside = re.match(r"(/run/edgelearn)(/.+)", word)
            if inside:
                exact = mounts.get(word)
                host = folder / (exact or f"{mounts[inside[1]]}{inside[2]}")
                assert host.exists(), word
        assert service["user"].startswith("${EDGELEARN_UID:-1000}")
        dockerfile = service["build"]["dockerfile"]
        assert (ROOT / dockerfile).is_file()


def test_only_the_operator_reaches_the_port() -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    published = [s["ports"] for s in document["services"].values() if "ports" in s]
    assert published == [["127.0.0.1:8000:8000"]]
    assert document["networks"]["fleet"]["internal"]


def test_images_do_not_run_as_root() -> None:
    for side in ("clients", "server"):
        text = (ROOT / side / "Dockerfile").read_text()
        assert re.search(r"^FROM python:3\.12-slim$", text, re.MULTILINE)
        assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
        assert "FLWR_TELEMETRY_ENABLED=0" in text


def test_a_deployment_has_all_that_is_needed(tmp_path: Path) -> None:
    folder = init_deployment(tmp_path / "fleet", num_devices=2, hosts=["fleet.example"])
    for device in range(2):
        private = load_ssh_private_key(
            (folder / f"device-{device}" / "node.key").read_bytes(), password=None
        )
        public = load_ssh_public_key((folder / "keys" / f"device-{device}.pub").read_bytes())
        assert private.public_key() == public
    for path in (*folder.rglob("*.key"), folder / "ca.key"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert 'address = "fleet.example:8000"' in (folder / "flwr" / "config.toml").read_text()
    assert parse_config_args([str(folder / "run.toml")])["scenario"] == "split-digits"
    with pytest.raises(RunError, match="keys are never overwritten"):
        init_deployment(folder)
    with pytest.raises(RunError, match="at least 1 is needed"):
        init_deployment(tmp_path / "none", num_devices=0)


def test_flower_accepts_the_app(tmp_path: Path) -> None:
    bundle.write_app(tmp_path / "app")
    config, warnings = load_and_validate(tmp_path / "app" / "pyproject.toml")
    assert not warnings
    assert config["project"]["dependencies"] == []  # nothing to install for a run
    run = parse_config_args([str(init_deployment(tmp_path / "fleet") / "run.toml")])
    assert set(run) <= set(config["tool"]["flwr"]["app"]["config"])


def test_the_apps_in_the_repository_are_those_that_are_sent() -> None:
    for name, text in bundle.files().items():
        if name != "pyproject.toml":
            assert (ROOT / name).read_text() == text
