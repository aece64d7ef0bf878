"""Correctness: every backend on every case of the shared list, judged against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..testing.cases import Case, make_inputs
from ..testing.devices import Device
from ..testing.errors import one_line
from ..testing.judge import judge, plain_of, run_backend
from ..testing.placement import move_inputs
from ..testing.precision import full_float32
from ..testing.process import Ended, Process, TooLong, in_processes
from . import workloads


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case.

    Attributes:
        name: of the case.
        passed: whether everything was within its limits.
        ratio: the largest error over what is allowed; None when there was nothing to compare.
        message: why it failed, every complaint of it; None when it passed.
        ending: how it failed: "wrong", "raised", "hung", "crashed", or "not run"; "" when it passed.
    """

    name: str
    passed: bool
    ratio: float | None
    message: str | None
    ending: str = ""


@dataclass(frozen=True)
class Checked:
    """A backend on a device, over all chosen cases."""

    device: str
    backend: str
    cases: list[CaseOutcome] = field(default_factory=list)

    @property
    def failures(self) -> list[CaseOutcome]:
        """The cases that failed."""
        return [one for one in self.cases if not one.passed]

    @property
    def worst(self) -> CaseOutcome | None:
        """The case with the largest ratio; None when no case gave one."""
        judged = [one for one in self.cases if one.ratio is not None]
        return max(judged, key=lambda one: one.ratio or 0.0, default=None)


def check_backend(backend: str, device: Device, cases: Sequence[Case], say: Callable[[str], None]) -> Checked:
    """Run a backend over cases on a device.

    Whatever a case raises is its outcome. A device that stops computing altogether (an illegal access does that to a
    GPU, for the rest of the process) ends the run; the cases not run have failed, with that as their message.

    Args:
        backend: name of a backend that can run there.
        device: the device.
        cases: what to run.
        say: told of every failure when it happens.
    """
    done = Checked(device.name, backend)
    broken = device.complaint()
    for case in cases:
        if broken is not None:
            done.cases.append(_unfinished(case, "not run", f"not run, the device no longer computes: {broken}"))
            continue
        outcome = check_case(backend, device.where, case)
        done.cases.append(outcome)
        if not outcome.passed:
            say(f"  FAILED {backend} on {device.name}, case {case.name}: {outcome.message}")
            broken = device.complaint()
    return done


def check_case(backend: str, where: torch.device, case: Case) -> CaseOutcome:
    """Run a backend on one case, forward and backward, in the very strides of the case, and judge it."""
    try:
        plain_of(case, where)  # first and apart: where the yardstick fails, the backend is not to blame
    except Exception as error:
        message = f"cannot be judged, plain PyTorch itself raised {one_line(error)}"
        return _unfinished(case, "raised", message)
    try:
        got = run_backend(case, backend, move_inputs(make_inputs(case), where)).cpu()
    except Exception as error:  # of any kind: it is the result
        return _unfinished(case, "raised", f"raised {one_line(error)}")
    findings = judge(case, got, where)
    complaints = [one.complaint for one in findings if one.complaint is not None]
    ratio = max(one.ratio for one in findings)
    return CaseOutcome(case.name, not complaints, ratio, "; ".join(complaints) or None, "wrong" if complaints else "")


def _unfinished(case: Case, ending: str, message: str) -> CaseOutcome:
    return CaseOutcome(case.name, False, None, message, ending)


# ---- in processes, for a GPU ----


class Checking:
    """What runs in a process of the pool.

    Args:
        open_device: name -> the device.
        name: of the device.
    """

    def __init__(self, open_device: Callable[[str], Device], name: str) -> None:
        torch.set_num_threads(1)  # the truth of small cases; the other cores have other cases
        self._device = open_device(name)

    def check(self, backend: str, case: Case) -> tuple[CaseOutcome, bool]:
        """The outcome, and whether the device no longer computes in this process."""
        with full_float32():
            outcome = check_case(backend, self._device.where, case)
        return outcome, self._is_broken(outcome)

    def full_size(self, backend: str, case: Case) -> tuple[CaseOutcome, bool]:
        """The same of a step of the loss on a problem too large for the reference; see `workloads.wrong`."""
        where = self._device.where
        try:
            with full_float32():
                found = workloads.step_of(backend, workloads.draw(backend, case, where))()
                complaint = workloads.wrong(case, found, where)
            outcome = CaseOutcome(case.name, complaint is None, None, complaint, "wrong" if complaint else "")
        except Exception as error:  # of any kind: it is the result
            outcome = _unfinished(case, "raised", f"raised {one_line(error)}")
        return outcome, self._is_broken(outcome)

    def _is_broken(self, outcome: CaseOutcome) -> bool:
        return not outcome.passed and self._device.complaint() is not None


