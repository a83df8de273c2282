"""One virtual environment per peer, made from its pinned requirements when first needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness.paths import PEERS, VENVS
from harness.results import say

_VERSIONS = """
import importlib.metadata as m, json, sys
names = sys.argv[1:]
print(json.dumps({d.metadata["Name"].lower(): d.version for d in m.distributions()
                  if d.metadata["Name"].lower() in names}))
"""
_NAMED = ("torch", "numpy", "flwr", "ray", "pfl", "avalanche-lib")


def environment(peer: str) -> Path:
    """Return the folder of a peer's executables; make the environment if it is not there.

    Raises:
        RuntimeError: If its requirements can't be installed.
    """
    wanted, home = (PEERS / f"{peer}.txt").read_text(), VENVS / peer
    ready = home / ".ready"
    if ready.is_file() and ready.read_text() == wanted:
        return home / "bin"
    say(f"installing {peer} into {home} (once; a few minutes) ...")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    command = [*pip, "--disable-pip-version-check", "-r", str(PEERS / f"{peer}.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{peer} can't be installed: {done.stderr[-1500:]}")
    ready.write_text(wanted)
    return home / "bin"


def versions(peer: str) -> dict[str, str]:
    """Return the versions in a peer's environment that a result depends on."""
    command = [str(environment(peer) / "python"), "-c", _VERSIONS, *_NAMED]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
