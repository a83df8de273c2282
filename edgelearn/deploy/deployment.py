"""Everything that a fleet needs, in one folder: what a machine gets lies in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelearn.deploy.bundle import write_app
from edgelearn.deploy.commands import SUPERLINK_PORT
from edgelearn.deploy.compose import compose_text
from edgelearn.deploy.keys import (
    Authority,
    write_certificate,
    write_node_key,
    write_private_key,
)
from edgelearn.deploy.register import write_connection
from edgelearn.errors import RunError
from edgelearn.files import write_atomic

CONNECTION = "edgelearn"
_HOSTS = ("localhost", "127.0.0.1", "superlink")

_RUN = """\
# What to run; every device needs the same scenario under this name or path.
scenario = "split-digits"
overrides = '{{"fleet.num_devices": {num_devices}, "fleet.cohort": {num_devices}}}'
# The run directory on the server. A run in it that was interrupted is resumed.
out = "/state/runs/first"
# Longest wait for the devices to come, and for the replies of a phase.
wait-s = 120.0
round-timeout-s = 600.0
"""


def init_deployment(
    directory: str | Path,
    *,
    num_devices: int = 2,
    hosts: Sequence[str] = (),
    port: int = SUPERLINK_PORT,
) -> Path:
    """Write the folder of a new deployment.

    ::

        ca.crt ca.key          whom all trust; the key signs further certificates, keep it offline
        superlink/             for the server: its certificate and key
        device-0/ ...          for each device: its key, and whom to trust
        keys/                  the devices' public keys, to be registered
        app/                   the Flower app: flwr run <directory>/app
        flwr/                  FLWR_HOME of the operator: where the SuperLink is
        run.toml               what to run: flwr run <directory>/app --run-config this
        docker-compose.yml     all of it on one machine

    Args:
        directory: Where; must not hold anything yet.
        num_devices: Devices in the fleet.
        hosts: More names and IP addresses by which devices reach the server; the first is the one
            that the operator uses.
        port: Port of the SuperLink.

    Returns:
        The folder.

    Raises:
        RunError: If the folder is not empty, or there is no device.
    """
    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty; keys are never overwritten, name another folder")
    if num_devices < 1:
        raise RunError(f"a fleet of {num_devices} devices; at least 1 is needed")
    write_atomic(folder / ".gitignore", b"*\n")  # keys do not belong into a repository
    authority = Authority.create()
    write_certificate(folder / "ca.crt", authority.certificate)
    write_private_key(folder / "ca.key", authority.key)
    certificate, key = authority.issue([*hosts, *(h for h in _HOSTS if h not in hosts)])
    write_certificate(folder / "superlink" / "ca.crt", authority.certificate)
    write_certificate(folder / "superlink" / "server.crt", certificate)
    write_private_key(folder / "superlink" / "server.key", key)
    for device in range(num_devices):
        own = folder / f"device-{device}"
        write_certificate(own / "ca.crt", authority.certificate)
        write_node_key(own / "node.key", folder / "keys" / f"device-{device}.pub")
    write_app(folder / "app")
    write_connection(
        folder / "flwr",
        name=CONNECTION,
        address=f"{hosts[0] if hosts else 'localhost'}:{port}",
        root_certificates=folder / "ca.crt",
    )
    write_atomic(folder / "run.toml", _RUN.format(num_devices=num_devices).encode())
    checkout = Path(__file__).resolve().parents[2]
    text = compose_text(
        num_devices,
        folder=".",
        name=folder.name,
        context=str(checkout) if (checkout / "server" / "Dockerfile").is_file() else None,
        file=f" -f {folder.name}/docker-compose.yml",
    )
    write_atomic(folder / "docker-compose.yml", text.encode())
    return folder
