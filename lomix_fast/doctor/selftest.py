"""The selftest: on each device correctness of every backend first, then time and memory of those that are right."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..testing.cases import Case
from ..testing.devices import Device, Gpu
from ..testing.precision import full_float32
from . import workloads
from .checking import Checked, check_backend, check_backends_in_processes
from .devices import named
from .timing import Effort, Timing, time_workload
from .workloads import OFFICIAL


@dataclass(frozen=True)
class Failure:
    """What failed, by the name of the case or workload, and why."""

    device: str
    backend: str
    case: str
    message: str


@dataclass(frozen=True)
class Selftest:
    """Everything a selftest has found.

    Attributes:
        checked: a row for each device and usable backend.
        timings: figures of each device, workload and subject.
        seconds: how long it took.
    """

    checked: list[Checked]
    timings: list[Timing]
    seconds: float

    @property
    def failures(self) -> list[Failure]:
        """Cases that failed, then what went wrong at full size. A step that does not fit is none."""
        return [
            *(Failure(row.device, row.backend, c.name, str(c.message)) for row in self.checked for c in row.failures),
            *(Failure(t.device, t.subject, t.workload, str(t.reason)) for t in self.timings if t.is_failure),
        ]


def run_selftest(
    devices: Sequence[Device],
    usable: Mapping[str, Sequence[str]],
    cases: Sequence[Case],
    effort: Effort,
    say: Callable[[str], None],
    workers: int = 0,
) -> Selftest:
    """Check and time.

    TF32 is off throughout, for the backends, for plain PyTorch and for the official style.

    Args:
        devices: where.
        usable: names of the backends that can run, by name of the device.
        cases: what to check them on.
        effort: how often to time a step.
        say: told what goes on, a line at a time.
        workers: processes among which the cases of a GPU are shared out, where one that crashes or hangs costs only
            itself; 0 checks in this process, as on a CPU.
    """
    begin = time.perf_counter()
    checked: list[Checked] = []
    timings: list[Timing] = []
    with full_float32():
        for device in devices:
            backends = usable[device.name]
            say(f"checking {', '.join(backends)} on {device.name}: {len(cases)} cases each")
            if workers and isinstance(device, Gpu):
                rows = check_backends_in_processes(backends, device, cases, workers, say, named)
            else:
                rows = [check_backend(backend, device, cases, say) for backend in backends]
            checked += rows
            timings += _time(device, rows, effort, say)
    return Selftest(checked, timings, time.perf_counter() - begin)


def _time(device: Device, rows: Sequence[Checked], effort: Effort, say: Callable[[str], None]) -> list[Timing]:
    reasons = {row.backend: _why_not_timed(row, device) for row in rows}
    subjects = [name for name, reason in reasons.items() if reason is None] + [OFFICIAL]
    timings = []
    for workload in workloads.of(device):
        say(f"timing {', '.join(subjects)} on {device.name}: {workload.name}")
        timings += [
            Timing(device.name, name, workload.name, "not timed", reason)
            for name, reason in reasons.items()
            if reason is not None
        ]
        timings += time_workload(device, workload, subjects, effort, say)
    return timings


def _why_not_timed(row: Checked, device: Device) -> str | None:
    if row.failures:
        return f"{len(row.failures)} of {len(row.cases)} cases failed"
    if is_interpreted(row.backend, device.where.type):
        return "interpreter, not timed"
    return None


def is_interpreted(backend: str, device_type: str) -> bool:
    """Whether a backend runs in Triton's interpreter: always on a CPU, elsewhere when TRITON_INTERPRET asks for it."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "true", "on")
    return backend == "triton" and (device_type == "cpu" or asked)
