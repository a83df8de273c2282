"""TOML -> Scenario, with every fault reported at once; Scenario -> TOML; and where scenarios lie."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelearn import plugins
from edgelearn.errors import Fault, PluginError, ScenarioError, nearest
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
    text = path.read_text(encoding="utf-8")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(str(path), [Fault("", "syntax", str(error))]) from error
    return from_dict(raw, overrides=overrides, source=str(path), text=text)


def from_dict(
    raw: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "scenario",
    text: str = "",
) -> Scenario:
    """Build a scenario from nested dictionaries; see `load`."""
    tables = {key: dict(v) if isinstance(v, Mapping) else v for key, v in raw.items()}
    overridden = dict(overrides or {})
    for name, value in overridden.items():
        *path, key = name.split(".")
        place: Any = tables
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                fault = Fault(".".join(path), key, f"{part!r} is a value, not a table")
                raise ScenarioError(f"{source} with --set {name}", [fault])
        place[key] = value
    faults: list[Fault] = []
    scenario = _build(Scenario, tables, "", faults)
    if not faults:
        faults += _cross_checks(scenario)
    if faults:
        located = [
            dataclasses.replace(fault, line=_line_of(text, fault.table, fault.key))
            for fault in faults
        ]
        raise ScenarioError(source, located)
    return scenario


def _build(kind: type[Any], raw: Mapping[str, Any], table: str, faults: list[Fault]) -> Any:
    types = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in known:
            allowed = ", ".join(known)
            faults.append(
                Fault(table, key, f"unknown key{nearest(key, known)}; allowed: {allowed}")
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
            values[name] = _build(typing.cast("type[Any]", types[name]), value, inner, faults)
        elif name in raw:
            rule: Rule = spec.metadata["rule"]
            values[name] = _check(raw[name], types[name], rule, table, name, faults)
        elif spec.default is _MISSING and spec.default_factory is _MISSING:
            help_text = spec.metadata["rule"].help
            faults.append(Fault(table, name, f"is missing ({help_text})"))
    return kind(**values) if not faults else None


def _check(
    value: Any, expected: Any, rule: Rule, table: str, key: str, faults: list[Fault]
) -> Any:
    def fault(message: str) -> Any:
        faults.append(Fault(table, key, message))

    if typing.get_origin(expected) is not None:  # Mapping[str, ...]
        if not isinstance(value, Mapping):
            return fault(f"expected a table, got {value!r} ({rule.help})")
        return MappingProxyType({k: _freeze(v) for k, v in value.items()})
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not expected:
        return fault(f"expected {_TYPE_NAMES[expected]}, got {value!r} ({rule.help})")
    if rule.choices and value not in rule.choices:
        return fault(
            f"got {value!r}{nearest(value, rule.choices)}; allowed: {', '.join(rule.choices)}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            return fault(f"got {value}; a finite number is expected")
        if rule.minimum is not None and value < rule.minimum:
            return fault(f"got {value}; at least {rule.minimum:g} is allowed ({rule.help})")
        if rule.maximum is not None and value > rule.maximum:
            return fault(f"got {value}; at most {rule.maximum:g} is allowed ({rule.help})")
        if rule.above is not None and value <= rule.above:
            return fault(f"got {value}; must be above {rule.above:g} ({rule.help})")
    if rule.plugins is not None:
        return _check_reference(value, rule.plugins, fault)
    return value


def _check_reference(value: str, group: str, fault: Any) -> Any:
    if ":" not in value:
        offered = plugins.names(group)
        if value not in offered:
            return fault(
                f"unknown name {value!r}{nearest(value, offered)}; allowed: "
                f"{', '.join(offered)}, module:Class or path/to/file.py:Class"
            )
        return value
    place = value.rpartition(":")[0]
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            return fault(f"no file {path.resolve()}")
        return f"{path.resolve()}:{value.rpartition(':')[2]}"
    return value


def _cross_checks(scenario: Scenario) -> Iterator[Fault]:
    fleet = scenario.fleet
    if fleet.cohort > fleet.num_devices:
        yield Fault("fleet", "cohort", f"got {fleet.cohort}; the fleet has {fleet.num_devices}")
    if scenario.evaluate.num_devices > fleet.num_devices:
        yield Fault(
            "evaluate",
            "num_devices",
            f"got {scenario.evaluate.num_devices}; the fleet has {fleet.num_devices}",
        )
    for name, share in fleet.profiles.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
            yield Fault("fleet.profiles", name, f"got {share!r}; expected a share above 0")
    server = scenario.server.strategy
    if ":" in server:
        try:
            plugins.resolve(server, "flower")
        except PluginError as error:
            yield Fault("server", "strategy", str(error))


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({k: _freeze(v) for k, v in value.items()})
    if isinstance(value, list):
        return tuple(_freeze(v) for v in value)
    return value


def _line_of(text: str, table: str, key: str) -> int | None:
    """Find the line of a key (or of its table) for the message; None if it is not in the file."""
    current, table_line = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[([^\[\]]+)\]", line):
            current = match[1].strip()
            table_line = number if current == table else table_line
            if f"{table}.{key}".strip(".") == current:
                return number
        elif current == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return table_line


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
    path = Path(source).expanduser()
    if path.is_file():
        return path
    known = built_in()
    if str(source) in known:
        return known[str(source)]
    raise ScenarioError(
        str(source),
        [
            Fault(
                "",
                "scenario",
                f"neither a file nor a built-in scenario{nearest(str(source), known)}; "
                f"built in: {', '.join(known)}",
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


def _toml_table(name: str, values: Mapping[str, Any]) -> list[str]:
    lines = ["", f"[{name}]"]
    lines += [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += _toml_table(f"{name}.{key}", value)
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