def compiles_together(backend: str, case: Case) -> Hashable:
    """What cases share that need the same kernels of Triton; those of others are compiled already."""
    if backend != "triton":
        return backend
    plan, dense = case.plan, case.dense or case.sigmoid
    operators = tuple(sorted({one.operator for one in plan.maps} & {"sub", "avg", "max"}))
    weights = (case.weight_map, case.ignore_index is None, case.weighted_ce, bool(case.label_smoothing), case.ce_weight)
    flags = (plan.squared, plan.sigmoid, plan.bounded, dense, case.target_dtype, bool(operators), weights)
    return backend, case.classes, len(case.full), case.dtype, flags


def check_in_processes(
    jobs: Sequence[tuple[str, str, Case]],
    *,
    open_device: Callable[[str], Device],
    name: str,
    workers: int,
    seconds: float,
    deadline: float = float("inf"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, str, CaseOutcome]]:
    """Check cases in a pool of processes: a case that crashes, hangs or breaks the device fails, and no other.

    Args:
        jobs: method of `Checking`, backend and case each; what needs the same kernels is begun with its first.
        open_device: name -> the device; called in the processes, so it can be pickled.
        name: of the device.
        workers: processes at once.
        seconds: most that a case may take, compilation and the start of a process included.
        deadline: of time.monotonic(), after which cases are "not run".
        environment: variables of the processes.

    Yields:
        (method, backend, outcome), in the order in which they end.
    """
    for done in in_processes(
        jobs,
        start=lambda number: Process(f"checks {number}", Checking, (open_device, name), environment=environment),
        command=lambda job: job,
        group=lambda job: (job[0], compiles_together(*job[1:])),
        workers=workers,
        seconds=seconds,
        deadline=deadline,
        spoilt=lambda value: value[1],
    ):
        method, backend, case = done.job
        yield method, backend, done.value[0] if done.error is None and done.begun else _lost(case, done.error)


def _lost(case: Case, error: Ended | None) -> CaseOutcome:
    if error is None:
        return _unfinished(case, "not run", "not run: time was up")
    if isinstance(error, TooLong):
        return _unfinished(case, "hung", f"hung: {one_line(error)}")
    ending = "crashed" if error.exit_code is not None else "raised"
    return _unfinished(case, ending, f"{ending}: {str(error).strip().splitlines()[-1][:600]}")


def check_backends_in_processes(
    backends: Sequence[str],
    device: Device,
    cases: Sequence[Case],
    workers: int,
    say: Callable[[str], None],
    open_device: Callable[[str], Device],
) -> list[Checked]:
    """`check_backend` for several backends at once in a pool; a case may take two minutes."""
    done = {backend: Checked(device.name, backend) for backend in backends}
    begin = time.monotonic()
    jobs = [("check", backend, case) for backend in backends for case in cases]
    found = check_in_processes(jobs, open_device=open_device, name=device.name, workers=workers, seconds=120)
    for count, (_, backend, outcome) in enumerate(found, start=1):
        done[backend].cases.append(outcome)
        if not outcome.passed:
            say(f"  FAILED {backend} on {device.name}, case {outcome.name}: {outcome.message}")
        if count % 50 == 0:
            say(f"  {count} of {len(jobs)} after {time.monotonic() - begin:.0f} s")
    order = {case.name: at for at, case in enumerate(cases)}
    for checked in done.values():
        checked.cases.sort(key=lambda outcome: order[outcome.name])
    return list(done.values())
