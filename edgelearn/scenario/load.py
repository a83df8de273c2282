"""TOML -> Scenario, all faults reported at once; Scenario -> TOML; and where scenarios lie."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any

from edgelearn import plugins
from edgelearn.errors import Fault, PluginError, ScenarioError, nearest
from edgelearn.scenario import avalanche_names, consistency
from edgelearn.scenario.places import locate
from edgelearn.scenario.spec import Rule, Scenario

_MISSING = dataclasses.MISSING


def load(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Load a scenario by name or path.

    Args:
        source: A path to a TOML file, or the name of a built-in scenario.
        overrides: Values to replace, keyed "table.key", such as {"client.lr": 0.1}.

    Raises:
        ScenarioError: If the file is missing or has faults; all of them are listed.
    """
    path = find(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(str(path), [Fault("", "file", f"cannot be read: {error}")]) from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        fault = Fault("", "syntax", str(error), line=int(at[1]) if at else None)
        raise ScenarioError(str(path), [fault]) from error
    return from_dict(raw, overrides=overrides, source=str(path), text=text)


def from_dict(
    raw: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "scenario",
    text: str = "",
) -> Scenario:
    """Build a scenario from nested dictionaries; see `load`."""
    tables: dict[str, Any] = _copy(raw)
    faults: list[Fault] = []
    overridden = dict(overrides or {})
    for name, value in overridden.items():
        faults += _override(tables, name, value)
    values = _values(Scenario, tables, "", faults)
    faults += consistency.faults(values)
    faults += _pipeline_faults(values.get("compress", {}).get("pipeline"))
    if faults:
        origins = {name: f"--set {name}" for name in overridden}
        raise ScenarioError(source, locate(faults, text, origins))
    scenario: Scenario = _make(Scenario, values)
    return scenario


def _pipeline_faults(text: str | None) -> list[Fault]:
    if not text:
        return []
    from edgelearn.scenario.stages import faults_of  # here, as stages are checked by what is below

    return [Fault("compress", "pipeline", str(fault)) for fault in faults_of(text)]


def checked(kind: type[Any], raw: Mapping[str, Any], table: str, faults: list[Fault]) -> Any:
    """Return a dataclass made of a table, or None; what is wrong is added to `faults`."""
    before = len(faults)
    values = _values(kind, raw, table, faults)
    return None if len(faults) > before else _make(kind, values)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _override(tables: dict[str, Any], name: str, value: Any) -> Iterator[Fault]:
    *path, key = name.split(".")
    place: Any = tables
    for depth, part in enumerate(path):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            message = f"got {place!r}; only a table has a {key!r} to set"
            yield Fault(".".join(path[:depth]), part, message)
            return
    place[key] = value


def _values(
    kind: type[Any], raw: Mapping[str, Any], table: str, faults: list[Fault]
) -> dict[str, Any]:
    """Check a table; return its values, nested, None where there is a fault."""
    types = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in raw.items():
        if key not in known:
            what = "table" if isinstance(value, Mapping) else "key"
            faults.append(
                Fault(
                    table, key, f"unknown {what}{nearest(key, known)}; allowed: {', '.join(known)}"
                )
            )
    values: dict[str, Any] = {}
    for name, spec in known.items():
        inner = f"{table}.{name}" if table else name
        if dataclasses.is_dataclass(types[name]):
            value = raw.get(name, {})
            if not isinstance(value, Mapping):
                faults.append(Fault(table, name, f"expected a table, got {value!r}"))
                continue
            has_default = spec.default_factory is not _MISSING
            if name not in raw and not has_default:
                faults.append(Fault(table, name, f"the table [{inner}] is missing"))
                continue
            values[name] = _values(typing.cast("type[Any]", types[name]), value, inner, faults)
        elif name in raw and (entry := _entry_of(types[name])) is not None:
            values[name] = _entries(entry, raw[name], inner, faults)
        elif name in raw:
            rule: Rule = spec.metadata["rule"]
            values[name] = _check(raw[name], types[name], rule, table, name, faults)
        elif spec.default is _MISSING and spec.default_factory is _MISSING:
            help_text = spec.metadata["rule"].help
            faults.append(Fault(table, name, f"is missing ({help_text})"))
    return values


def _entry_of(expected: Any) -> type[Any] | None:
    """Return what a table of tables holds under each name; None for anything else."""
    inner = typing.get_args(expected)[-1:]
    found = inner[0] if inner else None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _entries(kind: type[Any], raw: Any, table: str, faults: list[Fault]) -> dict[str, Any]:
    """Check a table of tables; return the values of each that is a table."""
    outer, _, key = table.rpartition(".")
    if not isinstance(raw, Mapping):
        faults.append(Fault(outer, key, f"expected a table of tables, got {raw!r}"))
        return {}
    odd = [name for name, value in raw.items() if not isinstance(value, Mapping)]
    faults += [Fault(table, name, f"expected a table, got {raw[name]!r}") for name in odd]
    return {
        name: _values(kind, value, f"{table}.{name}", faults)
        for name, value in raw.items()
        if name not in odd
    }


def _make(kind: type[Any], values: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for name, value in values.items():
        entry = _entry_of(types[name])
        if dataclasses.is_dataclass(types[name]):
            made[name] = _make(typing.cast("type[Any]", types[name]), value)
        elif entry is not None:
            made[name] = MappingProxyType({n: _make(entry, v) for n, v in value.items()})
        else:
            made[name] = value
    return kind(**made)


def _check(value: Any, expected: Any, rule: Rule, table: str, key: str, faults: list[Fault]) -> Any:
    def fault(message: str) -> Any:
        faults.append(Fault(table, key, message))

    if typing.get_origin(expected) is UnionType:  # str | tuple[str, ...]
        if isinstance(value, list | tuple):
            odd_items = [item for item in value if not isinstance(item, str)]
            if odd_items:
                return fault(f"got {odd_items[0]!r} in a list of texts ({rule.help})")
            return tuple(value)
        expected = str
    if typing.get_origin(expected) is not None:  # Mapping[str, ...]
        if not isinstance(value, Mapping):
            return fault(f"expected a table, got {value!r} ({rule.help})")
        odd = {k: o for k, v in value.items() if (o := _not_plain(v)) is not None}
        for name, seen in odd.items():
            message = f"got {seen!r}; a text, a finite number, true, false, a list or a table"
            faults.append(Fault(f"{table}.{key}", name, f"{message} is expected"))
        return None if odd else MappingProxyType({k: _freeze(v) for k, v in value.items()})
    if expected is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not expected:
        return fault(f"expected {_TYPE_NAMES[expected]}, got {value!r} ({rule.help})")
    if rule.choices and value not in rule.choices:
        return fault(
            f"got {value!r}{nearest(value, rule.choices)}; allowed: {', '.join(rule.choices)}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return fault(f"got {value}; a finite number is expected ({rule.help})")
        if rule.minimum is not None and value < rule.minimum:
            return fault(f"got {value}; at least {rule.minimum:.15g} is allowed ({rule.help})")
        if rule.maximum is not None and value > rule.maximum:
            return fault(f"got {value}; at most {rule.maximum:.15g} is allowed ({rule.help})")
        if rule.above is not None and value <= rule.above:
            return fault(f"got {value}; must be above {rule.above:.15g} ({rule.help})")
    if rule.plugins is not None:
        if rule.plugins == plugins.CODECS:
            return _check_codec(value, fault)
        if rule.plugins != plugins.CLIENT_STRATEGIES:
            return _check_reference(value, rule.plugins, fault)
        parts = [_check_reference(v, rule.plugins, fault) for v in plugins.joined(value)]
        return None if None in parts else "+".join(parts)
    return value


def _check_codec(value: str, fault: Any) -> Any:
    name = value.removesuffix(plugins.ENTROPY)
    if name == plugins.NO_CODEC and name != value:
        return fault(f"got {value!r}; there is nothing to compress: name a codec (int4+lzma)")
    found = _check_reference(name, plugins.CODECS, fault)
    return None if found is None else found + value[len(name) :]


def _check_reference(value: str, group: str, fault: Any) -> Any:
    if ":" not in value:
        if group == plugins.SERVER_STRATEGIES:  # Flower knows its own names, once imported
            return value
        offered, near, more = plugins.names(group), plugins.names(group), ""
        if group == plugins.CODECS:
            near = (plugins.NO_CODEC, *offered, *(f"{name}{plugins.ENTROPY}" for name in offered))
            offered = (plugins.NO_CODEC, *offered)
            more = f"; behind one of them {plugins.ENTROPY}, which compresses its messages"
        if value not in offered:
            return fault(
                f"unknown name {value!r}{nearest(value, near)}; allowed: "
                f"{', '.join(offered)}, module:Class or path/to/file.py:Class{more}"
            )
        return value
    prefix = ""
    if value.startswith(plugins.AVALANCHE) and group == plugins.CLIENT_STRATEGIES:
        prefix, value = plugins.AVALANCHE, value.removeprefix(plugins.AVALANCHE)
        if (wrong := avalanche_names.fault(value)) is not None:
            return fault(wrong)
    place = value.rpartition(":")[0]
    if place.endswith(".py"):
        try:
            return f"{prefix}{plugins.find_file(place)}:{value.rpartition(':')[2]}"
        except PluginError as error:
            return fault(str(error))
    return f"{prefix}{value}"


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _not_plain(value: Any) -> Any:
    """Return what in an argument a scenario can't hold (such as a date or NaN), or None."""
    if isinstance(value, Mapping | list | tuple):
        items = value.values() if isinstance(value, Mapping) else value
        return next((odd for item in items if (odd := _not_plain(item)) is not None), None)
    is_plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return None if is_plain else value


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({k: _freeze(v) for k, v in value.items()})
    if isinstance(value, list):
        return tuple(_freeze(v) for v in value)
    return value


# -- where scenarios lie ---------------------------------------------------------------------------


def folder() -> Path:
    """Return the folder of built-in scenarios: in the wheel, or beside a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_scenarios", package.parent / "scenarios"):
        if candidate.is_dir():
            return candidate
    raise ScenarioError("built-in scenarios", [Fault("", "folder", f"none beside {package}")])


def built_in() -> dict[str, Path]:
    """Return the built-in scenarios, name -> path, sorted."""
    return {path.stem: path for path in sorted(folder().glob("*.toml"))}


def find(source: str | Path) -> Path:
    """Return the path of a scenario given by name or path.

    Raises:
        ScenarioError: If there is none, naming the nearest.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # what can't be a path is a name
        path = Path(source).expanduser()
        if path.is_file():
            return path
    known = built_in()
    if str(source) in known:
        return known[str(source)]
    close = nearest(Path(source).stem, known)
    raise ScenarioError(
        str(source),
        [
            Fault(
                "",
                "scenario",
                f"neither a file nor a built-in scenario{close}; built in: {', '.join(known)}",
            )
        ],
    )


def to_toml(scenario: Scenario) -> str:
    """Return the scenario as TOML, complete with defaults; `load` gives an equal one back."""
    plain = scenario.as_dict()
    lines = [f"{k} = {_toml(v)}" for k, v in plain.items() if not isinstance(v, dict)]
    for table, values in plain.items():
        if isinstance(values, dict):
            lines += _toml_table(table, values)
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Return a plain value as TOML writes it on one line."""
    return _toml(value)


def _toml_table(name: str, values: Mapping[str, Any]) -> list[str]:
    lines = ["", f"[{name}]"]
    lines += [f"{_key(k)} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _toml_table(f"{name}.{_key(key)}", value)
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):  # only within a list
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)
