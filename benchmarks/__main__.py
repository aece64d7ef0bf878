"""Command line of the benchmark: `python -m benchmarks`, from the top of the repository."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import build_cpp
from lomix_fast.testing.process import Ended

from . import build_time
from .contenders import CONTENDERS, contender
from .gate import GateError
from .measure import Measurement, measure
from .promises import PROMISES, Promise, is_needed, subjects_needed
from .results import default_path, machine, write_csv
from .subjects import QUICK, Subject
from .sweeps import STANDARD, SUBJECTS
from .table import table

OK, FAILED, USAGE = 0, 1, 2


def _parser() -> argparse.ArgumentParser:
    subjects = "; ".join(f"{name}: {one.title}" for name, one in SUBJECTS.items())
    contenders = "; ".join(f"{name}: {c.summary}" for name, c in CONTENDERS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of the LoMix loss: the fused kernel against plain PyTorch, torch.compile and "
        "official-style, and against pixels, scales, classes, threads and vector instructions.",
        epilog=f"subjects: {subjects}; {build_time.NAME}: {build_time.TITLE}. contenders: {contenders}.",
    )
    parser.add_argument("--subjects", help=f"comma-separated; default {','.join((*STANDARD, build_time.NAME))}")
    parser.add_argument(
        "--contenders", help="comma-separated names or module:attribute; default depends on the subject"
    )
    parser.add_argument("--rounds", type=int, help="repetitions of each participant; default depends on the subject")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default all cores)"
    )
    parser.add_argument("--quick", action="store_true", help=f"tiny cases ({','.join(QUICK)}), to try the harness")
    parser.add_argument("--check", action="store_true", help="measure what the promises need and judge them")
    parser.add_argument("--out", type=Path, help="CSV file; default benchmarks/results/bench-<date and time>.csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    The file is written anew after every subject. A subject of which a participant fails is left out of it and the
    rest goes on.

    Returns:
        0 when all went well; 1 on a red gate (then no file is left), a participant that failed or, with --check, a
        broken promise.

    Raises:
        SystemExit: with status 2, on wrong usage; the message is on stderr and nothing has run.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.rounds is not None and given.rounds < 1) or given.threads < 1:
        parser.error(f"--rounds, --threads: got {given.rounds} and {given.threads}, expected at least 1 of each")
    try:
        names = _names_of(given)
        subjects = {name: _subject(name, given) for name in names if name != build_time.NAME}
    except ValueError as error:
        parser.error(str(error))
    common = machine()
    _say("  ".join(f"{name}={value}" for name, value in common.items() if value != ""))
    _warn_when_busy()
    path = given.out or default_path()
    measurements: list[Measurement] = []
    tables, failed = [], []
    for name in names:
        try:
            found, text = _measure(name, subjects.get(name), given)
        except GateError as error:
            path.unlink(missing_ok=True)
            print(f"\nRED GATE: {error}\nNo figures were written.", file=sys.stderr)
            return FAILED
        except (Ended, build_time.BuildFailed, build_cpp.BuildError) as error:
            print(f"\n{name}: {error}\nIts figures were not written.", file=sys.stderr)
            failed.append(name)
            continue
        if found:
            measurements += found
            tables.append(text)
            write_csv(path, measurements, common)
    print("\n" + "\n\n".join(tables))
    print(f"\n{len(measurements)} rows in {path}" if measurements else "\nNo figures were written.")
    status = _judge(measurements, names, given.check)
    return FAILED if failed or not measurements else status


def _names_of(given: argparse.Namespace) -> tuple[str, ...]:
    known = (*SUBJECTS, build_time.NAME)
    if given.subjects:
        names = tuple(dict.fromkeys(given.subjects.split(",")))
    elif given.quick:
        names = QUICK
    else:
        names = subjects_needed() if given.check else (*STANDARD, build_time.NAME)
    for name in names:
        if name not in known:
            raise ValueError(f"--subjects: got {name!r}, expected names out of {', '.join(known)}")
    return names


def _subject(name: str, given: argparse.Namespace) -> Subject:
    """A subject with those participants that were asked for and that this machine can run.

    Raises:
        ValueError: a contender is unknown or cannot run here, or nobody asked for is left.
    """
    subject = SUBJECTS[name]
    if given.contenders:
        subject = subject.by(tuple(dict.fromkeys(given.contenders.split(","))))
    elif given.check:
        subject = subject.keeping(lambda entry: is_needed(name, entry))
    for one in dict.fromkeys(entry.contender for entry in subject.entries):
        obstacle = contender(one).why_not()
        if obstacle is not None:
            raise ValueError(
                f"--contenders: {one} cannot run here: {obstacle}. Name the others to go without it, as in "
                f"--contenders {','.join(n for n in CONTENDERS if n != one)}"
            )
    obstacles = {entry: entry.obstacle() for entry in subject.entries}
    for entry, obstacle in obstacles.items():
        if obstacle is not None:
            _say(f"{name}: {entry.label} left out: {obstacle}")
    return subject.keeping(lambda entry: obstacles[entry] is None)


def _measure(name: str, subject: Subject | None, given: argparse.Namespace) -> tuple[list[Measurement], str]:
    """Figures of a subject (None: of the build) and a text about them; none when nobody takes part."""
    if subject is None:
        _say(f"\n{name}: {build_time.TITLE}")
        found = build_time.measure_build(_say)
        return found, f"{name}: {build_time.TITLE}: {(found[0].p50_ms or 0) / 1e3:.0f} s, {found[0].threads} jobs"
    if not subject.entries:
        return [], ""
    _say(f"\n{name}: {', '.join(entry.label for entry in subject.entries)}")
    found = measure(subject, rounds=given.rounds or subject.rounds, threads=given.threads, say=_say)
    return found, table(f"{name}: {subject.title}", found)


def _warn_when_busy() -> None:
    """A busy machine spoils times; ratios suffer less, since participants take turns."""
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        _say(f"warning: the load average is {load:.1f} on {cores} cores; times will be longer and spread wider")


def _judge(measurements: Sequence[Measurement], names: Sequence[str], check: bool) -> int:
    """With `check`, print a line for every promise about the subjects named; 1 if any is broken."""
    if not check:
        return OK
    promises = [p for p in PROMISES if p.subject in names]
    print()
    broken = not promises
    if broken:
        print(f"FAIL  no promise is about {', '.join(names)}")
    for promise in promises:
        verdict = promise.judge(measurements)
        if verdict.kept is not None:
            word, why = ("pass" if verdict.kept else "FAIL"), ""
        elif (reason := _obstacle(promise)) is not None:
            word, why = "skip", f": not measured: {reason}"
        else:
            word, why = "FAIL", ": not measured"
        print(f"{word}  {verdict.text}{why}")
        broken = broken or word == "FAIL"
    return FAILED if broken else OK


def _obstacle(promise: Promise) -> str | None:
    """Why this machine cannot say whether a promise holds; None when it can."""
    if promise.subject not in SUBJECTS:
        return None
    wanted = (entry for entry in SUBJECTS[promise.subject].entries if promise.wants(entry))
    return next((reason for entry in wanted if (reason := entry.obstacle()) is not None), None)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
