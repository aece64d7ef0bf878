"""Command line of the demo. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "train on real brain MRI in about two minutes, then measure the loss against the official style"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `python -m lomix_fast demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (120)")
    parser.add_argument("--batch", type=int, help="slices a step, also in the comparison (6)")
    parser.add_argument("--seed", type=int, help="seed of everything random (0)")
    parser.add_argument("--resolution", type=int, help="edge of a pixel in mm, 1 to 4 (1)")
    parser.add_argument("--pairs", type=int, help="timed steps of each loss at most (15)")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it runs")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit status, 2 for an option out of range, 1 for a failure that is explained."""
    from dataclasses import replace

    from .run import QUICK, Settings, run_demo

    names = ("steps", "batch", "seed", "resolution", "pairs")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        settings = replace(QUICK if arguments.quick else Settings(), **given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        run_demo(settings, arguments.out)
    except (ModuleNotFoundError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
