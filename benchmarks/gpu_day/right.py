"""Question 1, is it right: every shared case on both GPU backends, then the two benchmark problems at full size."""

from __future__ import annotations

import time
from dataclasses import replace

from lomix_fast.doctor import workloads
from lomix_fast.doctor.checking import CaseOutcome, check_in_processes
from lomix_fast.testing.cases import BENCHMARK_CASES, CASES, Case
from lomix_fast.testing.errors import is_out_of_memory, one_line
from lomix_fast.testing.process import Ended, Process, TooLong

from .day import CRASHED, FAILED, HUNG, NO_MEMORY, OK, SKIPPED, Clock, Day, Emit, Row
from .workers import about, open_device, start, variables

BACKENDS = ("cuda", "triton")
_STATUS = {"": OK, "wrong": FAILED, "raised": FAILED, "hung": HUNG, "crashed": CRASHED, "not run": SKIPPED}
# Of a rehearsal: each number of axes, dtype and kind of target once, and small.
_REHEARSED = ("base", "line", "volume_one_voxel", "classes_17", "classes_5", "classes_6", "half_16", "empty_batch")
_CASE_SECONDS, _FULL_SIZE_SECONDS = 75.0, 60.0


def run(day: Day, clock: Clock, emit: Emit) -> None:
    """Check both backends; a row for each case, whose value is its largest error over what is allowed."""
    names = usable(day, "right", emit)
    cases = [one for one in CASES if not day.rehearse or one.name in _REHEARSED]
    full = _full_size(day)
    at_work: dict[str, Process] = {}
    try:
        # The large ones first: truth in float64 takes seconds of the GPU, and the pool keeps the processors busy.
        for name in names:
            at_work[name] = start(day, f"full size, {name}", FullSize, day.device)
            at_work[name].begin("check", name, full)
        jobs = [(name, one) for name in names for one in cases]
        for backend, outcome in check_in_processes(
            jobs,
            open_device=open_device,
            name=day.device,
            workers=day.workers,
            seconds=_CASE_SECONDS,
            deadline=clock.deadline,
            environment=variables(day),
        ):
            emit(_row(backend, outcome))
        patience = time.monotonic() + _FULL_SIZE_SECONDS
        for name, process in at_work.items():
            until = max(clock.at_most(patience - time.monotonic()), 1.0)
            for row in _answers(name, full, process, until):
                emit(row)
    finally:
        for process in at_work.values():
            process.close()


def usable(day: Day, step: str, emit: Emit) -> list[str]:
    """The GPU backends that can run on the device; a failure is emitted for those that cannot."""
    reasons = about(day)["backends"]
    for name in BACKENDS:
        if reasons[name] is not None:
            emit(Row(step, name, "", "can run", FAILED, note=reasons[name]))
    return [name for name in BACKENDS if reasons[name] is None]


def _row(backend: str, outcome: CaseOutcome) -> Row:
    status = _STATUS[outcome.ending]
    if status == FAILED and "OutOfMemoryError" in (outcome.message or ""):
        status = NO_MEMORY
    ratio, note = outcome.ratio, outcome.message or ""
    return Row("right", backend, outcome.name, "error", status, ratio, "of allowed", note=note)


# ---- full size ----


def _full_size(day: Day) -> list[Case]:
    if not day.rehearse:
        return list(BENCHMARK_CASES)
    slices, volume = BENCHMARK_CASES
    small = replace(slices, batch=1, full=(32, 32), native=((1, 1), (2, 2), (4, 4), (8, 8)))
    return [small, replace(volume, full=(8,) * 3, native=((1,) * 3, (2,) * 3, (4,) * 3, (8,) * 3))]


class FullSize:
    """What runs in the process: full-size steps against float64 on the device itself."""

    def __init__(self, name: str) -> None:
        self._device = open_device(name)

    def check(self, backend: str, cases: list[Case]) -> list[tuple[str, str]]:
        """Status and note of each case."""
        return [self._check(backend, one) for one in cases]

    def _check(self, backend: str, one: Case) -> tuple[str, str]:
        where = self._device.where
        try:
            found = workloads.step_of(backend, workloads.draw(backend, one, where))()
            complaint = workloads.wrong(one, found, where)
        except Exception as error:  # of any kind: it is the result
            return NO_MEMORY if is_out_of_memory(error) else FAILED, one_line(error)
        return (OK, "") if complaint is None else (FAILED, complaint)


def _answers(name: str, cases: list[Case], process: Process, seconds: float) -> list[Row]:
    status, note, found = OK, "", []
    try:
        found = process.answer_within(seconds)
    except Ended as error:
        status = HUNG if isinstance(error, TooLong) else CRASHED
        note = one_line(error)
    rest = [(status, note)] * (len(cases) - len(found))
    return [
        Row("right", name, one.name, "full size", its, note=why)
        for one, (its, why) in zip(cases, [*found, *rest], strict=True)
    ]
