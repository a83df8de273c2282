"""The command line. Results go to stdout, progress and the log to stderr.

Exit codes: 0 done, 1 the run failed, 2 wrong usage or scenario. Nothing heavy is imported before
it is needed: `edgelearn --help` needs neither torch nor flwr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelearn.errors import EdgelearnError, Fault, PluginError, ScenarioError
from edgelearn.options import Command, make_parser

if TYPE_CHECKING:
    from edgelearn.federated.record import RunRecord
    from edgelearn.scenario.spec import Scenario

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = make_parser(_COMMANDS).parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    command: Command = options.command
    try:
        return command(options)
    except (ScenarioError, PluginError) as error:
        print(f"edgelearn: {error}", file=sys.stderr)
        return WRONG_USAGE
    except EdgelearnError as error:
        print(f"edgelearn: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:  # such as an --out that can't be written; it names the file
        print(f"edgelearn: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("edgelearn: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _scenario(options: argparse.Namespace, client: str = "") -> Iterator[Scenario]:
    """Load the scenario; faults that show within the block are told with their lines, too."""
    from edgelearn.scenario.load import find, load

    overrides: dict[str, Any] = {}
    for item in options.overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            fault = Fault("", item, "expected TABLE.KEY=VALUE, such as client.lr=0.1")
            raise ScenarioError("--set", [fault])
        overrides[key.strip()] = _value(text.strip())
    origins = {name: f"--set {name}" for name in overrides}
    if options.seed is not None:
        overrides["seed"], origins["seed"] = options.seed, "--seed"
    if client:
        origins |= dict.fromkeys(("client.strategy", "client.args"), f"--client {client}")
    scenario = load(options.scenario, overrides)
    from edgelearn.scenario.places import located

    with located(find(options.scenario), origins):
        yield scenario


def _value(text: str) -> Any:
    """Read a value as TOML does; what is not TOML is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# -- running ---------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    if options.resume is None and options.scenario is None:
        print("edgelearn run: name a scenario, or --resume DIR", file=sys.stderr)
        return WRONG_USAGE
    if options.resume is not None:
        return _resume(options)
    from edgelearn.api import with_client

    if options.client and any(item.startswith("client.args") for item in options.overrides):
        fault = Fault("client", "args", "--client resets them; write --set client.strategy=NAME")
        raise ScenarioError("--set", [fault])
    from edgelearn.fleet.simulate import simulate

    with _scenario(options, options.client) as scenario:
        if options.client:
            scenario = with_client(scenario, options.client)
        directory = Path(options.out) if options.out else _new_directory(scenario.name)
        with _display(scenario.name) as on_round:
            record = _interruptible(
                directory,
                lambda: simulate(
                    scenario,
                    out=directory,
                    engine=options.engine,
                    federation=options.federation,
                    num_workers=options.workers,
                    on_round=on_round,
                    checkpoint_every_s=options.every_s,
                ),
            )
    return _show(record, directory)


def _resume(options: argparse.Namespace) -> int:
    given = {
        "a scenario": options.scenario,
        "--out": options.out,
        "--client": options.client,
        "--set": options.overrides,
        "--seed": options.seed,
    }
    if extra := [name for name, value in given.items() if value]:
        print(
            f"edgelearn run --resume: the run has its scenario already; drop {extra[0]}",
            file=sys.stderr,
        )
        return WRONG_USAGE
    from edgelearn.fleet.simulate import resume

    directory = Path(options.resume)
    with _display(directory.name) as on_round:
        record = _interruptible(
            directory,
            lambda: resume(
                directory,
                engine=options.engine,
                federation=options.federation,
                num_workers=options.workers,
                on_round=on_round,
                checkpoint_every_s=options.every_s,
            ),
        )
    return _show(record, directory)


def _interruptible(directory: Path, work: Callable[[], RunRecord]) -> RunRecord:
    try:
        return work()
    except KeyboardInterrupt:
        print(f"go on with: edgelearn run --resume {directory}", file=sys.stderr)
        raise


def _new_directory(name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory, count = Path("runs") / f"{name}-{stamp}", 1
    while directory.exists():
        count += 1
        directory = Path("runs") / f"{name}-{stamp}-{count}"
    return directory


def _display(title: str) -> Any:
    from edgelearn.report.live import live_display

    return live_display(title)


def _show(record: RunRecord, directory: Path) -> int:
    from rich.console import Console

    from edgelearn.report.tables import summary_table

    console = Console()
    console.print(summary_table(record))
    page = _write_report(record, directory)
    print(f"run directory: {directory}")
    if page is not None:
        print(f"report:        {page}")
    return DONE


def _write_report(record: RunRecord, directory: Path) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no report: it needs matplotlib (pip install 'edgelearn[report]'), then "
            f"edgelearn report {directory}",
            file=sys.stderr,
        )
        return None
    from edgelearn.report.page import write_report

    return write_report(record, directory)


