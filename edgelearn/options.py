"""What the command line takes. It starts without torch and flwr, so nothing here needs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import edgelearn

Command = Callable[[argparse.Namespace], int]


def make_parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        functions: What runs each command; a parsed command line has it as `command`.
    """

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=functions[name])
        return made

    parser = argparse.ArgumentParser(
        prog="edgelearn", description="Fleets of devices that keep learning."
    )
    parser.add_argument("--version", action="version", version=f"edgelearn {edgelearn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = command("run", "run a scenario, or go on with an interrupted run")
    run.add_argument("scenario", nargs="?", help="name or TOML file")
    run.add_argument("--out", metavar="DIR", help="run directory (default: runs/NAME-TIME)")
    run.add_argument("--resume", metavar="DIR", help="go on with the run in DIR")
    run.add_argument("--client", metavar="NAME", help="client strategy: name, file.py:Class, ...")
    run.add_argument(
        "--checkpoint-every",
        metavar="S",
        type=float,
        default=1.0,
        dest="every_s",
        help="least seconds between checkpoints; 0: every round (default: 1)",
    )
    _scenario_options(run)

    compare = command("compare", "run several client strategies side by side")
    compare.add_argument("scenario", help="name or TOML file")
    compare.add_argument("--client", metavar="A,B,...", required=True, help="client strategies")
    compare.add_argument("--seeds", metavar="N", type=int, default=1, help="runs per strategy")
    compare.add_argument("--format", choices=("table", "csv", "json"), default="table")
    compare.add_argument("--all", action="store_true", help="every metric, in tables by subject")
    compare.add_argument("--out", metavar="DIR", help="keep the run directories here")
    _scenario_options(compare)

    command("scenarios", "list the built-in scenarios")
    strategies = command("strategies", "list client strategies, and what each costs")
    strategies.add_argument("scenario", nargs="?", help="reckon with it (default: split-digits)")
    validate = command("validate", "check a scenario, list all its faults")
    validate.add_argument("scenario", help="name or TOML file")
    _replacing(validate)
    copy = command("copy", "copy a built-in scenario to a file of your own")
    copy.add_argument("scenario", help="name")
    copy.add_argument("file", help="new TOML file")

    report = command("report", "write the report of a run again")
    report.add_argument("directory", help="run directory")

    export = command("export", "write a run's model as a file for devices")
    export.add_argument("directory", help="directory of a finished run")
    export.add_argument("--format", choices=("onnx", "pte"), default="onnx", help="default: onnx")
    export.add_argument("--out", metavar="FILE", help="default: model.FORMAT in the directory")
    export.add_argument(
        "--calibrate",
        metavar="N",
        type=int,
        default=256,
        dest="num_calibration",
        help="training samples that the ranges of activations come from (default: 256)",
    )
    export.add_argument(
        "--weight-bits",
        metavar="N",
        type=int,
        choices=(7, 8, 32),
        help="onnx: 7 (default) is exact on every processor, 8 on ARM and x86 with VNNI; "
        "pte: 8 (default); 32: float",
    )

    smaller = command("compress", "make a model smaller, stage by stage")
    _compress_options(smaller)

    again = command("reproduce", "run a table of published numbers again, or list them")
    again.add_argument("table", nargs="?", help="name, module:TABLE or file.py:TABLE")
    again.add_argument("--seeds", metavar="N", type=int, help="seeds 0..N-1 (default: the table's)")
    again.add_argument("--jobs", metavar="N", type=int, default=1, help="processes (default: 1)")
    again.add_argument("--only", metavar="TEXT", default="", help="only rows with this text")
    again.add_argument(
        "--quick", action="store_true", help="see that it runs, on little data; nothing is kept"
    )
    again.add_argument(
        "--render", action="store_true", help="write the page from the results, run nothing"
    )
    again.add_argument("--out", metavar="DIR", help="folder of page and results (default: docs)")

    doctor = command("doctor", "say what this machine and installation can do")
    doctor.add_argument("scenario", nargs="?", help="measure with it (default: split-digits)")
    doctor.add_argument("--all", action="store_true", help="also tiers that take seconds to start")

    fit = command("fit-check", "say whether learning fits a device's memory")
    fit.add_argument("scenario", help="name or TOML file")
    fit.add_argument("--profile", metavar="NAME", help="name or TOML file (default: all built in)")
    fit.add_argument("--overhead", metavar="MIB", type=float, default=0.0, help="what is not ours")
    fit.add_argument("--format", choices=("table", "json"), default="table")
    _replacing(fit)

    new = command("new", "write a commented plug-in to start from")
    new.add_argument("kind", choices=("strategy",))
    new.add_argument("name", help="name of the class, such as my-strategy")
    check = command("check", "check a client strategy against the contract")
    check.add_argument("strategy", help="name, file.py:Class or module:Class")

    deploy = command("deploy", "write all that a real fleet needs")
    deploy.add_argument("action", choices=("init",))
    deploy.add_argument("directory", help="new folder")
    deploy.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        default=[],
        dest="hosts",
        help="name or address by which devices reach the server (repeatable)",
    )
    deploy.add_argument("-n", "--devices", type=int, default=2, help="devices (default: 2)")
    return parser


def _scenario_options(parser: argparse.ArgumentParser) -> None:
    _replacing(parser)
    parser.add_argument("--workers", metavar="N", type=int, help="processes; no effect on results")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        default="auto",
        help="auto, reference, pool, batched, native or ray; no effect on results beyond rounding",
    )
    parser.add_argument(
        "--federation",
        metavar="MODE",
        default="auto",
        help="auto, faithful (a message for each device) or fused (one for the cohort's mean)",
    )


def _replacing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=int, help="seed of everything random")
    parser.add_argument(
        "--set",
        metavar="TABLE.KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="replace a value of the scenario (repeatable)",
    )


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="model, file of this command, or directory of a run")
    parser.add_argument(
        "--pipeline",
        metavar="STAGES",
        default="",
        help='such as "train(20) | prune(0.8) | quantize | pack", the default of a model',
    )
    parser.add_argument(
        "--data", metavar="NAME", default="", help="data set (default: the target's own, or digits)"
    )
    parser.add_argument(
        "--root", metavar="DIR", default="", help="folder of the data set, as for image-folder"
    )
    parser.add_argument("--args", metavar="TOML", default="", help="of a model: 'hidden=32'")
    for part in ("train", "test"):
        text = f"use at most this many {part} samples of the data set"
        parser.add_argument(f"--max-{part}", metavar="N", type=int, default=0, help=text)
    parser.add_argument("--seed", metavar="N", type=int, help="seed of everything random")
    parser.add_argument(
        "--runs", metavar="N", type=int, default=200, help="answers that are timed (default: 200)"
    )
    parser.add_argument("--out", metavar="DIR", help="new folder for files (default: none)")
