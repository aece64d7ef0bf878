"""How many 3D patches fit: `python -m benchmarks.large_batch`, from the top of the repository.

A table of losses on one patch of volume: the largest batch whose step stays within a budget of memory, what a sample
takes, and how long a step lasts. A batch *fits* when the resident set of a fresh process that does nothing else never
passes the budget during a step: interpreter, torch and all libraries, logits, labels, loss, and the gradients of the
logits and of the loss's own parameters. The answer is tried, not computed: that batch fits, and one more does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from .gate import GateError
from .large_batch_measure import Figures, Setting, check_numbers, free_mib, search, take_times
from .large_batch_report import judge, table, write_csv
from .large_batch_rows import ROWS, Patch, row
from .results import FOLDER, machine

OK, FAILED = 0, 1
# The other rows of ROWS are compiled too, and beside the point.
STANDARD = (
    *("lomix_fused", "mutation_fused", "deep_supervision_fused", "last_layer_fused"),
    *("lomix_compile", "lomix_plain", "lomix_official"),
    *("mutation_plain", "deep_supervision_plain", "last_layer_plain"),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large_batch",
        description="The largest batch of a 3D patch that fits in a budget of memory, and the time of a step, of the "
        "loss alone: fused, in plain PyTorch, under torch.compile and official-style.",
        epilog=f"rows: {', '.join(ROWS)}, or module:attribute.",
    )
    parser.add_argument("--patch", type=int, default=96, help="labels along each axis (default 96)")
    parser.add_argument("--classes", type=int, default=14, help="C (default 14)")
    parser.add_argument("--scales", type=int, default=5, help="L; native sizes 1/2^(L-1) to 1 (default 5)")
    parser.add_argument("--budget", type=float, default=16.0, help="GiB that a process may hold (default 16)")
    parser.add_argument(
        "--margin", type=float, default=1.0, help="GiB beyond the budget at which a process is stopped (default 1)"
    )
    parser.add_argument("--time-patch", type=int, default=64, help="a smaller patch, timed as well (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each row (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default all)")
    parser.add_argument("--most", type=int, default=4096, help="batch at which a search gives up (default 4096)")
    parser.add_argument("--rows", default=",".join(STANDARD), help=f"comma-separated (default {','.join(STANDARD)})")
    parser.add_argument("--check", action="store_true", help="judge the promises: exit status 1 when one is broken")
    parser.add_argument("--out", type=Path, help="CSV file; default benchmarks/results/large_batch/<date and time>.csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the table: what goes on is told on stderr, the table comes on stdout, the figures go to a file.

    The file is written anew after every row.

    Returns:
        0 when all went well; 1 on a red gate (then no file is left), a row that failed or, with --check, a promise that
        is broken or was not measured.

    Raises:
        SystemExit: with status 2, on wrong usage; the message is on stderr and nothing has run.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    names = tuple(dict.fromkeys(given.rows.split(",")))
    if (wrong := _wrong(given, names)) is not None:
        parser.error(wrong)
    common = machine()
    _say("  ".join(f"{name}={value}" for name, value in common.items() if value != ""))
    path = given.out or FOLDER / "large_batch" / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.csv"
    with tempfile.TemporaryDirectory(prefix="large_batch_") as cache:
        setting = _setting(given, Path(cache))
        try:
            rows = check_numbers(names, setting, _say)
            for one in rows:
                if not one.failure:
                    search(one, setting, _say)
                    write_csv(path, rows, setting, common)
            for patch in dict.fromkeys((setting.patch, setting.time_patch)):
                take_times(_to_be_timed(rows, patch, setting), patch, setting, _say)
                write_csv(path, rows, setting, common)
        except GateError as error:
            path.unlink(missing_ok=True)
            _say(f"\nRED GATE: {error}\nNo figures were written.")
            return FAILED
        lines = write_csv(path, rows, setting, common)
    print(f"\n{table(rows, setting)}\n\n{lines} rows in {path}")
    verdicts = judge(rows) if given.check else []
    for kept, text in verdicts:
        print(f"{'pass' if kept else 'FAIL'}  {text}{': not measured' if kept is None else ''}")
    is_fine = all(kept for kept, _ in verdicts) and not any(one.failure for one in rows)
    return OK if is_fine else FAILED


def _to_be_timed(rows: Sequence[Figures], patch: Patch, setting: Setting) -> list[Figures]:
    """Rows worth a try: on the patch that was searched those of which one sample fits, on another one all that work."""
    fine = [one for one in rows if not one.failure]
    return fine if patch != setting.patch else [one for one in fine if one.found is not None and one.found.largest > 0]


def _setting(given: argparse.Namespace, cache: Path) -> Setting:
    return Setting(
        patch=Patch(given.patch, given.classes, given.scales),
        time_patch=Patch(given.time_patch, given.classes, given.scales),
        budget_mib=given.budget * 2**10,
        margin_mib=given.margin * 2**10,
        rounds=given.rounds,
        threads=given.threads,
        most=given.most,
        cache=cache,
    )


def _wrong(given: argparse.Namespace, names: Sequence[str]) -> str | None:
    """What is wrong with the arguments, None when nothing is."""
    for name, least in (("rounds", 1), ("threads", 1), ("most", 1), ("classes", 2)):
        if getattr(given, name) < least:
            return f"--{name}: got {getattr(given, name)}, expected at least {least}"
    if not 1 <= given.scales <= 8:
        return f"--scales: got {given.scales}, expected 1 to 8"
    for name in ("patch", "time_patch"):
        if getattr(given, name) < 2**given.scales:
            return (
                f"--{name.replace('_', '-')}: got {getattr(given, name)}, expected at least {2**given.scales}, so that "
                f"the coarsest of {given.scales} scales has two voxels an axis"
            )
    for name in ("budget", "margin"):
        if not getattr(given, name) > 0:
            return f"--{name}: got {getattr(given, name)}, expected more than 0 GiB"
    needed, free = given.budget + given.margin, free_mib() / 2**10
    if needed > free:
        return (
            f"--budget, --margin: got {given.budget:g} and {given.margin:g} GiB, expected together at most the "
            f"{free:.1f} GiB that are free on this machine"
        )
    for name in names:
        try:
            obstacle = row(name).why_not()
        except ValueError as error:
            return str(error)
        if obstacle is not None:
            return f"--rows: {name} cannot run here: {obstacle}"
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
