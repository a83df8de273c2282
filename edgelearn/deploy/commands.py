"""Command lines of a SuperLink and its SuperNodes, for containers and for bare processes."""

from __future__ import annotations

from pathlib import PurePath

SUPERLINK_PORT = 8000
SUPERNODE_PORT = 9094

# Flower reports usage and looks for updates unless told otherwise before it is imported.
ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def superlink(
    *,
    secrets: PurePath,
    state: PurePath,
    host: str = "127.0.0.1",
    port: int = SUPERLINK_PORT,
) -> list[str]:
    """Return the command of the SuperLink: TLS, known nodes only, nothing installed at run time.

    Args:
        secrets: Folder with `ca.crt`, `server.crt` and `server.key`.
        state: Folder for its database.
        host: Address to listen on.
        port: Port to listen on.
    """
    return [
        "flower-superlink",
        *("--host", host),
        *("--port", str(port)),
        *("--ssl-ca-certfile", str(secrets / "ca.crt")),
        *("--ssl-certfile", str(secrets / "server.crt")),
        *("--ssl-keyfile", str(secrets / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(state / "superlink.db")),
    ]


def supernode(
    device: int,
    *,
    secrets: PurePath,
    state: PurePath,
    server: str,
    port: int = SUPERNODE_PORT,
) -> list[str]:
    """Return the command of a device's SuperNode.

    Args:
        device: Index of the device in the fleet.
        secrets: Folder with `ca.crt` and `node.key`.
        state: Folder in which the device keeps what it has learned.
        server: Address of the SuperLink, host:port.
        port: Port on which its own processes reach it, on loopback.
    """
    return [
        "flower-supernode",
        *("--superlink", server),
        *("--root-certificates", str(secrets / "ca.crt")),
        *("--auth-supernode-private-key", str(secrets / "node.key")),
        *("--port", str(port)),
        *("--node-config", f'partition-id={device} state-dir="{state}"'),
    ]