def _compare(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from edgelearn.api import validate, with_client
    from edgelearn.fleet.simulate import simulate
    from edgelearn.report.comparison import Comparison

    if options.seeds < 1:
        print(f"edgelearn compare: got --seeds {options.seeds}; at least 1", file=sys.stderr)
        return WRONG_USAGE
    clients = [name.strip() for name in options.client.split(",") if name.strip()]
    variants: dict[str, Scenario] = {}
    for client in clients:
        with _scenario(options, client) as scenario:
            variants[client] = with_client(scenario, client)
            validate(variants[client])  # before the first run, which may take hours
    records: dict[str, list[RunRecord]] = {client: [] for client in clients}
    for client, variant in variants.items():
        for seed in range(variant.seed, variant.seed + options.seeds):
            label = f"{client}, seed {seed}"
            out = None
            if options.out:
                out = Path(options.out) / f"{Path(client).stem}-seed{seed}".replace(":", "-")
            with _display(label) as on_round:
                records[client].append(
                    simulate(
                        replace(variant, seed=seed),
                        out=out,
                        engine=options.engine,
                        federation=options.federation,
                        num_workers=options.workers,
                        on_round=on_round,
                    )
                )
    comparison = Comparison.of(records)
    if options.format == "csv":
        sys.stdout.write(comparison.to_csv())
    elif options.format == "json":
        print(comparison.to_json())
    else:
        from rich.console import Console

        Console().print(comparison.to_table(everything=options.all))
    return DONE


# -- reproducing -----------------------------------------------------------------------------------


def _reproduce(options: argparse.Namespace) -> int:
    if options.table is None:
        return _list_tables()
    from edgelearn.reproduce.command import reproduce_table

    for name, value in (("--seeds", options.seeds), ("--jobs", options.jobs)):
        if value is not None and value < 1:
            print(f"edgelearn reproduce: got {name} {value}; at least 1", file=sys.stderr)
            return WRONG_USAGE
    if options.quick and (options.render or options.out):
        print("edgelearn reproduce: --quick keeps nothing; drop --render, --out", file=sys.stderr)
        return WRONG_USAGE
    is_done = reproduce_table(
        options.table,
        folder=Path(options.out) if options.out else None,
        num_seeds=options.seeds,
        num_jobs=options.jobs,
        only=options.only,
        is_quick=options.quick,
        renders_only=options.render,
    )
    return DONE if is_done else FAILED


def _list_tables() -> int:
    from edgelearn import plugins
    from edgelearn.reproduce.table import TABLES, find

    for name in plugins.names(TABLES):
        table = find(name)
        cost = f"{len(table.rows)} rows, about {table.minutes:g} min a seed"
        print(f"{name:<22} {table.title}\n{'':<22} {cost}, {table.num_seeds} seeds")
    return DONE


# -- doctor ----------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edgelearn.doctor import examine

    found = examine(options.scenario, every_tier=options.all)
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, text in (*found.facts.items(), *found.extras.items()):
        facts.add_row(name, escape(text))
    console.print(facts)
    tiers = Table(title=f"{found.scenario}: device updates per second", title_justify="left")
    tiers.add_column("tier")
    tiers.add_column("updates/s", justify="right")
    tiers.add_column("")
    for tier in found.tiers:
        rate = "-" if tier.rate is None else f"{tier.rate:,.0f}"
        note = f"chosen: {found.reason}" if tier.is_chosen else tier.note
        tiers.add_row(tier.name, rate, escape(note))
    console.print(tiers)
    return DONE


def _fit_check(options: argparse.Namespace) -> int:
    from edgelearn.fit_check import check_fit, print_check, profiles_of

    if not 0 <= options.overhead < float("inf"):
        print(
            f"edgelearn fit-check: got --overhead {options.overhead}; at least 0", file=sys.stderr
        )
        return WRONG_USAGE
    profiles = profiles_of(options.profile)
    with _scenario(options) as scenario:
        check = check_fit(scenario, profiles, overhead_bytes=int(options.overhead * 2**20))
    print_check(check, as_json=options.format == "json")
    return DONE if check.fits else FAILED


# -- scenarios -------------------------------------------------------------------------------------


def _scenarios(_options: argparse.Namespace) -> int:
    from edgelearn.scenario.load import built_in, load

    known = built_in()
    width = max(map(len, known), default=0)
    for name, path in known.items():
        print(f"{name:<{width}}  {load(path).title}")
    return DONE


def _strategies(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edgelearn.catalogue import catalogue
    from edgelearn.report.formats import size

    name = options.scenario or "split-digits"
    table = Table(title=f"{name}, default arguments", title_justify="left", box=None)
    for column in ("strategy", "what it does"):
        table.add_column(column)
    for column in ("remembers", "sends more"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("engine")
    for entry in catalogue(name):
        remembered, sent = size(entry.memory_bytes), size(entry.sent_bytes)
        row = (entry.name, escape(entry.summary), remembered, sent, entry.engine)
        if entry.obstacle:
            row = (entry.name, escape(entry.summary), "-", "-", f"none: {escape(entry.obstacle)}")
        table.add_row(*row)
    Console().print(table)
    return DONE


def _validate(options: argparse.Namespace) -> int:
    from edgelearn.api import validate
    from edgelearn.scenario.load import find

    with _scenario(options) as scenario:
        unseen = validate(scenario)
    path = find(options.scenario)
    if unseen is not None:
        why = str(unseen)
        if unseen.is_fetched and scenario.data.download:
            why = f"{unseen.what}\na run downloads it, as the scenario says"
        print(f"{path}: what depends on the data was not checked: {why}", file=sys.stderr)
    print(f"{path}: valid, {scenario.num_rounds} rounds, digest {scenario.digest}")
    return DONE


def _copy(options: argparse.Namespace) -> int:
    from edgelearn.scenario.load import find

    target = Path(options.file)
    if target.exists():
        print(f"edgelearn copy: {target} exists already; it was not changed", file=sys.stderr)
        return WRONG_USAGE
    source = find(options.scenario)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(f"{target}: change it, then: edgelearn run {target}")
    return DONE


def _report(options: argparse.Namespace) -> int:
    from edgelearn.federated.record import RunRecord
    from edgelearn.report.page import write_report

    directory = Path(options.directory)
    print(write_report(RunRecord.read(directory), directory))
    return DONE


def _export(options: argparse.Namespace) -> int:
    if options.num_calibration < 1:
        print(
            f"edgelearn export: got --calibrate {options.num_calibration}; at least 1",
            file=sys.stderr,
        )
        return WRONG_USAGE
    bits = options.weight_bits or (8 if options.format == "pte" else 7)
    if (options.format, bits) == ("pte", 7):
        print("edgelearn export: --format pte has --weight-bits 8 or 32", file=sys.stderr)
        return WRONG_USAGE
    from edgelearn.deploy.export import EXPORTS

    directory = Path(options.directory)
    out = Path(options.out) if options.out else directory / f"model.{options.format}"
    export = EXPORTS[options.format]
    done = export(directory, out, num_calibration=options.num_calibration, weight_bits=bits)
    how = f"{bits}-bit weights, calibrated on {done.num_calibration} training samples"
    what = "float" if bits == 32 else how
    print(f"{done.path}: {done.num_bytes:,} bytes, {what}")
    return DONE


def _compress(options: argparse.Namespace) -> int:
    from edgelearn.compressing.command import run_command

    run_command(options)
    return DONE


# -- plug-ins and deployment -----------------------------------------------------------------------


def _new(options: argparse.Namespace) -> int:
    from edgelearn.testing.template import class_name, write_strategy

    path = write_strategy(options.name, Path())
    reference = f"{path}:{class_name(options.name)}"
    print(f"{path}: a working strategy with comments. Change it, then:")
    print(f"  edgelearn check {reference}")
    print(f"  edgelearn run split-digits --client {reference}")
    return DONE


def _check(options: argparse.Namespace) -> int:
    from edgelearn import plugins
    from edgelearn.continual.strategy import make_strategy
    from edgelearn.testing.contract import check_strategy, format_findings

    reference = options.strategy
    is_made = len(plugins.joined(reference)) > 1 or reference.startswith(plugins.AVALANCHE)
    if is_made:  # several as one, or somebody else's: there is no class to be built
        make_strategy(reference, {})  # faults of the reference are not the strategy's
        findings = check_strategy(lambda: make_strategy(reference, {}))
    else:
        findings = check_strategy(plugins.resolve(reference, plugins.CLIENT_STRATEGIES))
    print(format_findings(findings))
    return FAILED if any(finding.passed is False for finding in findings) else DONE


def _deploy(options: argparse.Namespace) -> int:
    from edgelearn.deploy.deployment import init_deployment

    folder = init_deployment(
        options.directory, num_devices=options.devices, hosts=tuple(options.hosts)
    )
    print(f"{folder}: certificates, keys and docker-compose.yml for {options.devices} device(s)")
    return DONE


_COMMANDS: dict[str, Command] = {
    "run": _run,
    "compare": _compare,
    "scenarios": _scenarios,
    "strategies": _strategies,
    "validate": _validate,
    "copy": _copy,
    "report": _report,
    "export": _export,
    "compress": _compress,
    "reproduce": _reproduce,
    "doctor": _doctor,
    "fit-check": _fit_check,
    "new": _new,
    "check": _check,
    "deploy": _deploy,
}


if __name__ == "__main__":
    sys.exit(main())
