"""From rows to figures: numbers are checked, each row is searched for its largest batch, then all are timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lomix_fast.testing.peak import PLAIN_MALLOC
from lomix_fast.testing.process import Ended, Process, TooLarge

from . import gate
from .large_batch_rows import Patch, row, small_case
from .large_batch_search import Found, Trial, largest_batch
from .large_batch_session import Held, Peak, Session

# What a process that waits for its turn is taken to hold on average; libraries are shared by all.
_RESTING_MIB = 400
# Enough for the truth in float64 on the small problem, which has nothing to do with the budget.
_CHECK_MIB = 4096


@dataclass(frozen=True)
class Setting:
    """What a run is about.

    Attributes:
        patch: on which batches are searched, and where time is taken of rows that can take it.
        time_patch: a smaller one, on which time is taken of all rows.
        budget_mib: most that a process may hold, in MiB.
        margin_mib: by how much it may pass the budget before it is stopped.
        rounds: repetitions of each row.
        threads: torch threads.
        most: batch at which a search gives up.
        cache: folder for compiled code, empty at the start, so that the first step of a row says what compiling costs.
    """

    patch: Patch
    time_patch: Patch
    budget_mib: float
    margin_mib: float
    rounds: int
    threads: int
    most: int
    cache: Path

    @property
    def limit_mib(self) -> float:
        """What a process is stopped at."""
        return self.budget_mib + self.margin_mib


@dataclass
class Figures:
    """What was measured of one row.

    Attributes:
        name: of the row.
        found: its largest batch; None when that failed.
        times: edge of the patch -> milliseconds of steps at batch 1; without an edge at which it does not fit.
        first_ms: edge -> milliseconds of the first step in the first process of its kind.
        fingerprints: edge -> loss and norms of the gradients at batch 1.
        failure: why there is no more, "" when all went well.
    """

    name: str
    found: Found | None = None
    times: dict[int, list[float]] = field(default_factory=dict)
    first_ms: dict[int, float] = field(default_factory=dict)
    fingerprints: dict[int, dict[str, float]] = field(default_factory=dict)
    failure: str = ""


def check_numbers(names: Sequence[str], setting: Setting, say: Callable[[str], None]) -> list[Figures]:
    """Compare loss and gradients of every row with the definition in float64, on a small problem.

    Returns:
        Figures of the rows, still empty. What could not be checked, because it failed, says so in them.

    Raises:
        GateError: one is wrong.
    """
    rows = []
    for name in names:
        rows.append(one := Figures(name))
        with _watched(name, setting.patch, setting, _CHECK_MIB) as process:
            try:
                found = process.ask("errors")
            except (Ended, TooLarge) as error:
                one.failure = str(error)
                say(f"  FAILED  {error}")
                continue
        worst = gate.check(name, small_case(row(name), setting.patch), found)
        say(f"  gate  {name}: largest relative error {worst:.1e}")
    return rows


def search(figures: Figures, setting: Setting, say: Callable[[str], None]) -> None:
    """Search for the largest batch of one row and write it into its figures, or why that failed."""
    name = figures.name

    def run(batch: int) -> Trial:
        trial, fingerprint = try_batch(name, batch, setting)
        if batch == 1 and fingerprint:
            figures.fingerprints[setting.patch.edge] = fingerprint
            figures.first_ms[setting.patch.edge] = trial.first_step_ms
        word = "fits" if trial.fits(setting.budget_mib) else "stopped" if trial.stopped else "does not fit"
        say(f"  peak  {name}, batch {batch}: {trial.peak_mib:.0f} MiB, {word}")
        return trial

    try:
        figures.found = largest_batch(run, setting.budget_mib, setting.most)
    except Ended as error:
        figures.failure = str(error)
        say(f"  FAILED  {error}")


def try_batch(name: str, batch: int, setting: Setting) -> tuple[Trial, dict[str, float]]:
    """One step at one batch, in a process of its own, and its fingerprint (empty unless the batch is 1).

    Raises:
        Ended: it failed, or less memory is free than it may take.
    """
    if (free := free_mib()) < setting.limit_mib:
        raise Ended(
            f"{name}: it may take {setting.limit_mib:.0f} MiB with the margin and only {free:.0f} MiB are free on this "
            "machine; end what else runs, or give a smaller --budget"
        )
    held = Held(0.0, 0.0)
    with _watched(name, setting.patch, setting, setting.limit_mib, PLAIN_MALLOC) as process:
        try:
            held = process.ask("make", batch)
            peak: Peak = process.ask("peak")
        except TooLarge as error:
            return Trial(batch, error.resident_mib, True, held.empty, held.before), {}
    times = (peak.step_ms, peak.first_step_ms)
    trial = Trial(batch, peak.peak_mib, False, held.empty, peak.before_mib, peak.gradients_mib, *times)
    return trial, peak.fingerprint


def take_times(rows: Sequence[Figures], patch: Patch, setting: Setting, say: Callable[[str], None]) -> None:
    """Time steps at batch 1 and write them into the figures.

    Every round asks each row for one step, beginning with another row each time, so that what else the machine does
    meets all alike. A row that passes the limit, or fails, gets no time; a failure is told in its figures.

    Raises:
        GateError: rows of the same loss disagree at full size; no time is written.
    """
    limit = min(setting.limit_mib, free_mib() - _RESTING_MIB * len(rows))
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack:
        at_work: dict[str, Process] = {}
        for one in rows:
            process = stack.enter_context(_watched(one.name, patch, setting, limit))
            made = _asked(one, say, process, "make", 1)
            peak: Peak | None = None if made is None else _asked(one, say, process, "peak")
            if peak is not None:
                at_work[one.name] = process
                one.fingerprints.setdefault(patch.edge, peak.fingerprint)
                one.first_ms.setdefault(patch.edge, peak.first_step_ms)
                say(f"  ready  {one.name} at {patch.edge} cubed")
        check_agreement(rows, patch)
        for turn in range(setting.rounds):
            first = turn % max(1, len(rows))
            for one in [*rows[first:], *rows[:first]]:
                if one.name not in at_work:
                    continue
                ms = _asked(one, say, at_work[one.name], "repetition")
                if ms is None:
                    at_work.pop(one.name)
                else:
                    taken.setdefault(one.name, []).append(ms)
            say(f"  round {turn + 1} of {setting.rounds} at {patch.edge} cubed")
    for one in rows:
        if one.name in at_work:
            one.times[patch.edge] = taken[one.name]


def _asked(one: Figures, say: Callable[[str], None], process: Process, command: str, *arguments: object) -> Any:
    """An answer; None when the process passed its limit or failed, which is said."""
    try:
        return process.ask(command, *arguments)
    except TooLarge as error:
        say(f"  no time  {error}")
    except Ended as error:
        one.failure = one.failure or str(error)
        say(f"  FAILED  {error}")
    return None


def check_agreement(rows: Sequence[Figures], patch: Patch) -> None:
    """Compare results at batch 1 of the rows that compute the same loss; rows without any are passed over.

    Raises:
        GateError: two differ by more than float32 explains.
    """
    same: dict[str, dict[str, dict[str, float]]] = {}
    for one in rows:
        if patch.edge in one.fingerprints:
            same.setdefault(row(one.name).loss, {})[one.name] = one.fingerprints[patch.edge]
    for loss, fingerprints in same.items():
        gate.check_agreement(patch.case(loss, 1), fingerprints)


def free_mib() -> float:
    """Memory of the machine that is available without swapping, MiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable:"))


def _watched(
    name: str, patch: Patch, setting: Setting, limit_mib: float, environment: Mapping[str, str] | None = None
) -> Process:
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(setting.cache), **(environment or {})}
    return Process(name, Session, (name, patch, setting.threads), limit_mib, variables)
