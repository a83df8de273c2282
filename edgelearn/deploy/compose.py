"""A docker-compose file: one SuperLink, its devices, and a service that registers their keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from edgelearn.deploy import commands

_SECRETS, _STATE = PurePosixPath("/run/edgelearn"), PurePosixPath("/state")
_HEALTHY = (
    "import ssl, urllib.request as u; "
    "u.urlopen('https://127.0.0.1:8000/health', timeout=5, "
    f"context=ssl.create_default_context(cafile='{_SECRETS}/ca.crt'))"
)
_NODE_HEALTHY = "import urllib.request as u; u.urlopen('http://127.0.0.1:9094/health', timeout=5)"

_HEAD = """\
# A SuperLink and {num_devices} devices: TLS, registered keys, state in volumes.
#
#   edgelearn deploy init {name} --devices {num_devices}
#   docker compose{file} up --build --detach
#   FLWR_HOME=$PWD/{name}/flwr flwr run {name}/app --stream --run-config {name}/run.toml
#   docker compose{file} cp superlink:/state/runs/first first
#
# Written by edgelearn. The SuperLink's port is open on this machine only: whoever reaches it can
# start runs, and Flower asks for no password.
"""


def compose_text(
    num_devices: int, *, folder: str, name: str, context: str | None, file: str = ""
) -> str:
    """Return the text of a docker-compose file.

    Args:
        num_devices: Devices in the fleet.
        folder: Folder of the deployment, relative to the file.
        name: How the user calls this folder, for the comment.
        context: Source checkout to build the images from; None expects them to be there.
        file: How docker compose is told of the file, for the comment.
    """
    lines = [_HEAD.format(num_devices=num_devices, name=name, file=file)]
    lines += _service(
        "superlink",
        "server",
        context,
        commands.superlink(secrets=_SECRETS, state=_STATE, host="0.0.0.0"),  # noqa: S104
        {
            "ports": ["127.0.0.1:8000:8000"],
            "networks": ["fleet", "operator"],
            "volumes": [f"{folder}/superlink:{_SECRETS}:ro", f"superlink:{_STATE}"],
            "healthcheck": _health(_HEALTHY),
            "restart": "unless-stopped",
        },
        first=True,
    )
    lines += _service(
        "register",
        "server",
        context,
        [
            *("python", "-m", "edgelearn.deploy.register"),
            *("--keys", f"{_SECRETS}/keys"),
            *("--address", "superlink:8000"),
            *("--root-certificates", f"{_SECRETS}/ca.crt"),
            *("--home", "/tmp/flwr"),  # noqa: S108 - in a container of its own
        ],
        {
            "depends_on": {"superlink": {"condition": "service_healthy"}},
            "networks": ["fleet"],
            "volumes": [
                f"{folder}/ca.crt:{_SECRETS}/ca.crt:ro",
                f"{folder}/keys:{_SECRETS}/keys:ro",
            ],
            "restart": "no",
        },
    )
    for device in range(num_devices):
        lines += _service(
            f"device-{device}",
            "clients",
            context,
            commands.supernode(
                device, secrets=_SECRETS, state=_STATE / "device", server="superlink:8000"
            ),
            {
                "depends_on": {"register": {"condition": "service_completed_successfully"}},
                "networks": ["fleet"],
                "volumes": [
                    f"{folder}/device-{device}:{_SECRETS}:ro",
                    f"device-{device}:{_STATE}",
                ],
                "healthcheck": _health(_NODE_HEALTHY),
                # Flower refuses a node that comes back within a minute of having been killed.
                "restart": "unless-stopped",
                "mem_limit": "1g",
            },
        )
    lines += ["", "networks:", "  operator: {}", "  fleet: {internal: true}", "", "volumes:"]
    lines += [f"  {v}: {{}}" for v in ("superlink", *(f"device-{d}" for d in range(num_devices)))]
    return "\n".join(lines) + "\n"


def _service(
    name: str,
    side: str,
    context: str | None,
    command: Sequence[str],
    more: Mapping[str, object],
    *,
    first: bool = False,
) -> Iterator[str]:
    yield "services:" if first else ""
    yield f"  {name}:"
    if context is not None:
        yield f"    build: {_flow({'context': context, 'dockerfile': f'{side}/Dockerfile'})}"
    yield f"    image: edgelearn-{side}"
    yield "    command: ["
    yield from (f"      {line}," for line in _by_option(command))
    yield "    ]"
    common: dict[str, object] = {
        "user": "${EDGELEARN_UID:-1000}:${EDGELEARN_GID:-1000}",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "init": True,
    }
    for key, value in {**more, **common}.items():
        yield f"    {key}: {_flow(value)}"


def _by_option(command: Sequence[str]) -> list[str]:
    """Return the words of a command as YAML, each option on one line with its value."""
    lines: list[list[str]] = []
    for word in command:
        if word.startswith("-") or not lines or not lines[-1][0].startswith("-"):
            lines.append([word])
        else:
            lines[-1].append(word)
    return [", ".join(map(json.dumps, words)) for words in lines]


def _health(code: str) -> dict[str, object]:
    return {
        "test": ["CMD", "python", "-c", code],
        "interval": "10s",
        "timeout": "10s",
        "retries": 12,
        "start_period": "30s",
    }


def _flow(value: object) -> str:
    """Return a value as YAML on one line: JSON is YAML."""
    return json.dumps(value)
