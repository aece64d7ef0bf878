"""The steps of a GPU day in their order. The process that steers them leaves the device to others."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lomix_fast.testing.environment import cores
from lomix_fast.testing.errors import one_line

from . import build, fast, features, limits, problems, right, small
from .day import BROKEN, FAILED, SKIPPED, Clock, Day, Emit, Row
from .promises import judge
from .record import Spent, Verdict, merge_logs, table, write
from .workers import about

GOOD, BAD = 0, 1
_RUNS = Path("runs")
_LEAST_SECONDS = 3.0  # a step that has less is not begun


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of it, with what it does where it is one of several; its first word is what --only takes.
        seconds: most that it may take.
        run: (day, clock, emit).
    """

    name: str
    seconds: float
    run: Callable[[Day, Clock, Emit], None]


def steps(field: fast.Field, rehearse: bool) -> tuple[Step, ...]:
    """All steps, most important first."""
    first, rest = problems.problems(problems.FIRST, rehearse), problems.problems(problems.REST, rehearse)
    half = len(rest) // 2

    def fast_first(day: Day, clock: Clock, emit: Emit) -> None:
        field.run(first, clock, emit)

    def fast_more(day: Day, clock: Clock, emit: Emit) -> None:
        field.run_late(clock, emit, is_last=False)
        field.run(rest[:half], clock, emit)

    def quiet_limits(day: Day, clock: Clock, emit: Emit) -> None:
        with field.quiet():
            limits.run(day, clock, emit)

    def fast_rest(day: Day, clock: Clock, emit: Emit) -> None:
        field.count_launches(first[0], Clock(20.0, clock), emit)
        field.run_late(clock, emit, is_last=False)
        field.run(rest[half:], clock, emit)
        field.run_late(clock, emit, is_last=True)

    return (
        Step("build", 170, build.run),
        Step("right", 90, right.run),
        Step("fast", 75, fast_first),
        Step("features", 60, features.run),
        Step("small", 40, small.run),
        Step("fast more", 50, fast_more),
        Step("limits", 70, quiet_limits),
        Step("fast rest", 480, fast_rest),  # what time is left
    )


NAMES = ("build", "right", "fast", "features", "small", "limits")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description="Builds the kernels for the GPU that is here and answers: are they right, fast, at home on a GPU, "
        "small, how near the limit of the card. Results go to a folder, a table with verdicts comes last.",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="STEP", help=f"some of {', '.join(NAMES)}; the build always"
    )
    parser.add_argument("--device", default="cuda:0", help="which GPU (default cuda:0)")
    parser.add_argument("--out", type=Path, help="folder of the results (default runs/gpu-day-<date and time>)")
    parser.add_argument("--workers", type=int, help="processes at once where times do not matter (default 12 at most)")
    parser.add_argument("--commit", help="commit of the sources, where there is no git to tell")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small sizes and a stand-in for the GPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a day.

    Returns:
        0 when nothing failed, 1 when something did or, on a real GPU, a promise is broken.

    Raises:
        SystemExit: with status 2 on wrong usage, before anything has run.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes: got {given.minutes}, expected more than 0")
    if given.workers is not None and given.workers < 1:
        parser.error(f"--workers: got {given.workers}, expected at least 1")
    if not given.rehearse and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU here; --rehearse tries all of this on a CPU")
    folder = (given.out or _RUNS / f"gpu-day-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}").resolve()
    workers = given.workers or (2 if given.rehearse else max(1, min(cores() - 2, 12)))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that processes are ended
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-day-") as logs:
            day = Day(given.device, given.rehearse, Path(logs), workers)
            return _Whole(day, folder, Clock(60 * given.minutes), given.commit).run(given.only or NAMES)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Whole:
    """One run: its rows and what it knows of the machine."""

    def __init__(self, day: Day, folder: Path, clock: Clock, commit: str | None) -> None:
        self._day, self._folder, self._clock = day, folder, clock
        self._rows: list[Row] = []
        self._spent: list[Spent] = []
        self._machine: dict[str, Any] = {}  # until a process that uses the device has told
        self._commit = commit

    def run(self, chosen: Sequence[str]) -> int:
        field = fast.Field(self._day)
        self._folder.mkdir(parents=True, exist_ok=True)
        _say(f"results: {self._folder}")
        try:
            if "fast" in chosen:
                field.start_compiling(problems.problems(problems.FIRST, self._day.rehearse))
            for step in steps(field, self._day.rehearse):
                # The build comes first in any case: it takes seconds where there is one, and nothing runs without.
                if step.name.partition(" ")[0] in (*chosen, "build"):
                    self._step(step)
        finally:
            field.close()
            verdicts = self._write()
        _say("")
        print(table(self._rows, self._spent, verdicts), flush=True)
        if self._day.rehearse:
            print("\nThis was a rehearsal on a CPU with stand-ins: its figures and promises mean nothing.")
        broken = any(one.kept is False for one in verdicts) and not self._day.rehearse
        return BAD if broken or any(row.status in BROKEN for row in self._rows) else GOOD

    def _step(self, step: Step) -> None:
        """One step within its time; whatever it raises is a row, and the next one begins."""
        name = step.name.partition(" ")[0]
        clock = Clock(step.seconds, self._clock)
        limit = clock.left
        if limit < _LEAST_SECONDS:
            self._emit(Row(name, "", "", step.name, SKIPPED, note="time was up"))
        else:
            _say(f"{step.name}: at most {limit:.0f} s of {self._clock.left:.0f} s left")
            try:
                step.run(self._day, clock, self._emit)
            except Exception as error:  # of any kind: it must not cost the others
                self._emit(Row(name, "", "", step.name, FAILED, note=one_line(error)))
                _say(traceback.format_exc())
        self._spent.append(Spent(step.name, clock.elapsed, limit))
        if len(self._spent) == 1:  # after the build, which makes the package whole
            self._ask()
        self._write()  # a run that is stopped leaves what it has found
        merge_logs(self._day.out, self._folder)

    def _ask(self) -> None:
        """Describe card and versions, as a process that uses the device sees them."""
        try:
            self._machine = about(self._day)
            self._machine["commit"] = self._machine["commit"] or self._commit
        except Exception as error:
            _say(f"asking for the card failed: {one_line(error)}")

    def _emit(self, row: Row) -> None:
        self._rows.append(row)
        if row.status != "ok":
            told = " ".join(filter(None, (row.step, row.subject, row.case, row.what)))
            _say(f"  {row.status}: {told}: {row.note[:300]}")

    def _write(self) -> list[Verdict]:
        verdicts = judge(self._rows)
        write(self._folder, self._machine, self._rows, self._spent, verdicts)
        return verdicts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
