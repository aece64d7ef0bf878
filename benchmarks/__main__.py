"""Command line of the benchmark: `python -m benchmarks`, from the top of the repository."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .cases import CASES, HEAVY_BYTES, QUICK, STANDARD, BenchmarkCase
from .contenders import CONTENDERS, contender
from .gate import GateError
from .measure import Measurement, measure
from .promises import PROMISES, needed
from .results import default_path, machine, write_csv
from .table import table
from .worker import WorkerError

OK, FAILED, USAGE = 0, 1, 2


def _parser() -> argparse.ArgumentParser:
    contenders = "; ".join(f"{name}: {c.summary}" for name, c in CONTENDERS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of the LoMix loss, fused against plain PyTorch, torch.compile and official-style.",
        epilog=f"cases: {', '.join(CASES)}. contenders: {contenders}.",
    )
    parser.add_argument("--cases", help=f"comma-separated; default {','.join(STANDARD)}")
    parser.add_argument("--contenders", help="comma-separated names or module:attribute; default depends on the case")
    parser.add_argument("--rounds", type=int, help="repetitions of each contender; default 11 (3 with --quick)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default all cores)"
    )
    parser.add_argument("--quick", action="store_true", help=f"tiny cases ({','.join(QUICK)}), to try the harness")
    parser.add_argument("--check", action="store_true", help="measure what the promises need and judge them")
    parser.add_argument("--include-heavy", action="store_true", help="also what needs more than 6 GiB by estimate")
    parser.add_argument("--out", type=Path, help="CSV file; default benchmarks/results/step-<date and time>.csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0 when all went well; 1 on a red gate, a contender that failed or (with --check) a broken promise. Figures
        are written only when every contender of every case passed the gate.

    Raises:
        SystemExit: with status 2, on wrong usage; the message is on stderr and nothing has run.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    rounds = given.rounds if given.rounds is not None else (3 if given.quick else 11)
    if rounds < 1 or given.threads < 1:
        parser.error(f"--rounds, --threads: got {rounds} and {given.threads}, expected at least 1 of each")
    try:
        chosen = [(one, _contenders_of(one, given)) for one in _cases_of(given)]
    except ValueError as error:
        parser.error(str(error))
    common = machine(given.threads)
    _say("  ".join(f"{name}={value}" for name, value in common.items() if value != ""))
    _warn_when_busy()
    measurements: list[Measurement] = []
    tables = []
    try:
        for one, names in chosen:
            _say(f"\n{one.name}: {', '.join(names)}")
            found = measure(one, names, rounds=rounds, threads=given.threads, say=_say)
            measurements += found
            tables.append(table(found))
    except GateError as error:
        print(f"\nRED GATE: {error}\nNo figures were written.", file=sys.stderr)
        return FAILED
    except WorkerError as error:
        print(f"\n{error}\nNo figures were written.", file=sys.stderr)
        return FAILED
    path = given.out or default_path()
    write_csv(path, measurements, common)
    print("\n" + "\n\n".join(tables) + f"\n\n{len(measurements)} rows in {path}")
    return _judge(measurements) if given.check else OK


def _cases_of(given: argparse.Namespace) -> list[BenchmarkCase]:
    names = given.cases.split(",") if given.cases else (QUICK if given.quick else STANDARD)
    for name in names:
        if name not in CASES:
            raise ValueError(f"--cases: got {name!r}, expected names out of {', '.join(CASES)}")
    return [CASES[name] for name in names]


def _contenders_of(one: BenchmarkCase, given: argparse.Namespace) -> tuple[str, ...]:
    """Names for a case, without those that are too large for this machine or for the flags given."""
    if given.contenders:
        names = tuple(dict.fromkeys(given.contenders.split(",")))
    else:
        names = (needed(one.name) if given.check else ()) or one.contenders
    taken = []
    for name in names:
        row = contender(name)
        obstacle = row.why_not()
        if obstacle is not None:
            raise ValueError(f"--contenders: {name} cannot run here: {obstacle}. Name the others to go without it")
        estimate = row.estimate(one.case)
        if estimate > HEAVY_BYTES and not given.include_heavy:
            _say(f"{one.name}: {name} left out, it needs about {estimate / 2**30:.1f} GiB; --include-heavy runs it")
        elif estimate > _available_bytes():
            _say(f"{one.name}: {name} left out, it needs about {estimate / 2**30:.1f} GiB and less is free")
        else:
            taken.append(name)
    if not taken:
        raise ValueError(f"--contenders: none is left for {one.name}; name others, or pass --include-heavy")
    return tuple(taken)


def _available_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _warn_when_busy() -> None:
    """A busy machine spoils times; ratios suffer less, since contenders take turns."""
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        _say(f"warning: the load average is {load:.1f} on {cores} cores; times will be longer and spread wider")


def _judge(measurements: Sequence[Measurement]) -> int:
    """Print a line for every promise about the cases measured; 1 if any is broken."""
    measured = {m.case.name for m in measurements}
    verdicts = [p.judge(measurements) for p in PROMISES if p.case in measured]
    print()
    for verdict in verdicts:
        print(f"{'pass' if verdict.kept else 'FAIL'}  {verdict.text}")
    if not verdicts:
        print(f"FAIL  no promise is about {', '.join(sorted(measured))}")
    return OK if verdicts and all(v.kept for v in verdicts) else FAILED


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
