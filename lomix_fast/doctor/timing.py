"""Time and memory of forward and backward, of backends and of the official style, in turns on the same numbers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..testing.cases import Case
from ..testing.devices import Device
from ..testing.errors import is_out_of_memory, one_line
from . import workloads
from .peak import peak_mib


@dataclass(frozen=True)
class Effort:
    """How often a step is timed.

    Attributes:
        rounds: at most so many times.
        at_least: no new round after `seconds` once there are so many.
        seconds: see there.
        limit: seconds after which no new round begins once there is one. On a machine that is busy otherwise the
            threads of a step wait for each other, and it may take forty times as long.
    """

    rounds: int
    at_least: int
    seconds: float
    limit: float


FULL, QUICK = Effort(30, 5, 8.0, 40.0), Effort(3, 3, 0.0, 20.0)
# Times further apart than this, p80 over p20, are those of a machine that does something else as well.
STEADY = 1.5


@dataclass(frozen=True)
class Timing:
    """Figures of one subject on one workload.

    Attributes:
        device: its name.
        subject: a backend, or `workloads.OFFICIAL`.
        workload: name of the case.
        status: "timed"; "not timed", by intention; "does not fit", for want of memory; "wrong" or "failed", which are
            failures of the selftest.
        reason: why it is not "timed"; None when it is.
        rounds: how many steps were timed.
        p20_ms, p50_ms, p80_ms: milliseconds of a step forward and backward; None when not timed, as all below.
        peak_mib: extra memory at the highest.
        speedup: median of the official style over the median of this; None where that one has no time.
    """

    device: str
    subject: str
    workload: str
    status: str
    reason: str | None = None
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    peak_mib: float | None = None
    speedup: float | None = None

    @property
    def is_failure(self) -> bool:
        """Whether something is broken, rather than large."""
        return self.status in ("wrong", "failed")

    @property
    def is_unsteady(self) -> bool:
        """Whether the times lie so far apart that neither they nor the speed-up mean much."""
        return self.p20_ms is not None and self.p80_ms is not None and self.p80_ms > STEADY * self.p20_ms


def time_workload(
    device: Device, workload: Case, subjects: Sequence[str], effort: Effort, say: Callable[[str], None]
) -> list[Timing]:
    """Measure memory, hold the full-size result against float64, then take times.

    Every round gives each subject one step, beginning with another one each time, so that whatever else the machine
    does meets all alike. A round before the first is thrown away.

    Args:
        device: where.
        workload: on what.
        subjects: backends that have passed their cases, and `workloads.OFFICIAL`.
        effort: how often.
        say: told what goes on.

    Returns:
        A figure for each subject, in their order. Nothing is raised: running out of memory, a wrong result and any
        exception are statuses.
    """
    figures: dict[str, Timing] = {}
    steps: dict[str, Callable[[], object]] = {}
    for subject in subjects:
        blank = Timing(device.name, subject, workload.name, "timed")
        figures[subject], step = _prepare(device, workload, blank)
        device.release()
        if step is not None:
            steps[subject] = step
        elif figures[subject].status != "does not fit":
            say(f"  FAILED {subject} on {device.name}, workload {workload.name}: {figures[subject].reason}")
    times: dict[str, list[float]] = {subject: [] for subject in steps}
    begin = time.perf_counter()
    turn = -1  # the round thrown away
    while turn < effort.rounds and steps:
        elapsed = time.perf_counter() - begin
        if (turn >= effort.at_least and elapsed > effort.seconds) or (turn >= 1 and elapsed > effort.limit):
            break
        gc.collect()
        order = list(steps)
        first = turn % len(order)
        for subject in order[first:] + order[:first]:
            lost = _take_time(device, steps[subject], times[subject])
            if lost is not None:
                figures[subject] = replace(figures[subject], status=lost[0], reason=lost[1])
                del steps[subject]  # and with it what it holds
                device.release()
        if turn == -1:
            begin = time.perf_counter()
            for taken in times.values():
                taken.clear()
        turn += 1
    for subject in steps:
        figures[subject] = _with_times(figures[subject], times[subject])
    return _with_speedups([figures[subject] for subject in subjects])


def _prepare(device: Device, workload: Case, blank: Timing) -> tuple[Timing, Callable[[], object] | None]:
    """Peak memory and the check of one subject; the step to time, or None with the reason in the figure."""
    try:
        peak = peak_mib(device, blank.subject, workload)
        step = workloads.step_of(blank.subject, workloads.draw(blank.subject, workload, device.where))
        complaint = workloads.wrong(workload, step(), device.where)
    except Exception as error:  # of any kind: it is the result
        status, reason = _status(error)
        return replace(blank, status=status, reason=reason), None
    if complaint is not None:
        return replace(blank, status="wrong", reason=f"{complaint}; no time is taken of a wrong result"), None
    return replace(blank, peak_mib=peak), step


def _take_time(device: Device, step: Callable[[], object], times: list[float]) -> tuple[str, str] | None:
    """Append the time of one step, or return status and reason of what went wrong."""
    gc.disable()  # a collection in the middle of a step is not the step's
    try:
        times += device.laps(step)
    except Exception as error:
        return _status(error)
    finally:
        gc.enable()
    return None


def _status(error: Exception) -> tuple[str, str]:
    return "does not fit" if is_out_of_memory(error) else "failed", one_line(error)


def _with_times(figure: Timing, times: list[float]) -> Timing:
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return replace(figure, rounds=len(times), p20_ms=tenths[1], p50_ms=tenths[4], p80_ms=tenths[7])


def _with_speedups(figures: list[Timing]) -> list[Timing]:
    official = next((one.p50_ms for one in figures if one.subject == workloads.OFFICIAL), None)
    return [
        replace(one, speedup=official / one.p50_ms) if official is not None and one.p50_ms else one for one in figures
    ]
