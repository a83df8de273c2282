"""Options of `edgelearn compress`; as the command line itself, it needs neither torch nor flwr."""

from __future__ import annotations

import argparse


def compress_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
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
