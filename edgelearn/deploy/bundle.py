"""The Flower app that `flwr run` packs and sends: three lines a side, the rest is installed.

It has no dependencies of its own. Flower installs those of an app anew for every run; edgelearn and
torch are on devices and server already.
"""

from __future__ import annotations

from pathlib import Path

import edgelearn
from edgelearn.files import write_atomic

# Flower takes only keys that are declared here. `client_app` and `server_app` say what they mean.
_PYPROJECT = """\
[project]
name = "edgelearn-app"
version = "{version}"
description = "edgelearn on a Flower SuperLink; configuration only, the code is installed"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = []

[tool.flwr.app]
publisher = "edgelearn"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
scenario = ""
overrides = ""
out = ""
state-dir = ""
wait-s = 120.0
round-timeout-s = 600.0
"""

_SIDES = {
    "clients": ("What runs on a device.", "client_app"),
    "server": ("What runs in the middle.", "server_app"),
}


def files() -> dict[str, str]:
    """Return the app's files, path -> text."""
    out = {"pyproject.toml": _PYPROJECT.format(version=edgelearn.__version__)}
    for side, (title, factory) in _SIDES.items():
        out[f"{side}/__init__.py"] = f'"""{title}"""\n'
        out[f"{side}/app.py"] = (
            f'"""{title} Flower looks for `app`."""\n\n'
            f"from edgelearn.federated.{factory} import {factory}\n\n"
            f"app = {factory}()\n"
        )
    return out


def write_app(directory: Path) -> None:
    """Write the Flower app into a folder, for `flwr run <folder>`."""
    for name, text in files().items():
        write_atomic(directory / name, text.encode())
