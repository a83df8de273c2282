"""Tell a SuperLink the keys of its devices: `python -m edgelearn.deploy.register --help`.

Run once before the devices start; a key that the SuperLink knows already is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgelearn.errors import EdgelearnError, RunError

_KNOWN = "already in use"


def register(keys: Path, connection: str) -> list[str]:
    """Register all public keys of a folder, under their file names.

    Args:
        keys: Folder with `device-<i>.pub`.
        connection: Name of the SuperLink in Flower's own configuration.

    Returns:
        The names that the SuperLink did not know before.

    Raises:
        RunError: If there are no keys, or the SuperLink does not take one.
    """
    found = sorted(keys.glob("*.pub"), key=lambda path: (len(path.name), path.name))
    if not found:
        raise RunError(f"{keys}: there are no public keys (*.pub) here")
    new = []
    flwr = Path(sys.executable).with_name("flwr")
    for path in found:
        done = subprocess.run(
            [str(flwr), "supernode", "register", str(path), connection, "--name", path.stem],
            capture_output=True,
            text=True,
            check=False,
        )
        said = f"{done.stdout}\n{done.stderr}".strip()
        if done.returncode == 0:
            new.append(path.stem)
        elif _KNOWN not in " ".join(said.split()):
            raise RunError(f"{path.name} was not registered: {said}")
    return new


def write_connection(home: Path, *, name: str, address: str, root_certificates: Path) -> None:
    """Write Flower's own configuration: where the SuperLink is, and whom to trust."""
    text = (
        f"[superlink]\ndefault = {json.dumps(name)}\n\n[superlink.{name}]\n"
        f"address = {json.dumps(address)}\n"
        f"root-certificates = {json.dumps(str(root_certificates.absolute()))}\n"
    )
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(text, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m edgelearn.deploy.register", description=__doc__)
    made.add_argument("--keys", type=Path, required=True, help="folder with the public keys")
    made.add_argument("--address", required=True, help="the SuperLink, host:port")
    made.add_argument("--root-certificates", type=Path, required=True, help="whom to trust, PEM")
    made.add_argument("--home", type=Path, required=True, help="FLWR_HOME to write and use")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 is success."""
    given = parser().parse_args(arguments)
    write_connection(
        given.home,
        name="edgelearn",
        address=given.address,
        root_certificates=given.root_certificates,
    )
    os.environ["FLWR_HOME"] = str(given.home.absolute())
    try:
        new = register(given.keys, "edgelearn")
    except EdgelearnError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"registered: {', '.join(new) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
