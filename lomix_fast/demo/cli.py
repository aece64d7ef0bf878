"""Command line of the demo. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

HELP = "train on real brain MRI in about two minutes, then measure the loss against the official style"

_NEEDED = ("numpy", "nilearn", "matplotlib", "tqdm")  # what the "demo" extra brings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `python -m lomix_fast demo`; what is left out keeps the value of `run.Settings`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (80)")
    parser.add_argument("--batch", type=int, help="slices a step, also in the comparison (6)")
    parser.add_argument("--seed", type=int, help="seed of everything random (0)")
    parser.add_argument("--resolution", type=int, help="edge of a pixel in mm, 1 to 4 (1)")
    parser.add_argument("--pairs", type=int, help="timed steps of each loss at most (15)")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it runs")


def check_packages() -> None:
    """Check that what the demo needs beyond torch is installed, without importing it.

    Raises:
        ModuleNotFoundError: something is missing; the message names it and the pip extra that brings it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {', '.join(missing)}, not installed here; run: pip install 'lomix_fast[demo]'"
        )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        arguments: parsed options of `add_arguments`.

    Returns:
        0; 1 when a package is missing, training diverged or the losses disagree; 2 for an option out of range. The
        reason is written to stderr.
    """
    try:
        check_packages()
    except ModuleNotFoundError as error:
        return _fail(error, 1)
    from dataclasses import replace

    from .run import QUICK, Settings, run_demo

    names = ("steps", "batch", "seed", "resolution", "pairs")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        settings = replace(QUICK if arguments.quick else Settings(), **given)
        if arguments.out.exists() and not arguments.out.is_dir():
            raise ValueError(f"--out: got {arguments.out}, which is a file, expected a folder")
    except ValueError as error:
        return _fail(error, 2)
    try:
        run_demo(settings, arguments.out)
    except ValueError as error:  # an option that does not fit the data
        return _fail(error, 2)
    except (ArithmeticError, RuntimeError) as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
