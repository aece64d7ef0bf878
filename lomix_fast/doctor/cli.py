"""Command line of the doctor. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "what is installed and runs where; with --selftest, whether it is right and how fast"

_RECORD, _ISSUE = Path("runs/doctor.json"), Path("runs/doctor.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `python -m lomix_fast doctor`."""
    parser.add_argument("--selftest", action="store_true", help="check every backend on every device, then time it")
    parser.add_argument("--device", nargs="+", metavar="NAME", help="only these: cpu, cuda, cuda:0, ... (all)")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="check these cases only (all)")
    parser.add_argument("--quick", action="store_true", help="check a fixed selection of cases, time few steps")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=_RECORD, metavar="PATH",
        help=f"write all figures there (default {_RECORD}, where --selftest writes them anyway)",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, nargs="?", const=_ISSUE, metavar="PATH",
        help=f"write one text to paste into an issue, with the selftest if there was one (default {_ISSUE})",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Look around, and test if asked to.

    Args:
        arguments: parsed options of `add_arguments`.

    Returns:
        0; 1 when a usable backend failed; 2 for options that do not fit, said on stderr before anything has run.
    """
    from ..testing.environment import cores
    from .devices import choose, present
    from .selection import choose_cases

    everything = present()
    try:
        _check(arguments)
        devices = choose(arguments.device, everything)
        cases = choose_cases(arguments.cases, arguments.quick)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from .overview import overview
    from .report import describe, table
    from .selftest import run_selftest
    from .timing import FULL, QUICK

    found = overview(devices)
    print(describe(found), flush=True)
    done = None
    if arguments.selftest:
        usable = {
            name: [backend for backend, reason in backends.items() if reason is None]
            for name, backends in found["devices"].items()
        }
        done = run_selftest(devices, usable, cases, QUICK if arguments.quick else FULL, _say, min(cores(), 12))
        print(f"\n{table(done, devices)}")
    cases_chosen = [one.name for one in cases]
    for option, path, write in (
        ("--json", arguments.json or (_RECORD if arguments.selftest else None), _write_record),
        ("--report", arguments.report, _write_issue),
    ):
        if path is None:
            continue
        try:
            write(path, found, done, devices, cases_chosen)
        except OSError as error:  # the table is there already; do not lose it in a traceback
            print(f"error: {option}: got {path}, which cannot be written: {error}", file=sys.stderr)
            return 2
        print(f"\n{option.removeprefix('--')}: {path}")
    return 1 if done is not None and done.failures else 0


def _check(arguments: argparse.Namespace) -> None:
    """Check what needs no look at devices or cases.

    Raises:
        ValueError: an option that needs --selftest without it, or a path that can be no file.
    """
    for option in ("cases", "quick"):
        if getattr(arguments, option) and not arguments.selftest:
            raise ValueError(f"--{option}: got it without --selftest, expected both: it chooses what is tested")
    for option, path in (("--json", arguments.json or _RECORD), ("--report", arguments.report or _ISSUE)):
        if path.is_dir():
            raise ValueError(f"{option}: got {path}, which is a folder, expected a file")
        folder = next((one for one in path.parents if one.exists()), None)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option}: got {path}, but {folder} is a file, expected a folder or nothing there")


def _write_record(path: Path, *whole: Any) -> None:
    from .report import record, write

    write(path, record(*whole))


def _write_issue(path: Path, *whole: Any) -> None:
    from .report import issue, write_text

    write_text(path, issue(*whole))


def _say(line: str) -> None:
    """Tell what goes on, apart from the report on stdout."""
    print(line, file=sys.stderr, flush=True)
