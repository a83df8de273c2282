"""Names -> classes: built-ins, installed entry points, `module:Class` and `path/file.py:Class`.

Built-ins are entry points like anybody else's: what `pyproject.toml` declares is all there is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from edgelearn.errors import Fault, PluginError, nearest

CLIENT_STRATEGIES = "edgelearn.client_strategies"
RUNTIMES = "edgelearn.runtimes"
CODECS = "edgelearn.codecs"
ENTROPY = "+lzma"  # behind the name of a codec
NO_CODEC = "none"  # updates are sent as they are; nobody else can have that name
DATASETS = "edgelearn.datasets"
MODELS = "edgelearn.models"
AVALANCHE = "avalanche:"  # before the names of Avalanche's strategies and plug-ins
SERVER_STRATEGIES = "flower"  # names are Flower's own; there are no entry points


def names(group: str) -> tuple[str, ...]:
    """Return the sorted names that a plug-in group offers."""
    return tuple(sorted(_entries(group)))


def resolve(reference: str, group: str) -> Any:
    """Return the object behind a name, a `module:Class` or a `path/file.py:Class`.

    Args:
        reference: What the user wrote.
        group: The entry-point group in which plain names are looked up.

    Raises:
        PluginError: If nothing stands behind the reference, or importing it fails.
    """
    if ":" in reference:
        return _from_location(reference)
    found = _entries(group)
    if reference not in found:
        kind = group.rpartition(".")[2].replace("_", " ")
        raise PluginError(
            f"unknown name {reference!r} among the {kind}: {', '.join(sorted(found)) or 'none'}"
            f"{nearest(reference, found)}; or give module:Class or path/to/file.py:Class"
        )
    try:
        return found[reference].load()
    except Exception as error:  # whatever somebody else's module raises when it is imported
        raise PluginError(
            f"{reference!r} ({found[reference].value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def joined(reference: str) -> list[str]:
    """Return the parts of a reference that "+" joins; a file's path may hold one itself."""
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        with contextlib.suppress(PluginError):  # no such file: its parts may be there
            find_file(place)
            return [reference]
    return reference.split("+")


def argument_faults(kind: type[Any], arguments: Mapping[str, Any], table: str) -> list[Fault]:
    """Return what is wrong with keyword arguments, against the signature of a class."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        Fault(
            table,
            name,
            f"{kind.__name__} does not take it{nearest(name, parameters)}; "
            f"allowed: {', '.join(parameters) or 'nothing'}",
        )
        for name in arguments
        if name not in parameters
    ]


def _entries(group: str) -> Mapping[str, EntryPoint]:
    return _entries_in(group, tuple((place, _changed_at(place)) for place in sys.path))


def _changed_at(place: str) -> int:
    try:
        return Path(place).stat().st_mtime_ns
    except (OSError, ValueError):
        return 0


@functools.lru_cache(maxsize=32)
def _entries_in(group: str, _places: tuple[tuple[str, int], ...]) -> Mapping[str, EntryPoint]:
    """Look through all packages, which takes far longer than to see that none was installed."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}


def _from_location(reference: str) -> Any:
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute:
        raise PluginError(f"{reference!r}: expected module:Class or path/to/file.py:Class")
    module = _load_file(find_file(place)) if place.endswith(".py") else _import(place)
    if not hasattr(module, attribute):
        offered = [name for name in vars(module) if not name.startswith("_")]
        raise PluginError(f"{place} has no {attribute!r}{nearest(attribute, offered)}")
    return getattr(module, attribute)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise PluginError(
            f"module {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def find_file(place: str) -> Path:
    """Return the absolute path of a plug-in file.

    Raises:
        PluginError: If there is none.
    """
    try:
        path = Path(place).expanduser().resolve()
        is_there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no such home, too long a name, ...
        raise PluginError(f"no file {place!r}: {error}") from error
    if not is_there:
        raise PluginError(f"no file {path}")
    return path


def _load_file(path: Path) -> Any:
    # A stable name, so that worker processes that load the same file agree on the class.
    digest = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    name = f"edgelearn_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module
