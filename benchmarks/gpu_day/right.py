"""Question 1, is it right: every shared case on both GPU backends, then the two benchmark problems at full size."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lomix_fast.doctor.checking import CaseOutcome, check_in_processes, compiles_together
from lomix_fast.testing.cases import BENCHMARK_CASES, CASES, Case

from ..cases import shrunk
from .day import CRASHED, FAILED, HUNG, NO_MEMORY, OK, SKIPPED, Clock, Day, Emit, Row
from .workers import about, open_device, variables

BACKENDS = ("cuda", "triton")
_STATUS = {"": OK, "wrong": FAILED, "raised": FAILED, "hung": HUNG, "crashed": CRASHED, "not run": SKIPPED}
# Of a rehearsal: each number of axes, dtype and kind of target once, and small.
_REHEARSED = ("base", "line", "volume_one_voxel", "classes_17", "classes_5", "classes_6", "half_16", "empty_batch")
_CASE_SECONDS = 75.0


def run(day: Day, clock: Clock, emit: Emit) -> None:
    """Check both backends; a row for each case, whose value is its largest error over what is allowed."""
    names = usable(day, "right", emit)
    cases = [one for one in CASES if not day.rehearse or one.name in _REHEARSED]
    sizes = Counter(compiles_together(name, one) for name in names for one in cases)
    jobs = [("check", name, one) for name in names for one in cases]
    jobs.sort(key=lambda job: -sizes[compiles_together(*job[1:])])  # what takes longest begins first
    jobs = [("full_size", name, one) for one in _full_size(day) for name in names] + jobs
    for method, backend, outcome in check_in_processes(
        jobs,
        open_device=open_device,
        name=day.device,
        workers=day.workers,
        seconds=_CASE_SECONDS,
        deadline=clock.deadline,
        environment=variables(day),
    ):
        emit(_row(method, backend, outcome))


def usable(day: Day, step: str, emit: Emit) -> list[str]:
    """The GPU backends that can run on the device; a failure is emitted for those that cannot."""
    reasons = about(day)["backends"]
    for name in BACKENDS:
        if reasons[name] is not None:
            emit(Row(step, name, "", "can run", FAILED, note=reasons[name]))
    return [name for name in BACKENDS if reasons[name] is None]


def _row(method: str, backend: str, outcome: CaseOutcome) -> Row:
    status = _STATUS[outcome.ending]
    if status == FAILED and "OutOfMemoryError" in (outcome.message or ""):
        status = NO_MEMORY
    ratio, note = outcome.ratio, outcome.message or ""
    what, unit = ("error", "of allowed") if method == "check" else ("full size", "")
    return Row("right", backend, outcome.name, what, status, ratio, unit, note=note)


def _full_size(day: Day) -> list[Case]:
    if not day.rehearse:
        return list(BENCHMARK_CASES)
    return [replace(shrunk(one, longest=32 // len(one.full), batch=1), name=one.name) for one in BENCHMARK_CASES]
